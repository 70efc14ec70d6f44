"""Owns the commands that look into a run: `lattice runs show`, `logs` and `timeline`.

Rule: they read, and change nothing. A file is written only where the user named it.
"""

import asyncio
import json
import signal
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import click
from lattice.v1 import payload_pb2, run_pb2

from lattice_client.cli import run_report, timeline
from lattice_client.cli.attempts import History, Recorder
from lattice_client.cli.chrome_trace import chrome_trace
from lattice_client.cli.options import Server, address, as_json, print_json, reachable, show
from lattice_client.cli.run_logs import LineAssembly, Printer, Wanted
from lattice_client.cli.runs import RUN_COLUMNS, run_row, state_of
from lattice_client.cli.terminal import say
from lattice_client.cli.timeline_html import html_page
from lattice_client.cli.watching import say_lost
from lattice_client.client import AsyncLatticeClient
from lattice_client.convert.failures import error_of
from lattice_client.errors import TaskFailedError
from lattice_client.runs.reader import TERMINAL, Selection

MAX_LIMIT = 10_000
FILE = click.Path(dir_okay=False, writable=True, allow_dash=True, path_type=Path)


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


async def _unfetched(payload: payload_pb2.Payload, _source: str) -> payload_pb2.Payload:
    return payload  # These commands show no values, so that large ones need not be fetched.


@click.command("show")
@address
@as_json
@click.option("--all", "shows_all", is_flag=True, help="At a terminal, a row for each task also in a large run.")
@click.argument("run_id")
def show_run(server: Server, as_json: bool, shows_all: bool, run_id: str) -> None:
    """Show a run: the graph of its tasks, their states and times, failures, and why tasks wait.

    At a terminal a task stands below a task it waits for. In a run of more than 40 tasks, tasks of the same function
    that wait for the same tasks share a row. In a pipe each task is a line.
    """
    _run(_show(server, run_id, as_json, shows_all))


async def _show(server: Server, run_id: str, as_json: bool, shows_all: bool) -> None:
    async with AsyncLatticeClient(server.target, **server.security()) as client:
        with reachable(server.target):
            report = await run_report.gather(client, run_id, with_outputs=as_json)
    if as_json:
        print_json(run_report.document(report))
        return
    run = report.run
    show(RUN_COLUMNS, [run_row(run)], wrapped="name")
    say("")
    run_report.print_tasks(report, shows_all=shows_all)
    run_report.print_problems(report)
    names = {task.task_id: task.display_name for task in report.tasks}
    if run.state in TERMINAL and (error := error_of(run, names.get(run.failure.task_id, ""))) is not None:
        if isinstance(error, TaskFailedError):
            error.failed_tasks = 1  # The others are listed above.
        say(f"\n{str(error).rstrip()}")


@click.command("logs")
@address
@as_json
@click.option("--follow", is_flag=True, help="Continue with new output until the run ends.")
@click.option("--after", type=click.IntRange(0), default=0, metavar="N", help="Only output after event N of the run.")
@click.option("--stream", type=click.Choice(["stdout", "stderr"]), help="Only one of the two streams.")
@click.option("--attempt", type=click.IntRange(1), default=None, help="Only attempts with this number.")
@click.argument("run_id")
@click.argument("task_ids", metavar="[TASK]...", nargs=-1)
def read_logs(
    server: Server,
    as_json: bool,
    follow: bool,
    after: int,
    stream: str | None,
    attempt: int | None,
    run_id: str,
    task_ids: tuple[str, ...],
) -> None:
    """Show what the tasks of a run printed, or what some of its tasks printed; all attempts.

    At a terminal `!` marks lines of stderr. In a pipe a line is four cells, separated by tabs: task, attempt, stream,
    text. Reading can be resumed: --json has `resume_after` in each line, and an interrupted command names the number
    for --after. A mapped task stands for its items.
    """
    wanted = Wanted(task_ids, stream or "", attempt or 0)
    assembly = LineAssembly(after)
    try:
        asyncio.run(_logs(server, run_id, wanted, assembly, Printer(as_json), follow=follow))
    except KeyboardInterrupt:
        say(f"`lattice runs logs {run_id} --after {assembly.resume_after}` continues here.", err=True)
        raise SystemExit(128 + signal.SIGINT) from None


