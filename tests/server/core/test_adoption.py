"""A server that was started again: which leases of its earlier life continue, and what becomes of the others."""

from dataclasses import replace
from typing import Any

import pytest

from lattice_server.core import messages
from lattice_server.core.messages import (
    AnswerQuestion,
    AttemptHistory,
    CallEnded,
    CloseSession,
    EarlierLease,
    HeldLease,
    TaskAwaits,
    TaskReady,
    TaskRetrying,
    TaskStarted,
    WelcomeWorker,
)
from lattice_server.core.model import BatchPolicy, FailureKind, Resources, RetryPolicy
from tests.server.core.graphs import VALUE
from tests.server.core.scenes import Scene, node, ready

ONE_TRY = RetryPolicy(max_attempts=1, max_worker_losses=1)
TTL_S = 30.0


def running(
    task_id: str, lease_id: str = "", *, item: int = 0, gpus: tuple[int, ...] = (), **settings: Any
) -> TaskReady:
    """Return a task whose second attempt ran on node `n` when the server was killed."""
    known = EarlierLease(lease_id or f"old-{task_id}", item, "n", gpus, started_at=-5.0)
    return replace(ready(task_id, retry=ONE_TRY, **settings), history=AttemptHistory(2), earlier=known, since=-5.0)


def back(*held: HeldLease, session_id: str = "old", **settings: Any) -> messages.WorkerHello:
    """Return the greeting of the worker of node `n` with these leases."""
    lease_ids = tuple(lease.lease_id for lease in held)
    return node("n", held=held, held_lease_ids=lease_ids, session_id=session_id, **settings)


def welcome(scene: Scene) -> WelcomeWorker:
    """Return the welcome of the last step."""
    (found,) = [effect for effect in scene.effects if isinstance(effect, WelcomeWorker)]
    return found


def retried(scene: Scene) -> dict[str, str]:
    """Return the tasks that the last step queued again, and why."""
    found = [effect for effect in scene.effects if isinstance(effect, TaskRetrying)]
    assert all(effect.failure.kind is FailureKind.WORKER_LOST and effect.delay_s == 0 for effect in found)
    return {effect.task_id: effect.failure.message for effect in found}


def report(scene: Scene, lease_id: str, item: int = 0, session_id: str = "") -> dict[str, str]:
    """Let a lease succeed in the session of node `n`; return how tasks ended."""
    session_id = session_id or scene.machine.nodes["n"].session_id
    scene.tell(messages.AttemptSucceeded(session_id, lease_id, item, {"out": VALUE}, 1.0))
    return scene.ends()


def test_a_lease_waits_for_its_worker_only_from_when_all_runs_are_restored() -> None:
    scene = Scene(is_restoring=True)
    scene.tell(running("a"), at=0.0)
    scene.tell(running("b"), at=2 * TTL_S)
    assert scene.machine.next_deadline() is None
    scene.tell(messages.RunsRestored(), at=3 * TTL_S)
    assert scene.machine.next_deadline() == 4 * TTL_S
    scene.tell(running("c"), at=3 * TTL_S + 1.0)
    scene.tell(at=4 * TTL_S)
    assert retried(scene).keys() == {"a", "b"}
    scene.tell(at=4 * TTL_S + 1.0)
    assert retried(scene).keys() == {"c"}


def test_a_held_lease_is_adopted_with_its_resources_and_ends_once() -> None:
    scene = Scene()
    assert scene.tell(running("a", resources=Resources(3.0)), ready("b", resources=Resources(2.0))) == []
    assert scene.tell(back(HeldLease("old-a"), HeldLease("unknown"))) == [], "its CPUs are taken"
    found = welcome(scene)
    assert (found.resumed, found.adopted_lease_ids, found.drop_lease_ids) == (False, ("old-a",), ("unknown",))
    assert found.session_id not in {"", "old"}
    assert not any(isinstance(effect, TaskStarted | TaskRetrying) for effect in scene.effects)
    assert scene.machine.nodes["n"].free_cpu == 1.0
    assert report(scene, "old-a", session_id="old") == {}, "a report of the earlier session counts for nothing"
    assert report(scene, "old-a") == {"a": "succeeded"}
    assert [effect.attempt for effect in scene.effects if isinstance(effect, messages.TaskSucceeded)] == [2]
    assert "b" in scene.leases
    assert report(scene, "old-a") == {}


