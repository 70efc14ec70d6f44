"""Leases that are sent to a worker before they can start."""

import pytest

from lattice_server.core.messages import (
    CloseSession,
    DrainRequested,
    NodesChanged,
    RevokeLease,
    TaskReturned,
    WorkerDetached,
    WorkerLost,
)
from lattice_server.core.model import BatchPolicy, Resources
from tests.server.core.graphs import hello
from tests.server.core.scenes import Scene, node, ready, successes


def warmed(cpu: float = 1.0) -> Scene:
    """Return a scene whose scheduler knows that the function is quick."""
    scene = Scene(node(cpu=cpu))
    scene.tell(ready("warm"))
    scene.succeed("warm", at=0.001, took=0.001)
    return scene


@pytest.mark.parametrize("duration", [float("nan"), float("inf"), 1e300, -1.0])
def test_nonsense_about_a_duration_is_forgotten_soon(duration: float) -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("warm"))
    scene.succeed("warm", at=0.001, took=duration)
    assert scene.tell(ready("a"), ready("b")) == ["a", "b"]


def revoked(scene: Scene) -> list[str]:
    names = {lease.lease_id: name for name, lease in scene.leases.items()}
    return [names[effect.lease_id] for effect in scene.effects if isinstance(effect, RevokeLease)]


def test_follower_is_not_sent_along_with_a_batch() -> None:
    scene = warmed()
    scene.tell(*[ready(name, batch=BatchPolicy(2)) for name in "ab"], ready("c", after="a"))
    assert "c" not in scene.leases
    assert scene.tell(ready("d", after="b")) == []


def test_follower_is_not_sent_along_to_a_node_that_accepts_no_leases() -> None:
    scene = warmed()
    scene.tell(ready("a"))
    scene.tell(DrainRequested("n"))
    assert scene.tell(ready("b", after="a")) == []


def test_follower_is_not_sent_along_with_a_revoked_lease() -> None:
    scene = warmed()
    scene.tell(ready("long"), ready("a"))
    scene.tick_when_due()
    assert revoked(scene) == ["a"]
    assert scene.tell(ready("b", after="a")) == []


def test_follower_is_returned_when_its_task_is_being_stopped() -> None:
    scene = warmed()
    scene.tell(ready("a"))
    scene.cancel("a")
    scene.tell(ready("b", after="a"))
    assert scene.effects == [TaskReturned("r", "b")]


def test_follower_is_not_revoked_because_it_cannot_start_sooner_elsewhere() -> None:
    scene = warmed()
    scene.tell(ready("long"), ready("a"))
    scene.tell(ready("b", after="a"))
    scene.tick_when_due()
    assert revoked(scene) == ["a"]


def test_nothing_is_sent_ahead_to_a_node_that_an_earlier_task_waits_for() -> None:
    scene = warmed(cpu=2)
    scene.tell(ready("a"), ready("b"))
    assert scene.tell(ready("big", resources=Resources(2.0)), ready("c")) == []
    assert scene.tell(ready("elsewhere", resources=Resources(9.0))) == []


def test_sending_ahead_is_not_blocked_by_a_task_that_the_node_cannot_run() -> None:
    scene = warmed(cpu=2)
    scene.tell(ready("a"), ready("b"))
    assert scene.tell(ready("huge", resources=Resources(9.0)), ready("c")) == ["c"]


def test_nothing_is_sent_ahead_to_a_node_that_is_kept_however_urgent() -> None:
    scene = warmed(cpu=2)
    scene.tell(ready("a"), ready("b", function="sha256:long"))
    scene.tell(ready("big", resources=Resources(2.0)))
    scene.tell(ready("pass", resources=Resources(0.0)))
    scene.tell(ready("urgent", priority=9), *successes(scene.leases["a"], 0.001), at=1.2)
    assert "urgent" in scene.leases
    assert scene.tell(ready("next", priority=9), at=1.205) == []
    assert any("gathers" in reason.message for reason in scene.why("next"))


def test_a_slot_is_as_good_as_new_when_its_long_attempt_is_over() -> None:
    scene = warmed()
    scene.tell(ready("long"), ready("a"))
    scene.tick_when_due()
    # It had started before it could be taken back.
    scene.succeed("long", at=1.0, took=0.001)
    assert scene.tell(ready("b")) == ["b"]


def test_revocation_is_sent_again_when_a_worker_resumes() -> None:
    scene = warmed()
    scene.tell(ready("long"), ready("a"))
    session_id = scene.leases["a"].session_id
    scene.tell(WorkerDetached(session_id))
    scene.tick_when_due()
    scene.tell(hello("n", 1.0, session_id, [scene.leases[name].lease_id for name in ("long", "a")]))
    assert revoked(scene) == ["a"]


def test_assignment_is_sent_again_with_known_inputs_when_a_worker_resumes() -> None:
    scene = warmed()
    scene.tell(ready("a"), ready("b", after="a"))
    a, b = scene.leases["a"], scene.leases["b"]
    assert b.after_lease_id == a.lease_id
    scene.succeed("a")
    scene.tell(WorkerDetached(a.session_id))
    assert scene.tell(hello("n", 1.0, a.session_id)) == ["b"]
    assert (scene.leases["b"].lease_id, scene.leases["b"].after_lease_id) == (b.lease_id, "")


def test_a_node_that_is_lost_while_it_is_drained_has_not_left_by_itself() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.tell(DrainRequested("n"))
    scene.tell(WorkerLost("worker-of-n", "killed"))
    assert not any(isinstance(effect, CloseSession) for effect in scene.effects)
    assert sum(isinstance(effect, NodesChanged) for effect in scene.effects) == 1


def sent(scene: Scene, run: str = "large", at: float | None = None) -> int:
    """Queue 200 tasks of a run; return how many leases are sent."""
    return len(scene.tell(*[ready(f"{run}-{number}", run=run) for number in range(200)], at=at))


def quick(cpu: float, took: float) -> Scene:
    """Return a scene whose scheduler knows how long the function takes."""
    scene = Scene(node(cpu=cpu))
    scene.tell(ready("warm"))
    scene.succeed("warm", took=took, at=0.1)
    return scene


LIMITS = pytest.mark.parametrize(
    ("took", "alone", "shared"),
    [
        pytest.param(0.0001, 64, 8, id="limited by their number"),
        pytest.param(0.0009, 11, 2, id="limited by their time"),
    ],
)


@LIMITS
def test_a_run_that_is_alone_is_sent_far_ahead(took: float, alone: int, shared: int) -> None:
    scene = quick(1, took)
    assert sent(scene, at=0.101) == alone, "the run before it had ended"


@LIMITS
def test_little_is_sent_ahead_while_another_run_has_work(took: float, alone: int, shared: int) -> None:
    scene = quick(2, took)
    scene.tell(ready("other", run="other", function="sha256:other"), at=0.2)
    assert sent(scene, at=5.0) == shared


@pytest.mark.parametrize(("at", "expected"), [(1.99, 2 * 8), (2.01, 2 * 64)])
def test_runs_share_the_cluster_for_a_second_after_both_had_work(at: float, expected: int) -> None:
    scene = quick(2, 0.0001)
    scene.tell(ready("other", run="other", function="sha256:other"))
    scene.tell(ready("first", run="large"), at=1.0)
    scene.succeed("other", took=0.5)
    scene.succeed("first", took=0.0001)
    assert sent(scene, "b", at=at) == expected
