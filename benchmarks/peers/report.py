"""Writes the page that compares Lattice with other systems."""

import json
import statistics
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.peers.systems import SYSTEMS

WORKLOADS = {"W1": "one task, ms", "W2": "a chain of 50, each step, ms", "W3": "1, then 1,000 side by side, then 1, ms"}
WIDTH = 120
INTRODUCTION = """# Other systems

`make bench-peers` makes this page: Lattice and other systems run the same functions on the same machine, each through
its public client and in a virtual environment of its own. One system runs at a time. In each round every system is
started, does each workload to warm up, and is measured; the figures are medians over all rounds.

The functions do nothing, so that only the cost of running them counts. A task that works for 100 ms hides most of it.
The systems do different things for a task: see below before you compare. [Performance](performance.md) compares
Lattice with Ray in more detail.
"""
PROMISES = """
## What each does with a task
"""


@dataclass
class Comparison:
    """The measurements of all systems.

    Attributes:
        machine: the machine, a line each.
        samples: seconds by system and workload.
        versions: the versions by system and package.
        rounds: in how many rounds each system was measured.
        busy: the part of the processors that other programs used, just before each system was started.
    """

    machine: list[str]
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)

    def add(self, name: str, samples: dict[str, list[float]], versions: dict[str, str]) -> None:
        """Add the samples of one round of a system."""
        for workload, values in samples.items():
            self.samples.setdefault(name, {}).setdefault(workload, []).extend(values)
        self.versions[name] = versions
        self.rounds[name] = self.rounds.get(name, 0) + 1


def write(page: Path, found: Comparison) -> None:
    """Write a page, and beside it what `read` returns."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    page.write_text(text_of(found))


def read(page: Path) -> Comparison:
    """Return the measurements of a page."""
    return Comparison(**json.loads(page.with_suffix(".json").read_text()))


def text_of(found: Comparison) -> str:
    """Return the text of a page."""
    parts = [INTRODUCTION, *(f"- {line}" for line in found.machine)]
    if found.busy:
        parts.append(f"- other programs used {100 * statistics.median(found.busy):.0f} % of the processors meanwhile")
    parts.append("")
    parts += [*_table(found), "", "In brackets: the ratio to Lattice. Above 1 Lattice is faster."]
    parts += [PROMISES, *(_promise(name, found) for name in found.samples)]
    return "\n".join(parts) + "\n"


def _table(found: Comparison) -> list[str]:
    rows = [["", *WORKLOADS.values(), "rounds"]]
    rows.append(["---"] * len(rows[0]))
    for name, samples in found.samples.items():
        cells = [_cell(found, name, workload) if workload in samples else "" for workload in WORKLOADS]
        rows.append([SYSTEMS[name].title, *cells, str(found.rounds[name])])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(found: Comparison, name: str, workload: str) -> str:
    median_s = statistics.median(found.samples[name][workload])
    ours = found.samples.get("lattice", {}).get(workload)
    shown = f"{median_s * 1e3:,.0f}" if median_s >= 1 else f"{median_s * 1e3:.3g}"
    if name == "lattice" or not ours:
        return shown
    ratio = median_s / statistics.median(ours)
    return f"{shown} ({ratio:,.0f})" if ratio >= 10 else f"{shown} ({ratio:.2g})"


def _promise(name: str, found: Comparison) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in found.versions[name].items())
    text = f"- **{SYSTEMS[name].title}** ({versions}): {SYSTEMS[name].text}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
