"""What meets in a batch, when it leaves, and what becomes of its members."""

from lattice_server.core.messages import NodesDescribed, NodesRequested, StopLease, TaskRetrying, WorkerLost
from lattice_server.core.model import (
    Artifact,
    BatchPolicy,
    BatchScope,
    BindingList,
    BindingMap,
    Failure,
    FailureKind,
    Payload,
    Resources,
    RetryPolicy,
)
from lattice_server.core.scheduling.work import MAX_BATCH_BYTES
from tests.server.core.scenes import BROKEN, CRASHED, Scene, node, ready, successes

FOUR = BatchPolicy(4, max_wait_s=1.0)
NOW = BatchPolicy(4)


def many(names: str, **settings: object) -> list[object]:
    return [ready(name, **{"batch": FOUR, **settings}) for name in names]  # type: ignore[arg-type]


def test_a_full_batch_leaves_at_once() -> None:
    scene = Scene(node())
    assert scene.tell(*many("abc")) == []
    assert scene.tell(*many("d")) == ["a+b+c+d"]


def test_each_member_of_a_batch_counts_as_an_attempt_of_its_node() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd"), NodesRequested(1))
    (described,) = [effect for effect in scene.effects if isinstance(effect, NodesDescribed)]
    assert ([view.attempts for view in described.nodes], described.waiting, described.running) == ([0], 4, 0)
    scene.tell(NodesRequested(2))
    (described,) = [effect for effect in scene.effects if isinstance(effect, NodesDescribed)]
    assert ([view.attempts for view in described.nodes], described.waiting, described.running) == ([4], 0, 4)


def test_size_is_a_hard_maximum() -> None:
    scene = Scene(node())
    assert scene.tell(*many("abcdefghij")) == ["a+b+c+d", "e+f+g+h"]
    assert scene.tick_when_due() == ["i+j"]


def test_batch_leaves_out_a_task_when_the_message_would_be_too_large() -> None:
    half = Payload("application/octet-stream", b"x" * (MAX_BATCH_BYTES // 2))
    whole = BindingMap({"first": half, "rest": BindingList((half, half))})
    apart = Payload("application/octet-stream", Artifact("a", MAX_BATCH_BYTES, "n"))
    scene = Scene(node())
    assert scene.tell(*many("abc", given=half), *many("d", given=whole)) == ["a+b"]
    assert scene.tick_when_due() == ["c", "d"]
    assert scene.tell(*many("efgh", given=apart)) == ["e+f+g+h"]


def test_a_batch_leaves_when_its_first_task_waited_long_enough() -> None:
    scene = Scene(node())
    scene.tell(*many("a"))
    scene.tell(*many("b"), at=0.9)
    assert scene.tick_when_due() == ["a+b"]
    assert scene.now == 1.0


def test_batch_takes_the_queued_tasks_when_it_need_not_wait() -> None:
    scene = Scene(node(cpu=1))
    assert scene.tell(*many("ab", batch=NOW)) == ["a+b"]
    scene.tell(*many("cd", batch=NOW))
    assert scene.tell(*many("efg", batch=NOW)) == []
    assert scene.succeed("a") == ["c+d+e+f"]


def test_a_batch_that_is_due_and_has_no_room_wakes_nobody() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("long"), *many("a"))
    scene.tick_when_due()
    assert scene.machine.next_deadline() is None
    assert scene.succeed("long", at=9.0) == ["a"]


def test_tasks_are_not_batched_together_when_their_group_keys_differ() -> None:
    scene = Scene(node(cpu=8))
    scene.tell(
        *many("a", batch=NOW),
        *many("b", batch=NOW, tenant="x"),
        *many("c", batch=NOW, function="sha256:other"),
        *many("d", batch=NOW, resources=Resources(0.5)),
        *many("e", batch=BatchPolicy(3)),
        *many("f", batch=NOW, attempt_timeout_s=5.0),
        *many("g", batch=NOW, split=("out",)),
        *many("h", batch=NOW, display_name="another name", run="s"),
    )
    assert sorted("+".join(a.task_id for a in lease.attempts) for lease in scene.leases.values()) == [
        *["a+h"] * 2,
        *"bcdefg",
    ]


def test_runs_can_be_kept_apart() -> None:
    apart = BatchPolicy(4, scope=BatchScope.RUN)
    scene = Scene(node())
    assert scene.tell(*many("ab", batch=apart), *many("c", batch=apart, run="s")) == ["a+b", "c"]


def test_batch_takes_tasks_of_higher_priority_first() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("long"))
    scene.tell(*many("abcd"), *many("e", priority=1))
    assert scene.succeed("long") == ["e+a+b+c"]


