"""Fair share between tenants, and how long a small tenant waits for a large one."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_server.core.messages import AttemptSucceeded, TaskReady, TaskSucceeded
from lattice_server.core.model import Resources, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.ordering import MAX_AGE_S
from lattice_server.core.run.run import Run
from lattice_server.core.scheduling.work import PRIORITY_S
from tests.server.core.cluster import Cluster
from tests.server.core.graphs import VALUE, hello, task, workflow
from tests.server.core.scenes import Scene, node, ready
from tests.server.core.workers import Outcome


def big_and_small(seconds: float, arrives_at: float, *, known: bool = False, small_s: float | None = None) -> float:
    """Return how long a chain of three took that met 10,000 tasks of another caller on two CPUs."""

    def behave(assign: Any, attempt: Any, inputs: Any) -> Outcome:
        return Outcome(seconds if attempt.run_id == "big" else small_s or seconds, {"out": VALUE})

    cluster = Cluster(behave, is_checked=False)
    cluster.join(hello("n", cpu=2))
    chain = WorkflowSpec((task("a"), task("b", ["a"]), task("c", ["b"])))
    if known:
        cluster.start("before", chain, tenant="small")
        cluster.go_on(lambda: cluster.runs["before"].is_terminal)
    start = cluster.now
    cluster.start("big", WorkflowSpec(tuple(task(f"t{i}") for i in range(10_000))), tenant="big")
    cluster.go_on(most_s=start + arrives_at)
    cluster.now = start + arrives_at
    run = cluster.start("small", chain, tenant="small")
    cluster.go_on(lambda: run.is_terminal)
    return cluster.now - start - arrives_at


@pytest.mark.parametrize("arrives_at", [0.0, 0.3, 7.5])
@pytest.mark.parametrize("known", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_ten_thousand_long_tasks_delay_a_small_agent_by_one_of_them(arrives_at: float, known: bool) -> None:
    assert big_and_small(1.0, arrives_at, known=known) <= 3.0 + 1.0 + 1e-6


@pytest.mark.parametrize("arrives_at", [0.0, 0.0105, 0.5])
@pytest.mark.parametrize("known", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_small_agent_waits_only_for_leases_sent_ahead_when_many_tasks_are_queued(
    arrives_at: float, known: bool
) -> None:
    assert big_and_small(0.001, arrives_at, known=known) <= 0.003 + 0.010 + 0.002


def test_a_small_agent_with_short_tasks_waits_for_one_long_one() -> None:
    assert big_and_small(1.0, 7.5, small_s=0.001) <= 1.0 + 0.003 + 1e-6


def test_callers_take_turns() -> None:
    scene = Scene(node(cpu=1))
    order = scene.tell(*[ready(f"{who}{n}", tenant=who) for who in "xy" for n in range(3)])
    while scene.machine.leases:
        order += scene.succeed(order[-1], at=scene.now + 1)
    assert order == ["x0", "y0", "x1", "y1", "x2", "y2"]


def test_tenant_is_served_less_often_when_its_tasks_take_a_larger_share() -> None:
    scene = Scene(node(cpu=4))
    order = scene.tell(*[ready(f"x{n}", tenant="x", resources=Resources(4.0)) for n in range(4)])
    scene.tell(*[ready(f"y{n}", tenant="y", resources=Resources(4.0)) for n in range(4)])
    while scene.machine.leases:
        took = 3.0 if order[-1].startswith("x") else 1.0
        order += scene.succeed(order[-1], at=scene.now + took, took=took)
    assert order == ["x0", "y0", "y1", "y2", "x1", "y3", "x2", "x3"]


def test_tenant_is_not_charged_for_time_when_no_other_tenant_queued() -> None:
    scene = Scene(node(cpu=1))
    for n in range(100):
        scene.tell(ready(f"x{n}", tenant="x"))
        scene.succeed(f"x{n}", at=scene.now + 10, took=10)
    order = scene.tell(ready("x", tenant="x"))
    scene.tell(*[ready(f"y{n}", tenant="y") for n in range(50)])
    scene.tell(*[ready(f"x-more{n}", tenant="x") for n in range(3)])
    while "x-more2" not in order:
        order += scene.succeed(order[-1], at=scene.now + 10, took=10)
    assert len(order) <= 9, order


def test_tenant_is_not_charged_for_earlier_use_when_the_queue_was_empty() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("x0", tenant="x"))
    scene.tell(*[ready(f"y{n}", tenant="y") for n in range(50)], at=99.0)
    scene.tell(ready("x1", tenant="x"))
    order = scene.succeed("x0", at=100.0, took=100.0)
    for _ in range(4):
        order += scene.succeed(order[-1], at=scene.now + 1)
    assert "x1" in order


def test_tenant_does_not_save_up_time_when_it_does_not_queue() -> None:
    scene = Scene(node(cpu=1))
    order = scene.tell(ready("y", tenant="y"))
    scene.tell(*[ready(f"x{n}", tenant="x") for n in range(50)])
    for _ in range(20):
        order += scene.succeed(order[-1], at=scene.now + 1)
    scene.tell(*[ready(f"y{n}", tenant="y") for n in range(20)])
    order = order[-1:]
    for _ in range(8):
        order += scene.succeed(order[-1], at=scene.now + 1)
    assert sum(name.startswith("x") for name in order[1:]) >= 3, order


def test_excess_charge_is_returned_when_the_lease_ends_early() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("long", tenant="x", function="sha256:f"))
    scene.succeed("long", at=100.0, took=100.0)
    # A task of the same function is thought to take as long, and does not.
    order = scene.tell(ready("x0", tenant="x", function="sha256:f"))
    scene.tell(*[ready(f"y{n}", tenant="y") for n in range(9)], *[ready(f"x{n}", tenant="x") for n in range(1, 9)])
    for _ in range(6):
        order += scene.succeed(order[-1], at=scene.now + 1)
    assert sum(name.startswith("x") for name in order) >= 3, order


def test_tenant_is_sent_fewer_leases_ahead_when_its_tasks_are_longer() -> None:
    scene = Scene(node(cpu=1))
    for function, took in (("sha256:slow", 0.0004), ("sha256:sync", 0.0001)):
        scene.tell(ready(function, function=function))
        scene.succeed(function, at=scene.now + took, took=took)
    scene.tell(ready("first", tenant="z"))
    slow = [ready(f"x{n}", tenant="x", function="sha256:slow") for n in range(9)]
    order = scene.tell(*slow, *[ready(f"y{n}", tenant="y") for n in range(9)])
    assert sum(name.startswith("x") for name in order[:10]) in {2, 3}, order


def test_within_a_caller_priority_goes_before_age() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("first"))
    scene.tell(ready("old"), ready("urgent", priority=5), ready("other", tenant="x", priority=9))
    order = scene.succeed("first", at=1.0)
    while scene.machine.leases:
        order += scene.succeed(order[-1], at=scene.now + 1)
    assert [name for name in order if name != "other"] == ["urgent", "old"]
    assert order.index("other") <= 1


@pytest.mark.parametrize("duration", [float("nan"), float("inf"), -5.0, 1e300])
def test_a_worker_that_tells_nonsense_of_a_duration_upsets_no_clock(duration: float) -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("x0", tenant="x"))
    scene.tell(*[ready(f"{who}{n}", tenant=who) for n in range(1, 4) for who in "xy"])
    lease = scene.leases["x0"]
    order = scene.tell(AttemptSucceeded(lease.session_id, lease.lease_id, 0, {"out": VALUE}, duration), at=1.0)
    assert any(isinstance(effect, TaskSucceeded) for effect in scene.effects)
    for _ in range(3):
        order += scene.succeed(order[-1], at=scene.now + 1)
    assert {name[0] for name in order} == {"x", "y"}


@given(gap=st.integers(1, 4), step_s=st.sampled_from([50.0, 70.0, 130.0]), many=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_task_is_passed_by_higher_priorities_for_ten_minutes_a_level(gap: int, step_s: float, many: int) -> None:
    scene = Scene(node(cpu=1))
    (running,) = scene.tell(ready("first"))
    scene.tell(ready("low"))
    came_at: dict[str, float] = {}
    passed = 0
    while True:
        now = scene.now + step_s
        coming = [f"t{len(came_at) + n}" for n in range(many)]
        came_at |= dict.fromkeys(coming, now)
        scene.tell(*[replace(ready(name, priority=gap), rank=now) for name in coming], at=now)
        (running,) = scene.succeed(running)
        if running == "low":
            break
        assert came_at[running] < gap * PRIORITY_S + 1
        passed += 1
    assert passed >= sum(at < gap * PRIORITY_S for at in came_at.values())


def test_tasks_of_an_old_run_age_from_when_they_become_ready() -> None:
    run = Run("r", workflow({"a": ()}), dag.build(workflow({"a": ()})), is_open=True)
    run.start({}, 0.0)
    (added,) = [effect for effect in run.append([task("late")], 86_400.0) if isinstance(effect, TaskReady)]
    young = Run("s", workflow({"a": ()}), dag.build(workflow({"a": ()})))
    (new,) = [effect for effect in young.start({}, 86_400.0) if isinstance(effect, TaskReady)]
    assert added.rank - new.rank == pytest.approx(-MAX_AGE_S, abs=10.0), "it goes first by no more than a level"
