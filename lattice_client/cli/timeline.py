"""Owns the output of `lattice runs timeline`: bars at a terminal, lines of cells in a pipe, or one JSON document.

Rule: it does no I/O but printing.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from lattice_client.cli.attempts import Attempt, History
from lattice_client.cli.options import console, show
from lattice_client.cli.progress import STYLES, fine_span
from lattice_client.cli.terminal import one_line, say

COLUMNS = ("task", "attempt", "state", "node", "start", "queued", "ran", "critical")
NODE_COLUMNS = ("node", "attempts", "failed", "busy", "compared to other nodes")
FUNCTION_COLUMNS = ("function", "attempts", "failed", "ran, median", "longest", "queued, median", "longest")
MAX_FUNCTIONS = 20
MIN_BAR, MAX_NAME, MIN_NAME = 10, 32, 12
MIN_WIDTH = 60
# The columns between the name and the bar, with their margins.
OTHERS_WIDTH = 40
# From this on a node is called slower than the others.
SLOW = 1.5


def document(history: History) -> dict[str, Any]:
    """Return the history as a JSON document. Times are seconds since 1970, durations seconds."""
    attempts = [
        {
            **asdict(attempt),
            "queued_s": attempt.queued_s(history.now_s),
            "ran_s": attempt.ran_s(history.now_s),
        }
        for attempt in history.attempts
    ]
    return {
        "begin_s": history.begin_s,
        "now_s": history.now_s,
        "critical_path": history.path,
        "attempts": attempts,
        "nodes": [asdict(use) for use in history.nodes()],
        "functions": [asdict(use) for use in history.functions()],
    }


def headline(history: History) -> str:
    """Return how the time of the critical path was spent, for people."""
    total_s = max(history.now_s - history.begin_s, 1e-9)
    on_path = history.on_path()
    queued_s = sum(attempt.queued_s(history.now_s) for attempt in on_path)
    ran_s = sum(attempt.ran_s(history.now_s) for attempt in on_path)
    rest_s = max(0.0, total_s - queued_s - ran_s)
    tasks = f"{len(history.path)} task{'s' * (len(history.path) != 1)}"
    parts = ", ".join(
        f"{name} {fine_span(seconds)} ({seconds / total_s:.0%})"
        for name, seconds in (("running", ran_s), ("queued", queued_s), ("between attempts", rest_s))
    )
    return f"critical path: {tasks} in {fine_span(total_s)}: {parts}"


def print_timeline(history: History, limit: int) -> None:
    """Print the attempts and the summaries; at a terminal the `limit` most telling attempts as bars."""
    say(headline(history))
    say("")
    if console.is_terminal:
        chosen = most_telling(history, limit)
        _print_bars(history, chosen)
        if left := len(history.attempts) - len(chosen):
            say(f"... and {left} more attempts; --limit shows more, --html all")
    else:
        show(COLUMNS, [_cells(history, attempt) for attempt in history.attempts])
    say("")
    show(NODE_COLUMNS, [node_cells(use) for use in map(asdict, history.nodes())], wrapped="node")
    say("")
    functions = history.functions()
    show(FUNCTION_COLUMNS, [function_cells(use) for use in map(asdict, functions[:MAX_FUNCTIONS])], wrapped="function")
    if len(functions) > MAX_FUNCTIONS:
        say(f"... and {len(functions) - MAX_FUNCTIONS} more functions")


def most_telling(history: History, limit: int) -> list[Attempt]:
    """Return at most `limit` attempts in their order: the critical path, failures, the longest ones."""

    def key(indexed: tuple[int, Attempt]) -> tuple[bool, bool, float]:
        attempt = indexed[1]
        took_s = attempt.queued_s(history.now_s) + attempt.ran_s(history.now_s)
        return not attempt.is_critical, attempt.outcome != "failed", -took_s

    chosen = sorted(enumerate(history.attempts), key=key)[:limit]
    return [attempt for _, attempt in sorted(chosen, key=lambda indexed: indexed[0])]


def _cells(history: History, attempt: Attempt) -> tuple[str, ...]:
    start = "" if attempt.start_s is None else fine_span(attempt.start_s - history.begin_s)
    return (
        attempt.label,
        str(attempt.number or ""),
        attempt.outcome,
        attempt.node_id,
        start,
        fine_span(attempt.queued_s(history.now_s)),
        fine_span(attempt.ran_s(history.now_s)),
        "yes" if attempt.is_critical else "",
    )


def node_cells(use: dict[str, Any]) -> tuple[str, ...]:
    slowdown = use["slowdown"]
    if slowdown is None:
        compared = ""
    elif slowdown >= SLOW:
        compared = f"{slowdown:.1f} times as slow"
    else:
        compared = "as fast" if slowdown > 1 / SLOW else f"{1 / max(slowdown, 0.01):.1f} times as fast"
    return use["node_id"], str(use["attempts"]), str(use["failed"]), fine_span(use["busy_s"]), compared


def function_cells(use: dict[str, Any]) -> tuple[str, ...]:
    times = (use["median_ran_s"], use["max_ran_s"], use["median_queued_s"], use["max_queued_s"])
    return use["function"], str(use["attempts"]), str(use["failed"]), *map(fine_span, times)


def _print_bars(history: History, attempts: Sequence[Attempt]) -> None:
    # A narrow terminal shows names and bars only.
    is_wide = console.width >= MIN_WIDTH
    longest = max((len(one_line(attempt.label)) for attempt in attempts), default=0) + 2
    name_width = min(MAX_NAME if is_wide else MIN_NAME, longest)
    width = max(MIN_BAR, console.width - name_width - (OTHERS_WIDTH if is_wide else 1))
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True, width=name_width, overflow="ellipsis")
    if is_wide:
        table.add_column("#", no_wrap=True, justify="right")
        table.add_column("node", no_wrap=True, max_width=16, overflow="ellipsis")
        table.add_column("queued", no_wrap=True, justify="right")
        table.add_column("ran", no_wrap=True, justify="right")
    end = fine_span(history.now_s - history.begin_s)
    table.add_column(f"0{end:>{width - 1}}", no_wrap=True, width=width)
    for attempt in attempts:
        name = Text(one_line(attempt.label), "bold" if attempt.is_critical else "")
        queued, ran = attempt.queued_s(history.now_s), attempt.ran_s(history.now_s)
        cells = (str(attempt.number or ""), Text(one_line(attempt.node_id)), fine_span(queued), fine_span(ran))
        first = Text.assemble("* " if attempt.is_critical else "  ", name)
        table.add_row(first, *(cells if is_wide else ()), bar(history, attempt, width))
    console.print(table)
    say("* on the critical path")


def bar(history: History, attempt: Attempt, width: int) -> Text:
    """Return the times of an attempt as a bar: the wait light, the run in the colour of its outcome."""
    waits, runs = ("\u2591", "\u2588") if console.encoding.lower().startswith("utf") else (".", "#")
    total_s = max(history.now_s - history.begin_s, 1e-9)

    def column(time_s: float) -> int:
        return min(width, max(0, round((time_s - history.begin_s) / total_s * width)))

    start = min(column(history.now_s if attempt.start_s is None else attempt.start_s), width - 1)
    ready = min(column(attempt.ready_s), start)
    found = Text(" " * ready)
    if attempt.start_s is None:
        found.append(waits * (width - ready), "dim")
        return found
    end = column(history.now_s if attempt.end_s is None else attempt.end_s)
    found.append(waits * (start - ready), "dim")
    # An attempt of any length is visible.
    found.append(runs * max(1, end - start), STYLES.get(attempt.outcome, "dim"))
    return found
