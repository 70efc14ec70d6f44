"""Owns the command `lattice run`."""

import os
import subprocess
import sys

import click

from lattice_client.cli.options import Server, address


# Arguments after the script belong to the script, even if they look like an option of this command.
@click.command(context_settings={"allow_interspersed_args": False})
@address
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(server: Server, script: str, arguments: tuple[str, ...]) -> None:
    """Run a Python script as `python SCRIPT` does, with the server's address in its environment."""
    sys.stdout.flush()
    command, environment = [sys.executable, script, *arguments], {**os.environ, **server.environment()}
    if os.name == "nt":  # Its `execve` starts another process, and does not wait for it.
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)
    # A new interpreter in this process: exit status, signals, tracebacks and `__main__` are those of the script.
    os.execve(sys.executable, command, environment)
