"""Owns the output of `lattice runs show`: the run, its graph, what failed and where, and why tasks wait.

Rule: values of tasks are not fetched or decoded.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lattice.v1 import errors_pb2, run_pb2, task_pb2, workflow_pb2
from rich.table import Table
from rich.text import Text

from lattice_client.cli.graph_rows import (
    MAX_SINGLE,
    brief,
    groups_of,
    progress_of,
    queued_s,
    ran_s,
    state_of,
    tree_rows,
)
from lattice_client.cli.options import as_dict, console, show
from lattice_client.cli.progress import STYLES, fine_span, label_of
from lattice_client.cli.terminal import one_line, say
from lattice_client.client import AsyncLatticeClient

TASK_COLUMNS = ("task", "name", "state", "attempt", "node", "time", "queued", "after", "progress")
TREE_COLUMNS = ("task", "state", "#", "node", "queued", "ran")
# How many failures, of different text, and how many waiting tasks are described.
MAX_FAILURES, MAX_EXPLAINED = 10, 10
MAX_ROWS = 200
# Narrower terminals show names and states only.
MIN_WIDTH = 60
# What stands for the characters of the tree where the encoding has only ASCII.
PLAIN = str.maketrans({"\u251c": "|", "\u2514": "`", "\u2500": "-", "\u2502": "|", "\u2026": ".", "\u00d7": "x"})
FRAME = re.compile(
    r'^ *File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>[^\n]+)\n(?: +(?P<code>\S.*))?', re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued task, why it waits, and how many tasks of its function are queued."""

    explained: task_pb2.ExplainTaskResponse
    function: str
    queued: int


@dataclass(frozen=True, slots=True)
class Report:
    """A run as it is now. `failed` are full tasks, each with the number of tasks that failed like it."""

    run: run_pb2.Run
    tasks: Sequence[run_pb2.TaskRun]
    graph: Sequence[workflow_pb2.GraphTask]
    failed: Sequence[tuple[run_pb2.TaskRun, int]]
    waiting: Sequence[Waiting]


async def gather(client: AsyncLatticeClient, run_id: str, *, with_outputs: bool) -> Report:
    """Read a run and what explains its state. Raises RequestError."""
    run = await client.describe_run(run_id)
    tasks = await client.list_tasks(run_id, with_outputs)
    graph = await client.run_graph(run_id)
    failed = [(await client.api.calls.describe_task(run_id, task.task_id), count) for task, count in _failures(tasks)]
    waiting = await _waiting(client, tasks, graph)
    return Report(run, tasks, graph, failed, waiting)


def _failures(tasks: Sequence[run_pb2.TaskRun]) -> list[tuple[run_pb2.TaskRun, int]]:
    """Return the first task of each kind of failure, with how many failed like it; also failures that are retried."""
    names = {task.task_id for task in tasks}
    groups: dict[tuple[int, str, str], list[run_pb2.TaskRun]] = defaultdict(list)
    for task in tasks:
        is_own = task.failure.kind not in {errors_pb2.FAILURE_KIND_UPSTREAM, errors_pb2.FAILURE_KIND_CANCELLED}
        if task.failure.task_id not in {"", task.task_id} and task.failure.task_id in names:
            continue  # A map has the failure of its item, which has the node and the attempt.
        is_open = task.state in {run_pb2.TASK_STATE_QUEUED, run_pb2.TASK_STATE_RUNNING}
        if task.HasField("failure") and is_own and (task.state == run_pb2.TASK_STATE_FAILED or is_open):
            # Numbers differ between failures of one kind.
            shape = re.sub(r"\d+", "0", task.failure.message)
            groups[task.failure.kind, task.failure.type, shape].append(task)
    return [(found[0], len(found)) for found in [*groups.values()][:MAX_FAILURES]]


async def _waiting(
    client: AsyncLatticeClient, tasks: Sequence[run_pb2.TaskRun], graph: Sequence[workflow_pb2.GraphTask]
) -> list[Waiting]:
    """Explain some queued tasks, first one of each function; tasks that wait for the same cause are counted once."""
    functions = {node.task_id: node.function_name for node in graph}
    queued: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        if task.state == run_pb2.TASK_STATE_QUEUED:
            queued[functions.get(task.task_id, "")].append(task.task_id)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queued.values()))
    found: dict[Any, Waiting] = {}
    for task_id in itertools.islice(filter(None, turns), MAX_EXPLAINED):
        explained = await client.explain(tasks[0].run_id, task_id)
        if explained.task.state != run_pb2.TASK_STATE_QUEUED:
            continue
        function = functions.get(task_id, "")
        # The place in the queue differs between tasks that wait for the same.
        reasons = frozenset(
            (r.kind, r.node_id, r.wanted) for r in explained.reasons if r.kind != task_pb2.WAIT_KIND_TURN
        )
        found.setdefault((function, reasons), Waiting(explained, function, len(queued[function])))
    return sorted(found.values(), key=lambda waiting: -waiting.explained.waited.ToNanoseconds())


