"""Owns `lattice runs stream`: the streamed output of tasks, as text or as JSON.

Rule: no value is unpickled; only JSON is decoded.
"""

import json
import signal
from typing import Any

import click

from lattice_client.cli.options import Server, address, as_json, connected, print_json, written
from lattice_client.cli.terminal import harmless, one_line, say
from lattice_client.cli.watching import Opaque, say_lost
from lattice_client.convert import payloads
from lattice_client.errors import RunError
from lattice_client.runs import streams
from lattice_client.runs.decoding import Fetched
from lattice_client.runs.driver import blocking, iterate
from lattice_client.sync import LatticeClient


@click.command()
@address
@as_json
@click.argument("run_id")
@click.argument("task_id", required=False)
def stream(server: Server, as_json: bool, run_id: str, task_id: str | None) -> None:
    """Show what a task, or all tasks of a run, stream, to the end. The exit status is 1 when it failed.

    Texts that one task streams are printed one behind the other, as a language model writes them; other chunks, and
    those of a whole run, as lines.
    """
    try:
        with connected(server) as client:
            error = _show(client, run_id, task_id, is_json=as_json)
    except KeyboardInterrupt:
        say(f"The run continues; `lattice runs cancel {run_id}` would end it.", err=True)
        raise SystemExit(128 + signal.SIGINT) from None
    if error is not None:
        raise error


def _show(client: LatticeClient, run_id: str, task_id: str | None, *, is_json: bool) -> RunError | None:
    api = client.twin.api
    is_inside_line = False
    for found in iterate(api, streams.fetched(api, run_id, task_id, on_loss=say_lost), run_id, None):
        if is_json:
            print_json(_document(found))
        elif isinstance(found, streams.Chunk):
            is_inside_line = _print(found, is_text=task_id is not None, is_inside_line=is_inside_line)
    if is_inside_line:
        say("")
    if task_id is not None:
        return blocking(streams.error_of(api, run_id, task_id))
    return blocking(api.reader.error_of(client.describe_run(run_id)))


def _document(found: streams.Chunk | streams.Progress) -> dict[str, Any]:
    named = {"task_id": found.task_id, "attempt": found.attempt}
    if isinstance(found, streams.Progress):
        return named | {"done": found.done, "total": found.total}
    if found.is_restart:
        return named | {"sequence": found.sequence, "restart": True}
    return named | {"sequence": found.sequence, "index": found.index, "value": _value_of(found.value)}


def _print(chunk: streams.Chunk, *, is_text: bool, is_inside_line: bool) -> bool:
    """Print a chunk; return whether the cursor is inside a line."""
    value = None if chunk.is_restart else _value_of(chunk.value)
    if is_text and isinstance(value, str):
        click.echo(harmless(value), nl=False)
        return not value.endswith("\n") if value else is_inside_line
    if is_inside_line:
        say("")
    if chunk.is_restart:
        say(f"[attempt {chunk.attempt} of {one_line(chunk.task_id)} begins anew]", err=True)
        return False
    text = value if isinstance(value, str) else written(value) if isinstance(value, Opaque) else json.dumps(value)
    say(one_line(text) if is_text else f"{one_line(chunk.task_id)}\t{one_line(text)}")
    return False


def _value_of(fetched: Fetched) -> Any:
    media_type = fetched.media_type or payloads.JSON
    opaque = Opaque(media_type, len(fetched.data))
    if media_type != payloads.JSON:
        return opaque
    try:
        return json.loads(fetched.data)
    except (ValueError, RecursionError):
        return opaque
