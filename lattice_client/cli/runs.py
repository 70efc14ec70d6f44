"""Owns the commands `lattice runs ...`. Rule: a failed or cancelled run is one message and exit status 1."""

import asyncio
import json
import signal as signals

import click
from lattice.v1 import run_pb2, task_pb2

from lattice_client.cli.groups import LazyGroup
from lattice_client.cli.options import Server, address, as_dict, as_json, connected, console, print_json, show
from lattice_client.cli.progress import span
from lattice_client.cli.terminal import one_line, say
from lattice_client.cli.watching import watch_run
from lattice_client.convert.events import RUN_STATES

MAX_RUNS = 1000
RUN_COLUMNS = ("run", "name", "state", "tasks", "since (UTC)")


SHOWING = {
    "logs": (
        "lattice_client.cli.inspection:read_logs",
        "Show what the tasks of a run printed, or what some of its tasks printed; all attempts.",
    ),
    "show": (
        "lattice_client.cli.inspection:show_run",
        "Show a run: the graph of its tasks, their states and times, failures, and why tasks wait.",
    ),
    "stream": (
        "lattice_client.cli.streaming:stream",
        "Show what a task, or all tasks of a run, stream, to the end.",
    ),
    "timeline": (
        "lattice_client.cli.inspection:show_timeline",
        "Show when the attempts of a run were queued and ran, the critical path, and which nodes are slow.",
    ),
}


@click.group(cls=LazyGroup, lazy=SHOWING)
def runs() -> None:
    """List, show, watch, signal, cancel, delete and retry runs; read their output and times."""


def state_of(run: run_pb2.Run) -> str:
    """Return the state of a run, whether it is open, and the signals that it waits for."""
    state = run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower() + ", open" * run.open
    names = [one_line(name) for name in run.awaited_signals]
    return f"{state}, waits for signal {' '.join(names)}" if names else state


def run_row(run: run_pb2.Run) -> tuple[str, ...]:
    """Return the cells of a run, by `RUN_COLUMNS`."""
    counts = run.task_counts
    created = run.create_time.ToDatetime()
    # The year is left out on a terminal, to leave more columns to the name.
    since = f"{created:%m-%d %H:%M}" if console.is_terminal else created.isoformat(timespec="seconds")
    return (run.run_id, run.display_name, state_of(run), f"{counts.succeeded}/{counts.total}", since)


@runs.command("list")
@address
@as_json
@click.option("--limit", type=click.IntRange(1, MAX_RUNS), default=100, show_default=True, help="The most to list.")
@click.option("--state", "states", multiple=True, type=click.Choice(RUN_STATES), help="Only runs in this state.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only runs with this label.")
def list_runs(server: Server, as_json: bool, limit: int, states: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """List runs, newest first: those in any of the given states that have all of the given labels."""
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
        show(RUN_COLUMNS, map(run_row, found), wrapped="name")


@runs.command()
@address
@click.argument("run_id")
def delete(server: Server, run_id: str) -> None:
    """Delete a run that has ended, with its events and results."""
    with connected(server) as client:
        client.delete_run(run_id)
    say(f"Run {run_id} is deleted.")


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
        say(f"Run {run_id} had already {state_of(run)}.")
    elif run.state == run_pb2.RUN_STATE_CANCELLED:
        say(f"Run {run_id} is cancelled.")
    else:
        say(f"Cancelling run {run_id}.")


@runs.command()
@address
@click.argument("run_id")
@click.argument("name")
@click.argument("value", default="null")
def signal(server: Server, run_id: str, name: str, value: str) -> None:
    """Send a signal to a run, for `context.wait_for(NAME)` in tasks of it. VALUE is JSON, such as true or '"yes"'."""
    try:
        decoded = json.loads(value)
    except ValueError as error:
        text = f"{value!r} is not JSON ({error}); a text is written with quotes, as '\"yes\"'"
        raise click.BadParameter(text, param_hint="VALUE") from None
    with connected(server) as client:
        client.signal_run(run_id, name, decoded)
    say(f"Run {run_id} has got signal {name}.")


@runs.command()
@address
@as_json
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A variable to send as a secret of the run.")
@click.argument("run_id")
def retry(server: Server, as_json: bool, secrets: tuple[str, ...], run_id: str) -> None:
    """Retry an ended run: a new run takes its finished outputs and runs its other tasks."""
    with connected(server) as client:
        run = client.describe_run(client.retry_run(run_id, secrets=secrets))
    if as_json:
        print_json(as_dict(run))
    else:
        say(f"Run {run.run_id} retries run {run_id}; `lattice runs watch {run.run_id}` shows it.")


@runs.command()
@address
@as_json
@click.argument("run_id")
@click.argument("task_id")
def explain(server: Server, as_json: bool, run_id: str, task_id: str) -> None:
    """Show why a task is queued or not ready, for how long, and when it may start."""
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
    """Show the events of a run until its end. The exit status is 1 when the run failed."""
    try:
        asyncio.run(watch_run(server, run_id, as_json))
    except KeyboardInterrupt:
        say(f"The run continues; `lattice runs cancel {run_id}` would end it.", err=True)
        raise SystemExit(128 + signals.SIGINT) from None
