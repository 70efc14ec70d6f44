"""The simulation: it ends, repeats itself, stays within the cluster, and shows what fair share and ageing are for."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import simulate
from benchmarks.clusters import SMALL
from benchmarks.figures import Figures, figures_of, jain, percentile, score
from benchmarks.orders import first_come, least_left_aged
from benchmarks.outcomes import Outcome, Policy
from benchmarks.simulation import Simulation
from benchmarks.workloads import CROWD, Workload, generate

pytestmark = pytest.mark.slow

DEFAULT = Policy("default", least_left_aged, True)
TINY = replace(SMALL, tasks=500)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return generate(SMALL, 1)


@pytest.fixture(scope="module")
def default(workload: Workload) -> Outcome:
    return Simulation(workload, DEFAULT).run(is_checked=True)


@pytest.fixture(scope="module")
def one_line(workload: Workload) -> Outcome:
    return Simulation(workload, Policy("one line", first_come, False)).run(is_checked=True)


def test_every_run_ends_and_none_sooner_than_its_critical_path(workload: Workload, default: Outcome) -> None:
    assert len(default.runs) == len(workload.arrivals)
    assert default.tasks == sum(len(arrival.durations) for arrival in workload.arrivals)
    assert all(run.completion_s >= run.critical_path_s for run in default.runs)


def test_the_workload_is_as_large_as_its_setting_says(workload: Workload, default: Outcome) -> None:
    assert len(workload.nodes) == SMALL.nodes
    assert SMALL.tasks <= default.tasks <= 1.1 * SMALL.tasks


def test_no_more_resources_are_used_than_a_node_has(default: Outcome, one_line: Outcome) -> None:
    for outcome in (default, one_line):
        assert 0.2 < outcome.cpu <= 1
        assert 0.2 < outcome.gpu <= 1


def test_a_seed_gives_one_outcome_and_another_seed_another() -> None:
    one, same, other = (generate(TINY, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert Simulation(one, DEFAULT).run() == Simulation(same, DEFAULT).run()


def test_fair_share_bounds_the_delay_by_the_crowd(default: Outcome, one_line: Outcome) -> None:
    fair, unfair = figures_of(default), figures_of(one_line)
    assert fair.others_mean_s < 0.7 * unfair.others_mean_s
    assert fair.others_slowdown_p99 < 10 < unfair.others_slowdown_p99


def test_fair_share_alone_bounds_it_too(workload: Workload, one_line: Outcome) -> None:
    fair = figures_of(Simulation(workload, Policy("fair", first_come, True)).run())
    assert fair.others_mean_s < 0.7 * figures_of(one_line).others_mean_s


def test_fair_share_bounds_the_gain_of_splitting_work_into_many_runs() -> None:
    # No order among runs can tell these from the small ones of another tenant.
    workload = generate(replace(SMALL, tasks=2_500, crowd=0.0, swarm=0.4), 1)
    fair, unfair = (
        figures_of(Simulation(workload, Policy("", least_left_aged, is_fair)).run()) for is_fair in (True, False)
    )
    assert fair.others_mean_s < 0.8 * unfair.others_mean_s


def test_a_large_run_ends_when_small_ones_are_preferred(default: Outcome, one_line: Outcome) -> None:
    took_s, would_take_s = (
        next(run.completion_s for run in outcome.runs if run.kind == CROWD) for outcome in (default, one_line)
    )
    assert took_s < 2 * would_take_s


def test_the_default_order_scores_better_than_first_come(default: Outcome, one_line: Outcome) -> None:
    assert score(figures_of(default), figures_of(one_line)) < 0.8


def test_percentiles_and_fairness() -> None:
    assert [percentile([3, 1, 2, 4], share) for share in (0.5, 0.75, 0.99)] == [2, 3, 4]
    assert jain([2, 2, 2]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    row = Figures(*[2.0] * 17)
    assert score(row, row) == pytest.approx(1)


def test_the_command_writes_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = ["first come", "least left, aged, fair"]
    monkeypatch.setattr(simulate, "SMALL", TINY)
    monkeypatch.setattr(sys, "argv", ["simulate", "--small", "--only", *policies, "--output", str(tmp_path)])
    simulate.main()
    table = (tmp_path / "simulation-small.md").read_text()
    assert "| first come |" in table
    assert "| **least left, aged, fair** |" in table
    assert (tmp_path / "simulation-small.svg").read_text().count("<rect") == 3 + 2 * 3
