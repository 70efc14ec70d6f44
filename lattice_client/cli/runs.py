"""Owns the commands `lattice runs ...`. Rule: a run that ended otherwise than well is a message and exit status 1."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import click
from lattice.v1 import payload_pb2, run_pb2, task_pb2
from rich.live import Live

from lattice_client import errors
from lattice_client.cli.options import (
    Server,
    address,
    as_dict,
    as_json,
    connected,
    console,
    print_json,
    reachable,
    show,
    written,
)
from lattice_client.cli.progress import Lines, Progress, label_of, span
from lattice_client.cli.terminal import one_line, printable, say
from lattice_client.client import AsyncLatticeClient
from lattice_client.convert import graphs, payloads
from lattice_client.convert.graphs import RunEvent
from lattice_client.runs.reader import TERMINAL
from lattice_client.transport.reconnection import RECONNECT_S

MAX_RUNS = 1000
RUN_COLUMNS = ("run", "name", "state", "tasks", "since (UTC)")
TASK_COLUMNS = ("task", "name", "state", "attempt", "node", "time")
# How often the clocks of a live view move when nothing else does.
CLOCK_S = 0.25


@click.group()
def runs() -> None:
    """Look at runs, and cancel them."""


def _state(run: run_pb2.Run) -> str:
    return run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower() + ", open" * run.open


def _run_row(run: run_pb2.Run) -> tuple[str, ...]:
    counts = run.task_counts
    created = run.create_time.ToDatetime()
    # On a terminal a name needs the room more than a year does.
    since = f"{created:%m-%d %H:%M}" if console.is_terminal else created.isoformat(timespec="seconds")
    return (run.run_id, run.display_name, _state(run), f"{counts.succeeded}/{counts.total}", since)


def _task_row(task: run_pb2.TaskRun) -> tuple[str, ...]:
    state = run_pb2.TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()
    took = ""
    if task.HasField("start_time") and task.HasField("end_time"):
        took = span((task.end_time.ToNanoseconds() - task.start_time.ToNanoseconds()) / 1e9)
    return (task.task_id, task.display_name, state, str(task.attempt or ""), task.node_id, took)


@runs.command("list")
@address
@as_json
@click.option("--limit", type=click.IntRange(1, MAX_RUNS), default=100, show_default=True, help="The most to list.")
@click.option("--state", "states", multiple=True, type=click.Choice(graphs.RUN_STATES), help="Only runs in this state.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only runs with this label.")
def list_runs(server: Server, as_json: bool, limit: int, states: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """List runs, newest first. Several states mean any of them, several labels all of them."""
    wrong = [label for label in labels if "=" not in label]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=VALUE", param_hint="--label")
    wanted = {key: value for key, _, value in (label.partition("=") for label in labels)}
    with connected(server) as client:
        found = client.list_runs(limit, states=states, labels=wanted)
    if as_json:
        for run in found:
            print_json(as_dict(run))
    else:
        show(RUN_COLUMNS, map(_run_row, found), wrapped="name")


@runs.command("show")
@address
@as_json
@click.argument("run_id")
def show_run(server: Server, as_json: bool, run_id: str) -> None:
    """Show one run and its tasks."""
    with connected(server) as client:
        run, tasks = client.describe_run(run_id), client.list_tasks(run_id, with_outputs=as_json)
    if as_json:
        print_json(as_dict(run) | {"tasks": [as_dict(task) for task in tasks]})
        return
    show(RUN_COLUMNS, [_run_row(run)], wrapped="name")
    say("")
    show(TASK_COLUMNS, map(_task_row, tasks), wrapped="name")
    names = {task.task_id: task.display_name for task in tasks}
    if run.state in TERMINAL and (error := graphs.error_of(run, names.get(run.failure.task_id, ""))) is not None:
        say(f"\n{str(error).rstrip()}")


@runs.command()
@address
@as_json
@click.argument("run_id")
def cancel(server: Server, as_json: bool, run_id: str) -> None:
    """Cancel a run."""
    with connected(server) as client:
        run = client.cancel_run(run_id)
    if as_json:
        print_json(as_dict(run))
    elif run.state in {run_pb2.RUN_STATE_SUCCEEDED, run_pb2.RUN_STATE_FAILED}:
        say(f"Run {run_id} had ended before: it {_state(run)}.")
    elif run.state == run_pb2.RUN_STATE_CANCELLED:
        say(f"Run {run_id} is cancelled.")
    else:
        say(f"Cancelling run {run_id}.")


@runs.command()
@address
@as_json
@click.argument("run_id")
def retry(server: Server, as_json: bool, run_id: str) -> None:
    """Run what a run did not finish, in a new run that takes over the rest."""
    with connected(server) as client:
        run = client.describe_run(client.retry_run(run_id))
    if as_json:
        print_json(as_dict(run))
    else:
        say(f"Run {run.run_id} retries run {run_id}; `lattice runs watch {run.run_id}` follows it.")


@runs.command()
@address
@as_json
@click.argument("run_id")
@click.argument("task_id")
def explain(server: Server, as_json: bool, run_id: str, task_id: str) -> None:
    """Say what a task waits for, since when, and when it may start."""
    with connected(server) as client:
        found = client.explain(run_id, task_id)
    if as_json:
        print_json(as_dict(found))
        return
    state = run_pb2.TaskState.Name(found.task.state).removeprefix("TASK_STATE_").lower()
    since = f", for {span(found.waited.ToNanoseconds() / 1e9)}" if found.HasField("waited") else ""
    soon = f"; it may start in {span(found.start_in.ToNanoseconds() / 1e9)}" if found.start_in.ToNanoseconds() else ""
    say(f"Task {task_id} is {state}{since}{soon}:")
    for reason in found.reasons:
        kind = task_pb2.WaitKind.Name(reason.kind).removeprefix("WAIT_KIND_").lower()
        say(f"  {kind}: {one_line(reason.message)}")


@runs.command()
@address
@as_json
@click.argument("run_id")
def watch(server: Server, as_json: bool, run_id: str) -> None:
    """Follow a run to its end. Fails when the run does."""
    try:
        asyncio.run(_watch(server, run_id, as_json))
    except KeyboardInterrupt:
        say(f"The run goes on; `lattice runs cancel {run_id}` would end it.", err=True)
        raise SystemExit(128 + signal.SIGINT) from None


async def _watch(server: Server, run_id: str, as_json: bool) -> None:
    async with AsyncLatticeClient(server.target, **server.security()) as client:
        with reachable(server.target):
            run = await client.describe_run(run_id)
        if as_json:
            async for event in client.reader.fetched_events(run_id, fetch=_reader(client), on_loss=_say_lost):
                print_json({"sequence": event.sequence, "type": event.type, "data": event.data})
        elif console.is_terminal and not console.is_dumb_terminal:
            await _watch_live(client, run)
        else:
            lines = Lines()
            async for event in client.reader.fetched_events(run_id, fetch=_reader(client), on_loss=_say_lost):
                _print_plain(event, lines)
        error = await client.reader.error_of(await client.describe_run(run_id))
    if error is not None:
        raise error


def _say_lost(error: errors.RequestError) -> None:
    say(f"The server does not answer; reconnecting for {RECONNECT_S:.0f} s. {one_line(str(error))}", err=True)


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is not shown: to read a pickle is to run the code in it."""

    media_type: str
    size_bytes: int
    why: str = ""

    def __repr__(self) -> str:
        return f"<{self.media_type}, {self.size_bytes} bytes{self.why and f', {self.why}'}>"


