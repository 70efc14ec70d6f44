"""The command `lattice` inside a test: called in place, or at a pseudo terminal, on runs of a few simple tasks."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from lattice_client import LatticeClient, Run, task
from lattice_client.cli.main import main
from tests.commands import LATTICE

WAIT_S = 60


@task
def greet(name: str) -> str:
    print("hello", name)
    return name


@task
def fail(name: str) -> str:
    print("about to fail", file=sys.stderr)
    raise LookupError("nothing [bold]there[/bold]")


@task
def gated(gate: str) -> str:
    print("waiting at the gate")
    return Path(gate).read_text()


def call(address: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"LATTICE_TARGET": address})


def at_terminal(address: str, *arguments: str) -> Result:
    """Call a command that takes its output for a terminal of 80 columns without colours."""
    return CliRunner().invoke(main, arguments, env={"LATTICE_TARGET": address, "FORCE_COLOR": "1"})


def ended(client: LatticeClient, definition: Any, inputs: dict[str, Any] | None = None) -> Run:
    """A run of one task that has come to its end."""
    workflow = client.create_workflow("the name")
    workflow.add_task(definition, inputs or {})
    run = workflow.run()
    for _ in run.events(timeout=WAIT_S):
        pass
    return run


class Terminal:
    """The end of a pseudo terminal at which a person would sit."""

    def __init__(self, descriptor: int, process: "subprocess.Popen[bytes]") -> None:
        self._descriptor = descriptor
        self.process = process
        self.text = ""

    def read_until(self, wanted: str) -> None:
        """Read until a text was shown; the end of the process is no such text."""
        while wanted not in self.text:
            assert self._read(), f"{wanted!r} was never shown: {self.text}"

    def read_all(self) -> int:
        """Read to the end and return the exit status."""
        while self._read():
            pass
        return self.process.wait(WAIT_S)

    def _read(self) -> bool:
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self.text + data.decode(errors="replace"))
        return bool(data)


@contextmanager
def terminal(address: str, *arguments: str, lines: int = 24) -> Iterator[Terminal]:
    """Run a command at a pseudo terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 100, 0, 0))
    # The terminal has the size, not the environment of these tests.
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    environment |= {"LATTICE_TARGET": address, "TERM": "xterm-256color"}
    command = [LATTICE, *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait(WAIT_S)
        os.close(ours)
