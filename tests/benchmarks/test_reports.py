"""The figures on the pages match the reports of the benchmarks."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report import read, text_of

ROOT = Path(__file__).parent.parent.parent


def report(executor: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"chaos-{executor}.json").read_text())
    for count in ("lost_runs", "wrong_results", "double_completions", "gaps"):
        assert found[count] == 0
    assert (found["executor"], found["runs"], found["errors"]) == (executor, 2000, [])
    return found


def test_the_page_on_clusters_has_the_figures_of_the_chaos_reports() -> None:
    page = " ".join((ROOT / "docs" / "cluster.md").read_text().split())
    local, ray = report("local"), report("ray")
    for claim in (
        f"{sum(local['faults'].values())} faults and {local['retries_after_loss']} repeated attempts",
        f"{local['recover_p50_s']:.1f} s (median) and {local['recover_p99_s']:.1f} s (99th percentile)",
        f"{sum(ray['faults'].values())} faults, {ray['retries_after_loss']} repeated attempts",
        f"nothing lost; {ray['recover_p50_s']:.1f} s and {ray['recover_p99_s']:.1f} s",
        f"{local['ran_more_than_once']} and {ray['ran_more_than_once']} functions ran to their end twice",
    ):
        assert claim in page, f"no longer said, or no longer so: {claim}"


def test_the_page_on_performance_shows_the_recorded_measurements() -> None:
    page = ROOT / "docs" / "performance.md"
    assert page.read_text() == text_of(read(page), page.stem), "`make bench` writes the page"