def _reader(client: AsyncLatticeClient) -> graphs.Decode:
    """Return what reads values for a person or a program that did not write them: JSON only."""

    async def read(payload: payload_pb2.Payload) -> Any:
        media_type = payload.media_type or payloads.JSON
        if payload.WhichOneof("content") == "artifact":
            opaque = Opaque(media_type, payload.artifact.size_bytes)
        else:
            opaque = Opaque(media_type, len(payload.data) or len(payload.json.encode()))
        if media_type != payloads.JSON:
            return opaque
        try:
            return json.loads((await client.transfer.fetch(payload)).data)
        except (ValueError, RecursionError, errors.RequestError) as error:
            return replace(opaque, why=one_line(f"which cannot be read: {error}"))

    return read


def _print_plain(event: RunEvent, lines: Lines) -> None:
    def echo(kind: str, task_id: str, text: str) -> None:
        say(f"{event.sequence:>6}  {kind:<15} {one_line(task_id):<20} {text}".rstrip())

    for task_id, line in lines.take(event):
        echo("task_log", task_id, printable(line.rstrip()).plain)
    if event.type == "task_log":
        return
    failure = event.data.get("failure")
    outputs = event.data.get("outputs")
    shown = f"{failure['kind']}: {failure['message']}" if failure else written(outputs) if outputs else ""
    if added := event.data.get("task_ids"):
        shown = f"{len(added)} tasks"
    echo(event.type, label_of(event.task_id, event.data.get("display_name", "")), " ".join(shown.split()))


async def _watch_live(client: AsyncLatticeClient, run: run_pb2.Run) -> None:
    async def unfetched(payload: payload_pb2.Payload) -> payload_pb2.Payload:
        return payload  # the picture has no outputs; large ones need not be fetched

    progress = Progress(run)
    events = client.reader.fetched_events(run.run_id, fetch=unfetched, on_loss=_say_lost)
    with Live(progress, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        async for batch in _batches(events):
            lines = [line for event in batch for line in progress.take(event)]
            if lines:  # printing draws the picture again
                console.print(*lines, sep="\n")
            else:
                live.refresh()


async def _batches(events: AsyncIterator[RunEvent]) -> AsyncIterator[list[RunEvent]]:
    """Yield events as soon as they are there, all that are there at once; nothing when a moment passed without any."""
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
