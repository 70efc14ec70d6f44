"""Owns the results of simulations as figures, a Markdown table and a plot. Rule: one row for each policy.

`score` weighs three things alike: the mean completion of all runs, the 99th percentile of it, and fairness between
callers. It is the geometric mean of the three, each relative to the first row; lower is better.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from benchmarks.outcomes import EndedRun, Outcome
from benchmarks.workloads import CROWD

WIDTH, ROW, LEFT = 760, 18, 250
COLOURS = {"mean_s": "#4878a8", "p99_s": "#9cbbd6", "others_p99_s": "#d09c4c"}


@dataclass(frozen=True, slots=True)
class Figures:
    """One row. Completions and slowdowns are of all runs, or of those of the callers other than the crowd.

    A slowdown is a completion as a multiple of the run's critical path. `jain` is Jain's index over the callers, of
    each the sum of its completions over the sum of its critical paths: 1 when all are slowed down alike.
    """

    mean_s: float
    p50_s: float
    p99_s: float
    slowdown_mean: float
    slowdown_p50: float
    slowdown_p99: float
    others_mean_s: float
    others_p50_s: float
    others_p99_s: float
    others_slowdown_mean: float
    others_slowdown_p99: float
    jain: float
    cpu: float
    gpu: float
    makespan_s: float
    scheduler_us: float
    orchestrator_us: float


HEADINGS = (
    "mean, s",
    "p50",
    "p99",
    "slowdown: mean",
    "p50",
    "p99",
    "others: mean, s",
    "p50",
    "p99",
    "slowdown: mean",
    "p99",
    "Jain",
    "cpu",
    "gpu",
    "makespan, s",
    "scheduler, µs a task",
    "runs, µs a task",
)


def figures_of(outcome: Outcome) -> Figures:
    """Return the figures of one simulation."""
    completions, slowdowns = _completions(outcome.runs)
    others, others_slowdowns = _completions([run for run in outcome.runs if run.caller != CROWD])
    return Figures(
        statistics.mean(completions),
        percentile(completions, 0.5),
        percentile(completions, 0.99),
        statistics.mean(slowdowns),
        percentile(slowdowns, 0.5),
        percentile(slowdowns, 0.99),
        statistics.mean(others),
        percentile(others, 0.5),
        percentile(others, 0.99),
        statistics.mean(others_slowdowns),
        percentile(others_slowdowns, 0.99),
        jain(_by_caller(outcome.runs).values()),
        outcome.cpu,
        outcome.gpu,
        outcome.makespan_s,
        1e6 * outcome.scheduler_s / outcome.tasks,
        1e6 * outcome.orchestrator_s / outcome.tasks,
    )


def average(rows: Sequence[Figures]) -> Figures:
    """Return the mean of each figure over several seeds."""
    return Figures(*(statistics.mean(column) for column in zip(*map(astuple, rows), strict=True)))


def score(row: Figures, base: Figures) -> float:
    """Return how a row compares with another; see above."""
    return math.prod((row.mean_s / base.mean_s, row.p99_s / base.p99_s, base.jain / row.jain)) ** (1 / 3)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least a `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def jain(values: Iterable[float]) -> float:
    """Return Jain's index of fairness: from 1 when all are alike down to one over their number."""
    found = list(values)
    return sum(found) ** 2 / (len(found) * sum(value * value for value in found))


def table(rows: Mapping[str, Figures]) -> str:
    """Return the rows as Markdown, the lowest score in bold."""
    base = next(iter(rows.values()))
    scores = {name: score(row, base) for name, row in rows.items()}
    lines = [f"| policy | {' | '.join(HEADINGS)} | score |", f"|---|{'---:|' * (len(HEADINGS) + 1)}"]
    for name, row in rows.items():
        shown = [f"{value:.0f}" if value >= 100 else f"{value:.2f}" for value in astuple(row)]
        mark = "**" if scores[name] == min(scores.values()) else ""
        lines.append(f"| {mark}{name}{mark} | {' | '.join(shown)} | {mark}{scores[name]:.3f}{mark} |")
    return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Figures], title: str) -> str:
    """Return the completions of each policy as bars, in SVG."""
    names = [field.name for field in fields(Figures) if field.name in COLOURS]
    unit = (WIDTH - LEFT - 60) / max(getattr(row, name) for row in rows.values() for name in names)
    block = ROW * (len(names) + 1)
    height = 60 + block * len(rows)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}">']
    parts.append("<style>text{font:13px sans-serif}</style>")
    parts.append(f'<text x="8" y="20">{title}</text>')
    for index, (name, meaning) in enumerate(zip(names, ("mean", "p99", "p99 beside the crowd"), strict=True)):
        x = LEFT + index * 130
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 18}" y="43">{meaning}, s</text>')
    for number, (policy, row) in enumerate(rows.items()):
        y = 60 + number * block
        parts.append(f'<text x="8" y="{y + ROW}">{policy}</text>')
        for index, name in enumerate(names):
            value, top = getattr(row, name), y + index * ROW
            parts.append(
                f'<rect x="{LEFT}" y="{top}" width="{value * unit:.1f}" height="{ROW - 2}" fill="{COLOURS[name]}"/>'
            )
            parts.append(f'<text x="{LEFT + 6 + value * unit:.1f}" y="{top + 13}">{value:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _completions(runs: Iterable[EndedRun]) -> tuple[list[float], list[float]]:
    completions, slowdowns = [], []
    for run in runs:
        completions.append(run.completion_s)
        slowdowns.append(run.completion_s / run.critical_path_s)
    return completions, slowdowns


def _by_caller(runs: Iterable[EndedRun]) -> dict[str, float]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for run in runs:
        sums[run.caller][0] += run.completion_s
        sums[run.caller][1] += run.critical_path_s
    return {caller: completion_s / critical_path_s for caller, (completion_s, critical_path_s) in sums.items()}