def test_a_lease_that_its_worker_does_not_have_is_queued_again_without_a_charge() -> None:
    scene = Scene()
    scene.tell(running("a"))
    assert scene.tell(back(HeldLease("other"))) == ["a"]
    assert list(retried(scene)) == ["a"]
    assert scene.leases["a"].attempts[0].attempt == 3
    assert welcome(scene).adopted_lease_ids == ()


def test_a_lease_waits_for_its_worker_as_long_as_a_session_does() -> None:
    scene = Scene(node("other"))
    assert scene.tell(running("a")) == []
    assert scene.why("a")[0].node_id == "n"
    assert scene.tell(at=TTL_S - 0.1) == []
    assert scene.tick_when_due() == ["a"]
    assert scene.now == TTL_S
    assert list(retried(scene)) == ["a"]
    scene.tell(back(HeldLease("old-a")))
    assert (welcome(scene).adopted_lease_ids, welcome(scene).drop_lease_ids) == ((), ("old-a",))
    assert report(scene, "old-a") == {}, "its task has another lease now"


def test_a_lease_is_not_adopted_by_another_node() -> None:
    scene = Scene()
    scene.tell(running("a"))
    scene.tell(replace(back(HeldLease("old-a")), node_id="other", worker_id="w"))
    assert welcome(scene).drop_lease_ids == ("old-a",)
    scene.tell(back(HeldLease("old-a")))
    assert welcome(scene).adopted_lease_ids == ("old-a",)


def test_a_lease_whose_task_was_cancelled_meanwhile_is_dropped() -> None:
    scene = Scene()
    scene.tell(running("a"))
    scene.cancel("a")
    assert scene.ends() == {"a": "cancelled"}
    scene.tell(back(HeldLease("old-a")))
    assert welcome(scene).drop_lease_ids == ("old-a",)


def test_the_time_limit_of_a_task_counts_from_its_first_start() -> None:
    scene = Scene()
    scene.tell(running("a", total_timeout_s=8.0))
    scene.tell(back(HeldLease("old-a")), at=2.0)
    scene.tell(at=2.9)
    assert not any(isinstance(effect, messages.StopLease) for effect in scene.effects)
    scene.tick_when_due()
    assert scene.now == pytest.approx(3.0)
    assert [effect.lease_id for effect in scene.effects if isinstance(effect, messages.StopLease)] == ["old-a"]


def test_ended_leases_and_leases_that_wait_for_calls_take_no_cpus() -> None:
    scene = Scene()
    all_cpus = Resources(4.0)
    scene.tell(*[running(name, resources=all_cpus) for name in ("ended", "parent", "child")])
    parent = HeldLease("old-parent", waits=((1, "child"),))
    scene.tell(back(HeldLease("old-ended", has_ended=True), parent, HeldLease("old-child")))
    assert welcome(scene).adopted_lease_ids == ("old-ended", "old-parent", "old-child")
    (wait,) = [effect for effect in scene.effects if isinstance(effect, TaskAwaits)]
    assert (wait.task_id, wait.lease_id, wait.number, wait.called_id) == ("parent", "old-parent", 1, "child")
    assert report(scene, "old-ended") == {"ended": "succeeded"}
    assert report(scene, "old-child") == {"child": "succeeded"}
    scene.tell(CallEnded("old-parent", 1, "over"))
    (answer,) = [effect for effect in scene.effects if isinstance(effect, AnswerQuestion)]
    assert (answer.lease_id, answer.number) == ("old-parent", 1)
    assert scene.machine.nodes["n"].free_cpu == 0.0
    assert report(scene, "old-parent") == {"parent": "succeeded"}
    assert scene.machine.nodes["n"].free_cpu == 4.0


