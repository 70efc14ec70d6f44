"""Owns the live view of a run: the state of its tasks by the run's events, drawn for a terminal.

Rule: it does no I/O, and reads only the clock it is given.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from lattice.v1 import run_pb2
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lattice_client.cli.terminal import one_line, printable
from lattice_client.convert.events import RunEvent

STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "retrying": "yellow", "cancelling": "yellow"}
PREFIX_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "red")
COLUMNS = ("task", "state", "attempt", "node", "time")
# The order of states when not all tasks fit; tasks of the same state are ordered newest first.
RANKS = {"running": 0, "retrying": 1, "failed": 2}
# The header, the column names, the number of tasks left out, and the line of the cursor.
OTHER_LINES = 4
NAME_LENGTH = 24
STREAMS = ("stdout", "stderr")
ENDS = frozenset({"task_succeeded", "task_failed", "task_retrying", "task_cancelled"})
MOVES = ENDS | {"task_started", "task_skipped"}


class Lines:
    """Assembles the output of tasks, which arrives in pieces, to lines."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], str] = {}

    def take(self, event: RunEvent) -> list[tuple[str, str]]:
        """Return the lines that an event completes, each with its task id; an attempt's end completes its last line."""
        if event.type == "task_log":
            key = (event.task_id, event.data["stream"])
            *whole, rest = (self._open.pop(key, "") + event.data["text"]).split("\n")
            if rest:
                # A carriage return at the end may be the first half of a line end.
                self._open[key] = overwritten(rest) + ("\r" if rest.endswith("\r") else "")
            return [(event.task_id, overwritten(line)) for line in whole]
        if event.type in ENDS:
            keys = [(event.task_id, stream) for stream in STREAMS if (event.task_id, stream) in self._open]
        else:
            keys = list(self._open) if event.type == "run_finished" else []
        return [(key[0], overwritten(self._open.pop(key))) for key in keys]

    def open_line(self, event: RunEvent) -> str:
        """Return the line that earlier output of the same stream has not completed."""
        return self._open.get((event.task_id, event.data["stream"]), "")


def overwritten(line: str) -> str:
    """Return the visible part of a line in which carriage returns overwrite text, as progress bars do."""
    return line.rstrip("\r").rpartition("\r")[2]


@dataclass(slots=True)
class Row:
    """One task of the run that an event named."""

    label: str
    style: str
    state: str = ""
    attempt: int = 0
    node: str = ""
    began_s: float | None = None
    ended_s: float | None = None
    note: str = ""
    sequence: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """The key by which rows are ordered."""
        return RANKS.get(self.state, len(RANKS)), -self.sequence


@dataclass
class Progress:
    """The state of a run by its events. `rich` renders it within the height of the terminal."""

    run: run_pb2.Run
    clock: Callable[[], float] = time.time
    state: str = "running"
    _rows: dict[str, Row] = field(default_factory=dict)
    _states: Counter[str] = field(default_factory=Counter)
    _lines: Lines = field(default_factory=Lines)
    _total: int = 0
    _began_s: float | None = None
    _ended_s: float | None = None

    def take(self, event: RunEvent) -> list[Text]:
        """Apply the next event; return the lines of output that it completes, which are printed above the view."""
        completed = self._lines.take(event)
        match event.type:
            case "run_started":
                self._began_s, self._total = event.time_s, event.data["task_count"]
            case "tasks_added":
                self._total += len(event.data["task_ids"])
            case "run_cancelling":
                self.state = "cancelling"
            case "run_finished":
                self.state, self._ended_s = event.data["state"], event.time_s
            case "task_log":
                row = self._row_of(event)
                newest = self._lines.open_line(event), *(line for _, line in reversed(completed))
                row.note = next(filter(str.strip, newest), row.note)
            case "signal_awaited":
                self._row_of(event).note = f"waits for signal {event.data['name']!r}"
            case kind if kind in MOVES:
                self._move(event)
        return [self._prefixed(task_id, line) for task_id, line in completed]

    def _row_of(self, event: RunEvent) -> Row:
        task_id = event.task_id
        if task_id not in self._rows:
            label = label_of(task_id, event.data.get("display_name", ""))
            self._rows[task_id] = Row(label, PREFIX_STYLES[len(self._rows) % len(PREFIX_STYLES)])
        return self._rows[task_id]

    def _move(self, event: RunEvent) -> None:
        row = self._row_of(event)
        state = event.type.removeprefix("task_")
        state = "running" if state == "started" else state
        self._states[row.state] -= 1
        self._states[state] += 1
        row.state, row.sequence = state, event.sequence
        row.attempt = event.data.get("attempt", row.attempt)
        if state == "running":
            gpus = ",".join(map(str, event.data["gpu_indices"]))
            row.node = event.data["node_id"] + (f" gpu {gpus}" if gpus else "")
            row.began_s, row.ended_s, row.note = event.time_s, None, ""
        else:
            row.ended_s = event.time_s
        if failure := event.data.get("failure"):
            row.note = failure["message"] if not failure["type"] else f"{failure['type']}: {failure['message']}"

    def _prefixed(self, task_id: str, line: str) -> Text:
        row = self._rows[task_id]
        return Text.assemble((one_line(row.label), row.style), (" | ", "dim"), first_line(line))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the header, and as many tasks as fit."""
        yield self._header()
        if not self._rows:
            return
        most = max(1, options.max_height - OTHER_LINES)
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        for column in COLUMNS:
            table.add_column(column, no_wrap=True, justify="right" if column in {"attempt", "time"} else "left")
        table.add_column("output", no_wrap=True, ratio=1)
        for row in heapq.nsmallest(most, self._rows.values(), key=lambda row: row.order):
            style = STYLES.get(row.state, "dim")
            cells = (Text(row.state, style), str(row.attempt or ""), Text(one_line(row.node)), self._time(row))
            table.add_row(Text(one_line(row.label), row.style), *cells, first_line(row.note))
        yield table
        if len(self._rows) > most:
            yield Text(f"... and {len(self._rows) - most} more", "dim")

    def _header(self) -> Text:
        header = Text(no_wrap=True, overflow="ellipsis")
        header.append(one_line(self.run.run_id), "bold")
        if self.run.display_name:
            header.append(f" {one_line(self.run.display_name)[:NAME_LENGTH]}")
        header.append(f"  {self.state}", STYLES.get(self.state, "yellow"))
        header.append(f"  {self._states['succeeded']}/{self._total} tasks")
        if self._began_s is not None:
            header.append(f"  {span((self._ended_s or self.clock()) - self._began_s)}")
        others = [f"{self._states[state]} {state}" for state in RANKS if self._states[state]]
        if others:
            header.append(f"  {', '.join(others)}", "dim")
        return header

    def _time(self, row: Row) -> str:
        return "" if row.began_s is None else span((row.ended_s or self.clock()) - row.began_s)


def label_of(task_id: str, name: str) -> str:
    """Return the label of a task: its id, with its display name unless the id begins with it."""
    return task_id if not name or task_id.startswith(name) else f"{name} ({task_id})"


def first_line(text: str) -> Text:
    """Return the first line of another process's output, with its colours and without other control sequences."""
    return printable(overwritten(text.strip("\n").partition("\n")[0]))


def span(seconds: float) -> str:
    """Return a duration as a text for people."""
    return f"{max(0.0, seconds):.1f}s" if seconds < 60 else str(timedelta(seconds=int(seconds)))


def fine_span(seconds: float) -> str:
    """Return a duration as a text for people, with milliseconds below a second."""
    return f"{max(0.0, seconds) * 1000:.0f}ms" if seconds < 0.9995 else span(seconds)
