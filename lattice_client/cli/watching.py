"""Owns `lattice runs watch`: the events of a run as a live view, as lines, or as JSON.

Rule: no value is unpickled; only JSON is decoded.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lattice.v1 import payload_pb2, run_pb2
from rich.live import Live

from lattice_client import errors
from lattice_client.cli.options import Server, console, print_json, reachable, written
from lattice_client.cli.progress import Lines, Progress, label_of
from lattice_client.cli.terminal import one_line, printable, say
from lattice_client.client import AsyncLatticeClient
from lattice_client.convert import payloads
from lattice_client.convert.events import RunEvent
from lattice_client.convert.results import Decode
from lattice_client.transport.reconnection import RECONNECT_S

# The interval at which the live view updates its times.
CLOCK_S = 0.25


async def watch_run(server: Server, run_id: str, as_json: bool) -> None:
    """Show the events of a run until its end. Raises the error of the run, ClickException, LatticeError."""
    async with AsyncLatticeClient(server.target, **server.security()) as client:
        with reachable(server.target):
            run = await client.describe_run(run_id)
        if as_json:
            async for event in client.api.reader.fetched_events(run_id, fetch=_json_reader(client), on_loss=say_lost):
                print_json({"sequence": event.sequence, "type": event.type, "data": event.data})
        elif console.is_terminal and not console.is_dumb_terminal:
            await _watch_live(client, run)
        else:
            lines, labels = Lines(), dict[str, str]()
            async for event in client.api.reader.fetched_events(run_id, fetch=_json_reader(client), on_loss=say_lost):
                _print_plain(event, lines, labels)
        error = await client.api.reader.error_of(await client.describe_run(run_id))
    if error is not None:
        raise error


def say_lost(error: errors.RequestError) -> None:
    """Say that the connection of a reader broke."""
    say(f"The server does not answer; reconnecting for {RECONNECT_S:.0f} s. {one_line(str(error))}", err=True)


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is not shown, because decoding a pickle would run its code."""

    media_type: str
    size_bytes: int
    why: str = ""

    def __repr__(self) -> str:
        return f"<{self.media_type}, {self.size_bytes} bytes{self.why and f', {self.why}'}>"


def _json_reader(client: AsyncLatticeClient) -> Decode:
    """Return a function that decodes the JSON values of events, and replaces all others by `Opaque`."""

    async def read(payload: payload_pb2.Payload, _source: str) -> Any:
        media_type = payload.media_type or payloads.JSON
        if payload.WhichOneof("content") == "artifact":
            opaque = Opaque(media_type, payload.artifact.size_bytes)
        else:
            opaque = Opaque(media_type, len(payload.data) or len(payload.json.encode()))
        if media_type != payloads.JSON:
            return opaque
        try:
            return json.loads((await client.api.transfer.fetch(payload)).data)
        except (ValueError, RecursionError, errors.RequestError) as error:
            return replace(opaque, why=one_line(f"which is not valid JSON: {error}"))

    return read


def _print_plain(event: RunEvent, lines: Lines, labels: dict[str, str]) -> None:
    """Print an event; `labels` has those of the tasks of earlier events."""
    if name := event.data.get("display_name"):
        labels[event.task_id] = label_of(event.task_id, name)

    def echo(kind: str, task_id: str, text: str) -> None:
        say(f"{event.sequence:>6}  {kind:<15} {one_line(labels.get(task_id, task_id)):<20} {text}".rstrip())

    for task_id, line in lines.take(event):
        echo("task_log", task_id, printable(line.rstrip()).plain)
    if event.type == "task_log":
        return
    failure = event.data.get("failure")
    outputs = event.data.get("outputs")
    shown = f"{failure['kind']}: {failure['message']}" if failure else written(outputs) if outputs else ""
    if signal := event.data.get("name"):
        shown = f"{signal} {written({'value': event.data['value']})}" if "value" in event.data else signal
    if unread := event.data.get("unread_signals"):
        shown = f"{shown} no task took signal {' '.join(unread)}"
    if event.type == "task_network_access":
        shown = _access(event.data)
    if added := event.data.get("task_ids"):
        shown = f"{len(added)} tasks"
    echo(event.type, event.task_id, " ".join(shown.split()))


def _access(data: Mapping[str, Any]) -> str:
    """Return the network access of an attempt to one server as text."""
    verdict = data["verdict"].replace("_", " ")
    text = f"{data['host'] or 'other servers'}:{data['port']} {verdict}"
    if data["final"]:
        size = f", {data['sent_bytes']} bytes sent, {data['received_bytes']} received"
        return f"{text}: {data['connections']} connections{size if data['verdict'] == 'allowed' else ''}"
    return printable(f"{text}: {data['message']}" if data["message"] else text).plain


async def _watch_live(client: AsyncLatticeClient, run: run_pb2.Run) -> None:
    async def unfetched(payload: payload_pb2.Payload, _source: str) -> payload_pb2.Payload:
        return payload  # the live view shows no outputs, so that large ones need not be fetched

    progress = Progress(run)
    events = client.api.reader.fetched_events(run.run_id, fetch=unfetched, on_loss=say_lost)
    with Live(progress, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        async for batch in _batches(events):
            lines = [line for event in batch for line in progress.take(event)]
            if lines:  # printing draws the live view again
                console.print(*lines, sep="\n")
            else:
                live.refresh()


async def _batches(events: AsyncIterator[RunEvent]) -> AsyncIterator[list[RunEvent]]:
    """Yield the events that arrived since the last yield, as soon as there are any; an empty list after CLOCK_S."""
    queue: asyncio.Queue[RunEvent | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async for event in events:
                queue.put_nowait(event)
        finally:
            queue.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        is_open = True
        while is_open:
            batch: list[RunEvent | None] = []
            try:
                async with asyncio.timeout(CLOCK_S):
                    batch.append(await queue.get())
            except TimeoutError:
                pass
            while not queue.empty():
                batch.append(queue.get_nowait())
            is_open = None not in batch
            yield [event for event in batch if event is not None]
        await reader
    finally:
        reader.cancel()
