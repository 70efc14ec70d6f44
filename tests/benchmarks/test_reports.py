"""The figures on the pages match the reports of the benchmarks."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report import Measurements, read, text_of, write

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


def measured() -> Measurements:
    sides = {"lattice": [0.002], "ray tasks": [0.001], "ray actors": [0.001]}
    return Measurements(
        ["a machine"],
        {"W1": sides},
        langgraph={"plain": [3.0, 2.0, 1.9], "lattice": [1.0, 1.1, 0.9]},
        readers={
            "readers": [1000],
            "tasks": [21],
            "opened_s": [0.5],
            "told_s": [0.2, 0.1, 0.3],
            "with_s": [1.1],
            "without_s": [1.0],
        },
        idle={"server, local": 0.0042, "agent, ray": 0.1},
    )


def test_page_shows_medians_ratios_and_aims_of_all_that_was_measured() -> None:
    page = text_of(measured(), "page")
    for row in (
        "| W7 | 2 | 1 | **2.00** | ≥ 1.8 |",
        "| slower by | **10 %** | ≤ 20 % |",
        "| from an event to the last reader | **200 ms** | < 250 ms |",
        "| server, local | 0.42 | < 0.5 |",
        "| agent, ray | 10.00 | < 0.5 |",
    ):
        assert row in page.splitlines()
    assert "1,000 readers follow an agent of 21 tasks" in page


def test_page_leaves_out_the_sections_of_workloads_without_samples() -> None:
    headings = [line for line in text_of(Measurements([], {}), "page").splitlines() if line.startswith("#")]
    assert headings == ["# Performance", "## What the figures do not say"]


def test_measurements_of_a_page_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "page.md", measured())
    assert read(tmp_path / "page.md") == measured()
