"""Owns the command `lattice`. Commands of the other packages are found by their entry points, never imported by name.

Rule: tables for people, one JSON document a line for programs (`--json`), one clear line on stderr when it fails.
"""

import json
import os
import runpy
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from lattice.v1 import run_pb2, worker_pb2
from rich.console import Console
from rich.table import Table

from lattice_client.errors import LatticeError
from lattice_client.sync import LatticeClient

console = Console()
address = click.option("--addr", envvar="LATTICE_TARGET", default="127.0.0.1:50051", help="The server, host:port.")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")


class Commands(click.Group):
    """The group; turns this package's errors into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LatticeError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Commands)
def main() -> None:
    """Lattice, a control plane for the workflows of LLM agents."""


def _show(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    if not console.is_terminal:
        for row in rows:
            click.echo("\t".join(row))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_json(messages: Iterable[Message]) -> None:
    for message in messages:
        click.echo(json.dumps(MessageToDict(message, preserving_proto_field_name=True)))


@main.command()
@address
@as_json
def status(addr: str, as_json: bool) -> None:
    """Show the server and its load."""
    with LatticeClient(addr) as client:
        cluster = client.cluster()
    if as_json:
        _print_json([cluster])
        return
    rows = [
        ("version", cluster.version),
        ("executor", cluster.executor),
        ("process", str(cluster.pid)),
        ("active runs", str(cluster.active_runs)),
        ("queued tasks", str(cluster.queued_tasks)),
        ("running attempts", str(cluster.running_attempts)),
    ]
    _show(("fact", "value"), rows)


@main.command()
@address
@as_json
def nodes(addr: str, as_json: bool) -> None:
    """List the nodes and what is free on them."""
    with LatticeClient(addr) as client:
        found = client.nodes()
    if as_json:
        _print_json(found)
        return
    rows = (
        (
            node.node_id,
            worker_pb2.NodeState.Name(node.state).removeprefix("NODE_STATE_").lower(),
            f"{node.free.cpu:g}/{node.capacity.cpu:g}",
            f"{node.free.memory_bytes / 2**30:.1f}/{node.capacity.memory_bytes / 2**30:.1f}",
            str(len(node.capacity.gpus)),
            str(node.attempts),
        )
        for node in found
    )
    _show(("node", "state", "cpu free", "GiB free", "gpus", "attempts"), rows)


@main.command(context_settings={"ignore_unknown_options": True})
@address
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(addr: str, script: str, arguments: tuple[str, ...]) -> None:
    """Run a Python script against the server."""
    os.environ["LATTICE_TARGET"] = addr
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


@main.group()
def runs() -> None:
    """Look at runs, and cancel them."""


def _run_row(found: run_pb2.Run) -> tuple[str, ...]:
    state = run_pb2.RunState.Name(found.state).removeprefix("RUN_STATE_").lower()
    counts = found.task_counts
    created = found.create_time.ToDatetime().isoformat(timespec="seconds")
    return (found.run_id, found.display_name, state, f"{counts.succeeded}/{counts.total}", created)


RUN_COLUMNS = ("run", "name", "state", "tasks", "created (UTC)")


@runs.command("list")
@address
@as_json
def list_runs(addr: str, as_json: bool) -> None:
    """List runs, newest first."""
    with LatticeClient(addr) as client:
        found = client.list_runs()
    if as_json:
        _print_json(found)
    else:
        _show(RUN_COLUMNS, map(_run_row, found))


@runs.command()
@address
@as_json
@click.argument("run_id")
def show(addr: str, as_json: bool, run_id: str) -> None:
    """Show one run."""
    with LatticeClient(addr) as client:
        found = client.describe_run(run_id)
    if as_json:
        _print_json([found])
    else:
        _show(RUN_COLUMNS, [_run_row(found)])
        if found.HasField("failure"):
            click.echo(f"{found.failure.task_id}: {found.failure.message}\n{found.failure.traceback}")


@runs.command()
@address
@as_json
@click.argument("run_id")
def watch(addr: str, as_json: bool, run_id: str) -> None:
    """Follow a run to its end."""
    with LatticeClient(addr) as client:
        for event in client.get_run(run_id).events():
            if as_json:
                shown = {"sequence": event.sequence, "type": event.type, "data": event.data}
                click.echo(json.dumps(shown, default=repr))
            else:
                text = event.data.get("text") or event.data.get("outputs") or event.data.get("failure") or ""
                click.echo(f"{event.sequence:>6}  {event.type:<15} {event.task_id:<20} {str(text).rstrip()}")


@runs.command()
@address
@click.argument("run_id")
def cancel(addr: str, run_id: str) -> None:
    """Cancel a run."""
    with LatticeClient(addr) as client:
        client.cancel_run(run_id)
    click.echo(f"Cancelling {run_id}.")


for _entry in entry_points(group="lattice.commands"):
    main.add_command(_entry.load(), _entry.name)
