"""Owns the command `lattice`. Commands of the other packages are found by their entry points, never imported by name.

Rule: `lattice run` is `python` with how to reach a server, and nothing else.
"""

import os
import sys

import click
from lattice.v1 import worker_pb2

from lattice_client.commands import Commands, Server, address, as_dict, as_json, connected, print_json, show
from lattice_client.runs import runs


@click.group(cls=Commands)
def main() -> None:
    """Lattice, a control plane for the workflows of LLM agents."""


main.add_command(runs)


@main.command()
@address
@as_json
def status(server: Server, as_json: bool) -> None:
    """Show the server and its load."""
    with connected(server) as client:
        cluster = client.cluster()
    if as_json:
        print_json(as_dict(cluster))
        return
    rows = [
        ("version", cluster.version),
        ("executor", cluster.executor),
        ("process", str(cluster.pid)),
        ("active runs", str(cluster.active_runs)),
        ("queued tasks", str(cluster.queued_tasks)),
        ("running attempts", str(cluster.running_attempts)),
    ]
    show(("fact", "value"), rows, wrapped="value")


@main.command()
@address
@as_json
def nodes(server: Server, as_json: bool) -> None:
    """List the nodes and what is free on them."""
    with connected(server) as client:
        found = client.nodes()
    if as_json:
        for node in found:
            print_json(as_dict(node))
        return
    rows = [
        (
            node.node_id,
            worker_pb2.NodeState.Name(node.state).removeprefix("NODE_STATE_").lower(),
            f"{node.free.cpu:g}/{node.capacity.cpu:g}",
            f"{node.free.memory_bytes / 2**30:.1f}/{node.capacity.memory_bytes / 2**30:.1f}",
            str(len(node.capacity.gpus)),
            str(node.attempts),
        )
        for node in found
    ]
    show(("node", "state", "cpu free", "GiB free", "gpus", "attempts"), rows, wrapped="node")


# What follows the script is the script's, also when it looks like an option of ours.
@main.command(context_settings={"allow_interspersed_args": False})
@address
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(server: Server, script: str, arguments: tuple[str, ...]) -> None:
    """Run a Python script against the server, as `python SCRIPT` would."""
    sys.stdout.flush()
    # A fresh interpreter in this very process: exit status, signals, tracebacks and `__main__` are the script's own.
    os.execve(sys.executable, [sys.executable, script, *arguments], {**os.environ, **server.environment()})