def test_each_member_has_its_own_outcome() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd"))
    lease = scene.leases["a"]
    scene.fail("b")
    assert scene.ends() == {"b": "failed"}
    scene.tell(*successes(lease))
    assert scene.ends() == {"a": "succeeded", "c": "succeeded", "d": "succeeded"}
    assert not scene.machine.leases


def test_a_member_that_is_cancelled_leaves_the_others_alone() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd"))
    scene.cancel("b")
    assert scene.ends() == {"b": "cancelled"}
    assert not any(isinstance(effect, StopLease) for effect in scene.effects)
    scene.succeed("a")
    assert scene.ends() == {"a": "succeeded", "c": "succeeded", "d": "succeeded"}


def test_a_batch_is_stopped_when_all_of_it_is_cancelled() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd"))
    scene.cancel("a", "b", "c")
    scene.cancel("d")
    assert [type(effect) for effect in scene.effects] == [StopLease]


def test_a_batch_that_crashes_is_halved_until_the_one_at_fault_is_alone() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd"))
    assert scene.fail("a", CRASHED) == ["a+b", "c+d"]
    assert scene.succeed("a") == []
    assert scene.fail("c", CRASHED) == ["c", "d"]
    scene.succeed("d")
    assert scene.ends() == {"d": "succeeded"}
    scene.fail("c", CRASHED)
    assert scene.ends() == {"c": "failed"}


def test_halving_does_not_use_up_attempts() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd", retry=RetryPolicy(max_attempts=2, initial_backoff_s=1.0)))
    scene.fail("a", CRASHED)
    assert [e.delay_s for e in scene.effects if isinstance(e, TaskRetrying)] == [0.0] * 4
    scene.fail("a", CRASHED)
    scene.fail("a", CRASHED)
    assert scene.ends() == {}


def test_task_is_retried_alone_when_it_crashed_alone() -> None:
    scene = Scene(node())
    scene.tell(*many("ab", batch=BatchPolicy(2, 5.0), retry=RetryPolicy(max_attempts=2)))
    scene.fail("a", CRASHED)
    scene.fail("a", CRASHED)
    scene.tell(*many("c", batch=BatchPolicy(2, 5.0)))
    assert scene.tick_when_due() == ["a"]


def test_task_is_batched_with_others_when_it_failed_without_a_crash() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd", retry=RetryPolicy(max_attempts=2)))
    scene.fail("b", BROKEN)
    scene.tell(*many("efg"))
    assert scene.tick_when_due() == ["b+e+f+g"]


def test_last_member_of_a_crashed_batch_is_retried_alone_before_it_is_charged() -> None:
    scene = Scene(node())
    scene.tell(*many("ab", batch=BatchPolicy(2)))
    scene.cancel("b")
    assert scene.fail("a", CRASHED) == ["a"], "b may have been the one"
    scene.succeed("a")
    assert scene.ends() == {"a": "succeeded"}


def test_a_batch_whose_worker_is_lost_is_halved_too() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd"))
    scene.start("a")
    scene.tell(WorkerLost("worker-of-n", "killed"))
    assert scene.tell(node("m")) == ["a+b"]
    assert scene.succeed("a") == ["c+d"], "each half runs alone on its node"


def test_waiting_starts_anew_for_a_task_that_comes_back() -> None:
    scene = Scene(node(cpu=1))
    waits = {"batch": BatchPolicy(2, 10.0), "retry": RetryPolicy(max_attempts=2)}
    scene.tell(*many("fg", priority=1, **waits), *many("ab", **waits))
    scene.fail("f", at=3.0)
    scene.tell(at=4.0)
    scene.cancel("a", "b")
    scene.succeed("g")
    assert scene.tick_when_due() == ["f"]
    assert scene.now == 14.0


def test_a_batch_that_had_to_wait_for_room_is_still_no_larger_than_its_size() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("long"))
    scene.tell(*many("abcdefg"))
    assert scene.succeed("long", at=5.0) == ["a+b+c+d"]
    assert scene.succeed("a", at=6.0) == ["e+f+g"]


def test_a_batch_that_ran_out_of_memory_is_halved_too() -> None:
    scene = Scene(node())
    scene.tell(*many("abcd"))
    assert scene.fail("a", Failure(FailureKind.OUT_OF_MEMORY, "no memory left")) == ["a+b", "c+d"]
