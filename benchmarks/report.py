"""Writes measurements as a page with tables, and as an SVG plot."""

import json
import statistics
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

# How many times faster nodes of LangGraph are, how soon readers are told, how much they slow a run, and the idle cost.
LANGGRAPH_GOAL, TOLD_GOAL_S, SLOWED_GOAL, IDLE_GOAL = 1.8, 0.25, 0.2, 0.005
GOALS = {"W1": 1.0, "W2": 0.25, "W3": 0.25, "W4": 1.0, "W5": 0.7, "W6": 0.3}
# What each workload is, the factor from its samples to the unit in which it is shown, and that unit.
WORKLOADS = {
    "W1": ("one task", 1e3, "ms"),
    "W2": ("a chain of 50 tasks, each step", 1e3, "ms"),
    "W3": ("one task, then 1,000 side by side, then one", 1e3, "ms"),
    "W4": ("16 callers that run chains of three tasks", 1, "chains/s"),
    "W5": ("an agent's graph of five tasks, over the 400 ms that they sleep", 1e3, "ms"),
    "W6": ("100 MB passed down five tasks", 1e3, "ms"),
    "W8": ("1,000 coroutines that sleep 1 s", 1, "s"),
}
SIDES = ("lattice", "ray tasks", "ray actors")
Samples = dict[str, dict[str, list[float]]]
# Of the lines of the page.
WIDTH = 120
INTRODUCTION = """# Performance

`make bench` makes this page: Lattice on Ray workers and raw Ray run the same functions on the same machine, through
their public clients. They take turns within every round; the figures are medians. Compare ratios: times of another
machine, or of another day on a virtual machine, differ by more than the two systems do.

The tasks do nothing, so that only the cost of running them counts. A task that works for 100 ms hides it.
"""
RATIOS = """
The ratio is Lattice to raw Ray tasks. Below 1 Lattice is faster, except for W4, where the figure is a rate and above 1
is faster. The red lines in the plot are what we aim at.

![Ratios]({name}.svg)
"""
CAVEATS = """
## What the figures do not say

- Ray tasks and actors are not recorded here. Lattice records each event, and serves it to any number of readers. A
  journal on disk, the default of a server with a fixed port, adds two commits for each run, about 1.1 ms of W1
  ([decision 79](decisions/0079-a-journal-by-default.md)). It is off here: these servers have a free port.
- Clients, server, agent, runners and Ray share the processors of one machine. On more processors than two, more of
  their work overlaps.
- W6 copies memory. It depends on how fast the machine provides pages, which varies on virtual machines.
- One Ray driver with 16 threads is compared in W4, its best form; Lattice has four processes of four threads.
"""


@dataclass
class Measurements:
    """The measurements of one run of all benchmarks.

    Attributes:
        machine: the machine and the versions, a line each.
        samples: by workload and side; see `WORKLOADS`.
        graphs: the shape, the number of tasks, the seconds and the bytes of the server's memory a task.
        processor_s: by part, for 10,000 tasks of W1 and of W3.
        wall_s: how long these took.
        variants: see `benchmarks.variants`.
        langgraph: see `benchmarks.langgraph_nodes`.
        readers: see `benchmarks.readers`; the samples by their names.
        idle: see `benchmarks.idle`.
    """

    machine: list[str]
    samples: Samples
    graphs: list[tuple[str, int, float, float]] = field(default_factory=list)
    processor_s: dict[str, dict[str, float]] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)
    variants: dict[str, dict[str, float]] = field(default_factory=dict)
    langgraph: dict[str, list[float]] = field(default_factory=dict)
    readers: dict[str, list[float]] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)