def document(report: Report) -> dict[str, Any]:
    """Return the report as a JSON document."""
    before = {node.task_id: node for node in report.graph}
    tasks = []
    for task in report.tasks:
        node = before.get(task.task_id)
        more = {
            "predecessor_task_ids": list(node.predecessor_task_ids) if node else [],
            "function_name": node.function_name if node else "",
        }
        tasks.append(as_dict(task) | more)
    waiting = [as_dict(found.explained) | {"queued_of_function": found.queued} for found in report.waiting]
    return as_dict(report.run) | {"tasks": tasks, "waiting": waiting}


def print_tasks(report: Report, *, shows_all: bool) -> None:
    """Print the tasks: a tree at a terminal, in a pipe a line for each task."""
    if not console.is_terminal:
        show(TASK_COLUMNS, _flat(report))
        return
    tasks = {task.task_id: task for task in report.tasks}
    rows = [*tree_rows(groups_of(report.graph, tasks, is_grouped=not shows_all and len(tasks) > MAX_SINGLE))]
    columns = TREE_COLUMNS if console.width >= MIN_WIDTH else TREE_COLUMNS[:2]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Only the names are cut when the terminal is narrow.
        table.add_column(column, no_wrap=column != "task", overflow="ellipsis")
    for row in rows if shows_all else rows[:MAX_ROWS]:
        after = f"  after {one_line(row.after)}" if row.after else ""
        name = Text.assemble(_drawn(row.prefix + one_line(row.name)), (after, "dim"), no_wrap=True, overflow="ellipsis")
        state = Text(row.state, STYLES.get(row.state, STYLES["failed"] if "failed" in row.state else ""))
        cells = (name, state, row.attempt, Text(one_line(row.node)), row.queued, row.ran)
        table.add_row(*cells[: len(columns)])
    console.print(table)
    if len(rows) > MAX_ROWS and not shows_all:
        say(f"... and {len(rows) - MAX_ROWS} more rows; --all shows every task")
    elif len(tasks) > len(rows):
        say(f"{len(tasks)} tasks in {len(rows)} rows; --all shows every task")


def _drawn(text: str) -> str:
    """Return text with the characters of the tree as this terminal can show them."""
    return text if console.encoding.lower().startswith("utf") else text.translate(PLAIN)


def _flat(report: Report) -> list[tuple[str, ...]]:
    before = {node.task_id: brief(node.predecessor_task_ids) for node in report.graph}
    rows: list[tuple[str, ...]] = []
    for task in report.tasks:
        ran, queued = ran_s(task), queued_s(task)
        times = ("" if ran is None else fine_span(ran)), ("" if queued is None else fine_span(queued))
        name = (task.task_id, task.display_name, state_of(task), str(task.attempt or ""), task.node_id)
        rows.append((*name, *times, before.get(task.task_id, ""), progress_of(task)))
    return rows


def print_problems(report: Report) -> None:
    """Print what failed, with the line of code, and why tasks wait."""
    if report.failed:
        say("\nfailures:")
    for task, count in report.failed:
        others = f" and {count - 1} more like it" if count > 1 else ""
        where = f" on node {task.node_id}" if task.node_id else ""
        ending = "" if task.state == run_pb2.TASK_STATE_FAILED else f"; {state_of(task)} again"
        say(f"  {_label(task)}{others}: attempt {task.attempt}{where}{ending}")
        say(f"    {failure_text(task.failure)}")
        if place := place_of(task.failure.traceback):
            say(f"    {place}")
    if report.waiting:
        say("\nwaiting:")
    for found in report.waiting:
        explained = found.explained
        since = f" for {fine_span(explained.waited.ToNanoseconds() / 1e9)}" if explained.HasField("waited") else ""
        more = f"; {found.queued} of {one_line(found.function)} are queued" if found.queued > 1 else ""
        say(f"  {_label(explained.task)}: queued{since}{more}")
        for reason in explained.reasons:
            kind = task_pb2.WaitKind.Name(reason.kind).removeprefix("WAIT_KIND_").lower()
            say(f"    {kind}: {one_line(reason.message)}")


def _label(task: run_pb2.TaskRun) -> str:
    return one_line(label_of(task.task_id, task.display_name))


def failure_text(failure: errors_pb2.Failure) -> str:
    """Return the kind, the type and the message of a failure in one line."""
    kind = errors_pb2.FailureKind.Name(failure.kind).removeprefix("FAILURE_KIND_")
    return one_line(f"{kind}: {failure.type}: {failure.message}" if failure.type else f"{kind}: {failure.message}")


def place_of(traceback: str) -> str:
    """Return the innermost line of a Python traceback, for people; empty for a text without one."""
    frames = [*FRAME.finditer(traceback)]
    if not frames:
        return ""
    found = frames[-1]
    code = f": {found['code'].strip()}" if found["code"] else ""
    return one_line(f"{found['file']}:{found['line']}, in {found['function']}{code}")
