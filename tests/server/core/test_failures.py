"""Attempts that fail: retries, backoff and time limits."""

import pytest

from lattice_server.core.messages import (
    Assign,
    AttemptFailed,
    AttemptSpawned,
    AttemptStarted,
    AttemptSucceeded,
    LeaseReturned,
    StopLease,
    TaskFailed,
    TaskRetrying,
    TasksSpawned,
    TaskStarted,
    WelcomeWorker,
    WorkerLost,
)
from lattice_server.core.model import Failure, FailureKind, RetryPolicy
from tests.server.core.graphs import VALUE, hello, task
from tests.server.core.scenes import BROKEN, Scene, node, ready, successes

LOST = Failure(FailureKind.WORKER_LOST, "gone")


def delays(scene: Scene) -> list[float]:
    return [effect.delay_s for effect in scene.effects if isinstance(effect, TaskRetrying)]


def test_waits_grow_vary_by_half_and_have_an_end() -> None:
    scene = Scene(node())
    retry = RetryPolicy(max_attempts=6, initial_backoff_s=1.0, backoff_multiplier=3.0, max_backoff_s=8.0)
    scene.tell(*[ready(name, retry=retry) for name in "abc"])
    found: dict[str, list[float]] = {name: [] for name in "abc"}
    for _ in range(5):
        for name in "abc":
            scene.fail(name)
            found[name] += delays(scene)
        scene.tell(at=scene.now + 100)
    for row in found.values():
        assert all(base / 2 <= delay <= base for delay, base in zip(row, [1, 3, 8, 8, 8], strict=True)), row
    assert len({row[0] for row in found.values()}) == 3, "what failed together does not come back together"


@pytest.mark.parametrize("kind", list(FailureKind))
@pytest.mark.parametrize("retry_on", [RetryPolicy().retry_on, frozenset({FailureKind.PAYLOAD})])
def test_retry_depends_on_the_kind_of_failure(kind: FailureKind, retry_on: frozenset[FailureKind]) -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=RetryPolicy(max_attempts=2, retry_on=retry_on)))
    scene.fail("a", Failure(kind, "broken"))
    assert bool(delays(scene)) is (kind in retry_on or kind is FailureKind.WORKER_LOST)


@pytest.mark.parametrize(
    ("failure", "is_retried"),
    [
        (Failure(FailureKind.USER_ERROR, "", type="TimeoutError"), True),
        (Failure(FailureKind.USER_ERROR, "", type="Mine", base_types=("OSError", "TimeoutError")), True),
        (Failure(FailureKind.USER_ERROR, "", type="ValueError", base_types=("Exception",)), False),
    ],
)
def test_types_decide_too_base_types_included(failure: Failure, is_retried: bool) -> None:
    scene = Scene(node())
    retry = RetryPolicy(max_attempts=2, retry_on_types=frozenset({"TimeoutError"}))
    scene.tell(ready("a", retry=retry))
    scene.fail("a", failure)
    assert bool(delays(scene)) is is_retried


def test_lost_workers_and_failures_are_counted_apart() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=RetryPolicy(max_attempts=2, initial_backoff_s=0.01, max_worker_losses=2)))
    scene.fail("a", LOST)
    scene.fail("a", BROKEN, at=1.0)
    assert scene.ends() == {}
    scene.tell(at=2.0)
    scene.fail("a", LOST)
    assert scene.ends() == {"a": "failed"}


def test_failure_says_why_retries_did_not_help_when_a_task_lost_its_workers() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=RetryPolicy(max_attempts=21)))
    for _ in range(3):
        assert scene.ends() == {}
        scene.fail("a", LOST)
    (failed,) = [effect for effect in scene.effects if isinstance(effect, TaskFailed)]
    assert failed.failure.kind is FailureKind.WORKER_LOST
    assert "alone on 3 workers that were lost, and fails whatever its retries" in failed.failure.message


def test_no_loss_may_be_allowed() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=RetryPolicy(max_worker_losses=1)))
    scene.start("a")
    scene.tell(WorkerLost("worker-of-n", "killed"))
    assert scene.ends() == {"a": "failed"}


def test_the_total_time_includes_waiting_in_line() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("long"), ready("a", total_timeout_s=2.0))
    assert scene.machine.next_deadline() == 2.0
    scene.tick_when_due()
    (failed,) = [effect for effect in scene.effects if isinstance(effect, TaskFailed)]
    assert (failed.failure.kind, failed.attempt) == (FailureKind.TIMEOUT, 0)