def write(page: Path, found: Measurements) -> None:
    """Write a page, and beside it the plot and what `read` returns."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    page.with_suffix(".svg").write_text(_plot(_ratios(found.samples)))
    page.write_text(text_of(found, page.stem))


def read(page: Path) -> Measurements:
    """Return the measurements of a page."""
    return Measurements(**json.loads(page.with_suffix(".json").read_text()))


def text_of(found: Measurements, name: str) -> str:
    """Return the text of a page; `name` is the name of its files."""
    parts = [INTRODUCTION, *(f"- {line}" for line in found.machine), ""]
    parts += [*_workloads(found.samples), RATIOS.format(name=name).rstrip()]
    if found.graphs:
        parts += ["", "## Large graphs", "", *_graphs(found.graphs)]
    if found.processor_s:
        parts += ["", "## Processor time", "", *_processor(found)]
    if found.variants:
        parts += ["", "## Other functions, inputs and connections", "", *_variants(found.variants)]
    if found.langgraph:
        parts += ["", "## LangGraph nodes that compute", "", *_langgraph(found.langgraph)]
    if found.readers:
        parts += ["", "## Readers of one run", "", *_readers(found.readers)]
    if found.idle:
        parts += ["", "## Without work", "", *_idle(found.idle)]
    return "\n".join([*parts, CAVEATS])


def _table(*rows: list[str]) -> list[str]:
    head, *others = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others)]


def _ratios(samples: Samples) -> dict[str, float]:
    medians = {
        name: {side: statistics.median(values) for side, values in sides.items()} for name, sides in samples.items()
    }
    return {name: found["lattice"] / found["ray tasks"] for name, found in medians.items() if "ray tasks" in found}


def _workloads(samples: Samples) -> list[str]:
    ratios, rows = _ratios(samples), []
    for name, sides in samples.items():
        text, factor, unit = WORKLOADS[name]
        shown = [f"{statistics.median(sides[side]) * factor:.3g}" if side in sides else "" for side in SIDES]
        goal = f"{'≥' if name == 'W4' else '≤'} {GOALS[name]}" if name in GOALS else ""
        ratio = f"**{ratios[name]:.2f}**" if name in ratios else ""
        rows.append([name, f"{text}, {unit}", *shown, ratio, goal])
    return _table(["", "workload", "Lattice", "Ray tasks", "Ray actors", "ratio", "aim"], *rows)


def _graphs(graphs: list[tuple[str, int, float, float]]) -> list[str]:
    rows = [
        # Few tasks use memory that the process already has.
        [shape, f"{count:,}", f"{seconds * 1e6:.0f}", f"{size / 1e3:.1f}" if count >= 10_000 else ""]
        for shape, count, seconds, size in graphs
    ]
    return _table(["tasks", "number", "µs a task", "memory of the server a task, KB"], *rows)


def _processor(found: Measurements) -> list[str]:
    parts = ["server", "agent", "runners", "client"]
    rows = [
        [name, *(f"{used[part]:.2f}" for part in parts), f"{sum(used.values()):.2f}", f"{found.wall_s[name]:.2f}"]
        for name, used in found.processor_s.items()
    ]
    return ["Seconds for 10,000 tasks:", "", *_table(["", *parts, "in all", "elapsed"], *rows)]


def _variants(variants: dict[str, dict[str, float]]) -> list[str]:
    rows = []
    for name, found in variants.items():
        plain = variants["plain, local executor" if name.endswith("local executor") else "plain"]
        shown = [f"{found[key] * 1e3:.3g} ({found[key] / plain[key]:.2f})" for key in ("W1", "W3")]
        rows.append([name, *shown])
    text = "Milliseconds, and the ratio to the plain one. W3 has no first task here."
    return [text, "", *_table(["", "W1", "W3"], *rows)]


def _langgraph(samples: dict[str, list[float]]) -> list[str]:
    plain, lattice = (statistics.median(samples[side]) for side in ("plain", "lattice"))
    row = ["W7", f"{plain:.3g}", f"{lattice:.3g}", f"**{plain / lattice:.2f}**", f"≥ {LANGGRAPH_GOAL}"]
    text = (
        "Three nodes compute in Python side by side. Plain LangGraph runs them in threads, of which one computes at a "
        "time. The same graph, compiled by Lattice, runs them in processes; two processors can make it twice as fast."
    )
    return [textwrap.fill(text, WIDTH), "", *_table(["", "plain LangGraph, s", "Lattice, s", "ratio", "aim"], row)]


def _readers(samples: dict[str, list[float]]) -> list[str]:
    found = {name: statistics.median(values) for name, values in samples.items()}
    slowed = found["with_s"] / found["without_s"] - 1
    rows = [
        ["the run, without readers", f"{found['without_s']:.3g} s", ""],
        ["the run, with readers", f"{found['with_s']:.3g} s", ""],
        ["slower by", f"**{100 * slowed:.0f} %**", f"≤ {100 * SLOWED_GOAL:.0f} %"],
        ["from an event to the last reader", f"**{1e3 * found['told_s']:.0f} ms**", f"< {1e3 * TOLD_GOAL_S:.0f} ms"],
        ["from the first call of all readers to the first event of the last", f"{1e3 * found['opened_s']:.0f} ms", ""],
    ]
    text = (
        f"{found['readers']:,.0f} readers follow an agent of {found['tasks']:.0f} tasks, which sleep. They are streams "
        "in one process on the same machine. Runs with and without readers alternate."
    )
    return [textwrap.fill(text, WIDTH), "", *_table(["", "", "aim"], *rows)]


def _idle(idle: dict[str, float]) -> list[str]:
    rows = [[part, f"{100 * share:.2f}", f"< {100 * IDLE_GOAL:.1f}"] for part, share in idle.items()]
    text = "Processor time of a server and of an agent that have no tasks, with one client connected."
    return [text, "", *_table(["process, executor", "% of a processor", "aim"], *rows)]


def _plot(ratios: dict[str, float]) -> str:
    width, row = 640, 36
    largest = max([1.0, *ratios.values()])
    unit = (width - 160) / largest
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{row * (len(ratios) + 1)}">']
    parts.append('<style>text{font:14px sans-serif}</style><text x="8" y="20">Lattice relative to raw Ray tasks</text>')
    for index, (name, ratio) in enumerate(ratios.items()):
        y = row * (index + 1)
        parts.append(f'<text x="8" y="{y + 18}">{name}</text>')
        parts.append(f'<rect x="48" y="{y + 4}" width="{ratio * unit:.0f}" height="20" fill="#4878a8"/>')
        parts.append(f'<text x="{54 + ratio * unit:.0f}" y="{y + 19}">{ratio:.2f}</text>')
        if name in GOALS:
            x = 48 + GOALS[name] * unit
            parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{y}" y2="{y + 28}" stroke="#c04040" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"
