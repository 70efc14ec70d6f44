"""Owns the history of a run as one HTML file. Rule: it has no scripts and names no other file; all text is escaped."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape

from lattice_client.cli.attempts import Attempt, History
from lattice_client.cli.chrome_trace import tracks_of
from lattice_client.cli.progress import fine_span
from lattice_client.cli.terminal import one_line
from lattice_client.cli.timeline import (
    FUNCTION_COLUMNS,
    NODE_COLUMNS,
    function_cells,
    headline,
    most_telling,
    node_cells,
)

WIDTH, ROW, NAMES = 1000, 18, 260
# Rows of single attempts; the tracks below show all attempts.
MAX_ROWS = 300
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #1b1f24; background: #fff }
h1 { font-size: 1.3em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: 2px 12px 2px 0; text-align: left }
svg { font: 11px system-ui, sans-serif }
.queued { fill: #d0d7de } .succeeded { fill: #2da44e } .failed { fill: #cf222e }
.running { fill: #0969da } .cancelled { fill: #8c959f } .critical { stroke: #bf8700; stroke-width: 2 }
text.critical { stroke: none; font-weight: bold } .tick { stroke: #d8dee4 }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 } svg text { fill: #e6edf3 }
.queued { fill: #30363d } .tick { stroke: #30363d } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
TICKS = 10


def html_page(history: History, run_id: str, title: str, state: str) -> str:
    """Return the page."""
    heading = f"{one_line(title)} ({run_id})" if title else run_id
    counts = f"{state}; {len(history.attempts)} attempts; {headline(history)}"
    rows = most_telling(history, MAX_ROWS)
    left = len(history.attempts) - len(rows)
    left_out = f" The {left} others are below." if left else ""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{_text(heading)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(heading)}</h1><p>{_text(counts)}</p>",
        "<p>Grey: queued. Green: succeeded. Red: failed. Blue: running. Framed: on the critical path.</p>",
        f"<h2>Attempts</h2><p>In the order of their starts.{left_out}</p>",
        *_svg(history, len(rows), _rows(history, rows)),
        "<h2>Nodes</h2>",
        *_table(NODE_COLUMNS, (node_cells(asdict(use)) for use in history.nodes())),
        "<h2>Functions</h2>",
        *_table(FUNCTION_COLUMNS, (function_cells(asdict(use)) for use in history.functions())),
        "<h2>Attempts by node</h2>",
    ]
    for node_id, tracks in tracks_of(history).items():
        parts.append(f"<h3>{_text(node_id)}</h3>")
        bars = (_run(history, attempt, track) for track, attempts in enumerate(tracks) for attempt in attempts)
        parts += _svg(history, len(tracks), bars)
    return "\n".join([*parts, "</body></html>\n"])


def _text(text: str) -> str:
    return escape(one_line(text))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "<table><tr>" + "".join(f"<th>{_text(column)}</th>" for column in columns) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
    yield "</table>"


def _svg(history: History, rows: int, bars: Iterable[str]) -> Iterable[str]:
    height = (rows + 1) * ROW
    yield f'<svg width="{NAMES + WIDTH + 60}" height="{height}" role="img">'
    total_s = history.now_s - history.begin_s
    for tick in range(TICKS + 1):
        x = NAMES + WIDTH * tick / TICKS
        yield f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{ROW}" y2="{height}"/>'
        yield f'<text x="{x:.1f}" y="12">{fine_span(total_s * tick / TICKS)}</text>'
    yield from bars
    yield "</svg>"


def _rows(history: History, attempts: Sequence[Attempt]) -> Iterable[str]:
    for row, attempt in enumerate(attempts):
        y = (row + 1) * ROW + 13
        kind = ' class="critical"' if attempt.is_critical else ""
        shown = f"{attempt.label} #{attempt.number}" if attempt.number > 1 else attempt.label
        cut = shown if len(shown) <= 40 else f"{shown[:39]}\N{HORIZONTAL ELLIPSIS}"
        yield f'<text{kind} x="0" y="{y}">{_text(cut)}</text>'
        end_s = attempt.ready_s + attempt.queued_s(history.now_s)
        yield _bar(history, attempt, row, "queued", attempt.ready_s, end_s)
        if attempt.start_s is not None:
            yield _run(history, attempt, row)


def _run(history: History, attempt: Attempt, row: int) -> str:
    assert attempt.start_s is not None
    kind = f"{attempt.outcome}{' critical' if attempt.is_critical else ''}"
    return _bar(history, attempt, row, kind, attempt.start_s, attempt.start_s + attempt.ran_s(history.now_s))


def _bar(history: History, attempt: Attempt, row: int, kind: str, begin_s: float, end_s: float) -> str:
    scale = WIDTH / max(history.now_s - history.begin_s, 1e-9)
    x = NAMES + (begin_s - history.begin_s) * scale
    width = max((end_s - begin_s) * scale, 0.0 if kind == "queued" else 1.0)
    facts = [
        f"{attempt.label}, attempt {attempt.number}: {attempt.outcome}",
        f"node {attempt.node_id}" if attempt.node_id else "",
        f"queued {fine_span(attempt.queued_s(history.now_s))}, ran {fine_span(attempt.ran_s(history.now_s))}",
        attempt.failure,
    ]
    title = "; ".join(one_line(fact) for fact in facts if fact)
    y = (row + 1) * ROW + 3
    shape = f'class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 4}"'
    return f"<rect {shape}><title>{escape(title)}</title></rect>"