async def _logs(
    server: Server, run_id: str, wanted: Wanted, assembly: LineAssembly, printer: Printer, *, follow: bool
) -> None:
    async with AsyncLatticeClient(server.target, **server.security()) as client:
        with reachable(server.target):
            run = await client.describe_run(run_id)
            found = [await client.api.calls.describe_task(run_id, task_id) for task_id in wanted.task_ids]
        # A task that has not begun may turn out to be a mapped one: its items do not exist yet.
        may_have_items = any(task.HasField("item_count") or not task.attempt for task in found)
        selection = Selection(() if may_have_items else wanted.task_ids, until=None if follow else run.sequence)
        events = client.api.reader.fetched_events(run_id, assembly.resume_after, _unfetched, say_lost, selection)
        async for event in events:
            for line in assembly.take(event):
                if wanted.has(line):
                    printer.print(line, assembly.resume_after)
        resume_after = assembly.resume_after
        for line in assembly.rest():
            if wanted.has(line):
                printer.print(line, resume_after)


@click.command("timeline")
@address
@as_json
@click.option("--limit", type=click.IntRange(1, MAX_LIMIT), default=40, show_default=True, help="The most bars.")
@click.option("--html", "html_file", type=FILE, help="Write a page for a browser to a file; - for stdout.")
@click.option(
    "--chrome-trace",
    "trace_file",
    type=FILE,
    help="Write a trace for ui.perfetto.dev or chrome://tracing to a file; - for stdout.",
)
@click.argument("run_id")
def show_timeline(
    server: Server, as_json: bool, limit: int, html_file: Path | None, trace_file: Path | None, run_id: str
) -> None:
    """Show when the attempts of a run were queued and ran, the critical path, and which nodes are slow.

    The critical path is the chain of tasks that determined the duration of the run. The bars of a large run are those
    of the critical path, of failures, and of the attempts that took longest. In a pipe each attempt is a line.
    """
    _run(_timeline(server, run_id, as_json, limit, html_file, trace_file))


async def _timeline(
    server: Server, run_id: str, as_json: bool, limit: int, html_file: Path | None, trace_file: Path | None
) -> None:
    async with AsyncLatticeClient(server.target, **server.security()) as client:
        with reachable(server.target):
            run = await client.describe_run(run_id)
        history = await _history(client, run)
    written = []
    if trace_file is not None:
        trace = chrome_trace(history, run.run_id, run.display_name)
        written.append(_write(trace_file, [json.dumps(trace)]))
    if html_file is not None:
        written.append(_write(html_file, [html_page(history, run.run_id, run.display_name, state_of(run))]))
    if as_json:
        print_json(timeline.document(history))
    elif not written:
        show(RUN_COLUMNS, [run_row(run)], wrapped="name")
        say("")
        timeline.print_timeline(history, limit)
    for name in filter(None, written):
        say(f"Wrote {name}", err=True)


async def _history(client: AsyncLatticeClient, run: run_pb2.Run) -> History:
    """Read the events of a run up to its newest one. Raises RequestError."""
    tasks = await client.list_tasks(run.run_id)
    recorder = Recorder(await client.run_graph(run.run_id), tasks)
    selection = Selection(has_logs=False, until=None if run.state in TERMINAL else run.sequence)
    events = client.api.reader.fetched_events(run.run_id, 0, _unfetched, say_lost, selection)
    async for event in events:
        recorder.take(event)
    return recorder.history(time.time())


def _write(path: Path, parts: Iterable[str]) -> str:
    """Write a file; return its name, or nothing for stdout. Raises click.ClickException."""
    text = "".join(parts)
    if str(path) == "-":
        click.echo(text)
        return ""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None
    return str(path)
