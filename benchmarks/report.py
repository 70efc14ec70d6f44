"""Writes measurements as a Markdown table and as an SVG plot."""

import statistics
from pathlib import Path
from typing import Any

GOALS = {"W1": 1.0, "W2": 0.25, "W3": 0.25, "W4": 1.0, "W5": 0.7, "W6": 0.3}
MEANING = {
    "W1": "one no-op task, s",
    "W2": "chain of 50, s a hop",
    "W3": "1, 1000, 1, s",
    "W4": "3-task chains/s, 16 clients",
    "W5": "agent graph, s over 400 ms",
    "W6": "100 MB down 5 tasks, s",
    "W8": "1000 async tasks of 1 s, s",
}


def write(folder: Path, samples: dict[str, dict[str, list[float]]], memory: dict[str, float], facts: Any) -> None:
    """Write `table.md` and `ratios.svg` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"Machine: {facts['machine']}; rounds: {facts['rounds']}; medians.", ""]
    lines += [
        "| | what | Lattice | Ray tasks | Ray actors | Lattice / Ray tasks | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = {}
    for name, sides in samples.items():
        middle = {side: statistics.median(values) for side, values in sides.items()}
        shown = [f"{middle[side]:.5g}" if side in middle else "" for side in ("lattice", "ray tasks", "ray actors")]
        ratio = middle["lattice"] / middle["ray tasks"] if "ray tasks" in middle else None
        shown_ratio = ""
        if ratio is not None:
            ratios[name] = ratio
            shown_ratio = f"{ratio:.2f}"
        goal = f"{'≥' if name == 'W4' else '≤'} {GOALS[name]}" if name in GOALS else ""
        lines.append(f"| {name} | {MEANING.get(name, 's a task')} | {' | '.join(shown)} | {shown_ratio} | {goal} |")
    lines += ["", *(f"Server memory a task at {count} tasks: {size:.0f} bytes." for count, size in memory.items())]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    (folder / "ratios.svg").write_text(_plot(ratios))


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