def test_the_total_time_includes_waiting_to_be_tried_again() -> None:
    scene = Scene(node(cpu=1))
    retry = RetryPolicy(max_attempts=9, initial_backoff_s=30.0)
    scene.tell(ready("a", total_timeout_s=2.0, retry=retry))
    scene.fail("a", at=1.0)
    scene.tick_when_due()
    assert (scene.now, scene.ends()) == (2.0, {"a": "failed"})


def test_running_task_fails_when_its_total_time_limit_passes_before_its_success() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("a", total_timeout_s=2.0))
    scene.tick_when_due()
    assert [type(effect) for effect in scene.effects] == [StopLease]
    scene.succeed("a", at=2.1)
    assert scene.ends() == {"a": "failed"}


def test_total_time_limit_does_not_count_the_wait_for_inputs() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("a"), ready("b", after="a", total_timeout_s=2.0))
    scene.succeed("a", at=5.0)
    assert scene.machine.next_deadline() == 7.0


def test_a_task_that_ended_in_time_wakes_nobody() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("a", total_timeout_s=2.0))
    scene.succeed("a", at=1.0)
    assert scene.machine.next_deadline() is None


def test_cancelled_task_succeeds_when_its_success_was_already_reported() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.cancel("a")
    scene.succeed("a")
    assert scene.ends() == {"a": "succeeded"}


def test_running_task_fails_when_the_tasks_it_spawns_are_refused() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    lease = scene.leases["a"]
    named = (lease.session_id, lease.lease_id, 0)
    scene.tell(AttemptSpawned(*named, (task("x"),)), AttemptSpawned(*named, (), BROKEN), *successes(lease))
    assert [type(effect) for effect in scene.effects] == [TaskStarted, TasksSpawned, StopLease, TaskFailed]


def test_success_is_a_failure_when_an_output_is_missing() -> None:
    scene = Scene(node())
    scene.tell(ready("a"), ready("b", split=("out",)), ready("c", after="a"))
    a, b = scene.leases["a"], scene.leases["b"]
    scene.tell(
        AttemptSucceeded(a.session_id, a.lease_id, 0, {}, 1.0),
        AttemptSucceeded(b.session_id, b.lease_id, 0, {"out": VALUE}, 1.0),
    )
    assert scene.ends() == {"a": "failed", "b": "failed"}
    assert not scene.machine.tasks, "who follows has nothing to wait for"


@pytest.mark.parametrize("item", [-1, 1, 99])
def test_reports_are_ignored_when_there_is_no_such_lease(item: int) -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    lease = scene.leases["a"]
    named = (lease.session_id, lease.lease_id, item)
    reports = [AttemptStarted(*named), AttemptSucceeded(*named, {"out": VALUE}, 1.0), AttemptFailed(*named, BROKEN)]
    for report in reports:
        scene.tell(report)
        assert scene.effects == []


def test_a_report_from_another_session_is_ignored() -> None:
    scene = Scene(node(), node("m"))
    scene.tell(ready("a"))
    other = next(n.session_id for n in scene.machine.nodes.values() if n.session_id != scene.leases["a"].session_id)
    scene.tell(AttemptSucceeded(other, scene.leases["a"].lease_id, 0, {"out": VALUE}, 1.0))
    assert scene.effects == []


def test_success_is_refused_when_the_task_had_no_input() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("warm"))
    scene.succeed("warm", at=0.001, took=0.001)
    scene.tell(ready("a"), ready("b", after="a"))
    b = scene.leases["b"]
    scene.tell(*successes(b))
    assert scene.effects == []
    scene.fail("a")
    scene.tell(*successes(b))
    assert scene.ends() == {}
    assert not scene.machine.tasks


def test_returned_lease_counts_as_a_lost_worker_when_it_had_started() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.start("a")
    lease = scene.leases["a"]
    assert scene.tell(LeaseReturned(lease.session_id, lease.lease_id, "")) == ["a"]
    assert [type(effect) for effect in scene.effects] == [TaskRetrying, Assign]
    assert scene.leases["a"].attempts[0].attempt == 2


def test_tasks_are_retried_when_a_resuming_worker_has_forgotten_them() -> None:
    scene = Scene(node())
    scene.tell(ready("a"), ready("b"))
    scene.start("a")
    session_id = scene.leases["a"].session_id
    scene.tell(hello("n", 4, session_id, [scene.leases["b"].lease_id]))
    assert [type(effect) for effect in scene.effects] == [WelcomeWorker, TaskRetrying]
    assert scene.succeed("b") == ["a"]


def test_a_task_handed_over_twice_is_there_once() -> None:
    scene = Scene(node())
    assert scene.tell(ready("a"), ready("a")) == ["a"]