def test_a_lease_is_not_adopted_when_its_node_has_no_room_for_it_any_more() -> None:
    scene = Scene()
    scene.tell(running("a", resources=Resources(3.0)), running("b", resources=Resources(1.0), gpus=()))
    scene.tell(back(HeldLease("old-a"), HeldLease("old-b"), cpu=2.0))
    assert (welcome(scene).adopted_lease_ids, list(retried(scene))) == (("old-b",), ["a"])


def test_devices_of_an_adopted_lease_are_taken() -> None:
    scene = Scene()
    whole = Resources(1.0, gpu=1.0)
    scene.tell(running("a", gpus=(1,), resources=whole), ready("b", resources=whole))
    assert scene.tell(back(HeldLease("old-a"), gpus=(8, 8))) == ["b"]
    assert scene.devices("b") == (0,)


def test_unclaimed_and_adopted_leases_hold_the_permit_of_their_key() -> None:
    scene = Scene(node("other"), limits={"db": 1})
    key = {"concurrency_key": "db"}
    assert scene.tell(running("a", **key), ready("b", **key)) == []
    assert scene.tell(back(HeldLease("old-a"))) == []
    assert scene.tell(
        messages.AttemptSucceeded(scene.machine.nodes["n"].session_id, "old-a", 0, {"out": VALUE}, 1.0)
    ) == ["b"]


def test_members_of_a_batch_are_adopted_together_unless_an_earlier_one_has_ended() -> None:
    scene = Scene()
    batch = BatchPolicy(3, 0.0)
    members = ("a", "old", 0), ("b", "old", 1), ("d", "part", 1), ("e", "gap", 0), ("f", "gap", 2)
    scene.tell(*[running(name, lease, item=item, batch=batch) for name, lease, item in members])
    scene.tell(back(HeldLease("old"), HeldLease("part"), HeldLease("gap")))
    assert (welcome(scene).adopted_lease_ids, list(retried(scene))) == (("old",), ["d", "e", "f"])
    assert report(scene, "old", 1) == {"b": "succeeded"}
    assert report(scene, "old", 0) == {"a": "succeeded"}


def test_a_worker_that_missed_its_welcome_gets_it_again() -> None:
    scene = Scene()
    scene.tell(running("a"), ready("b"))
    hello = back(HeldLease("old-a"))
    assert scene.tell(hello) == ["b"]
    first = welcome(scene)
    assert scene.tell(messages.WorkerDetached(first.session_id), replace(hello, greeting=2)) == ["b"]
    again = welcome(scene)
    assert (again.session_id, again.resumed, again.adopted_lease_ids) == (first.session_id, False, ("old-a",))
    assert not any(isinstance(effect, CloseSession) for effect in scene.effects)
    assert report(scene, "old-a") == {"a": "succeeded"}


def test_an_adopted_lease_is_lost_when_its_worker_does_not_hold_it_any_more() -> None:
    scene = Scene()
    scene.tell(running("a"), running("b"))
    scene.tell(back(HeldLease("old-a"), HeldLease("old-b")))
    session_id = scene.machine.nodes["n"].session_id
    scene.tell(messages.WorkerHeartbeat(session_id, frozenset({"old-b"}), 0))
    assert list(retried(scene)) == ["a"]
    assert report(scene, "old-b") == {"b": "succeeded"}


def test_a_task_takes_the_permit_of_a_lease_that_has_ended_once_its_worker_says_so() -> None:
    scene = Scene(node("other"))
    assert scene.tell(running("a", max_parallel=1), ready("b", max_parallel=1)) == []
    assert scene.tell(back(HeldLease("old-a", has_ended=True))) == ["b"]


def test_a_lease_is_not_adopted_when_its_node_does_not_suit_its_task_any_more() -> None:
    scene = Scene()
    scene.tell(running("a", node_selector=(("zone", "eu"),)))
    scene.tell(back(HeldLease("old-a"), labels={"zone": "us"}))
    found = welcome(scene)
    assert (found.adopted_lease_ids, found.drop_lease_ids) == ((), ("old-a",))
    assert set(retried(scene)) == {"a"}
