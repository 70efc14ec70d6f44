"""Nodes that leave, and workers that were silent before their stream broke."""

from dataclasses import replace

from lattice_server.core.messages import (
    CloseSession,
    DrainRequested,
    DrainWorker,
    RevokeLease,
    TaskRetrying,
    WorkerDetached,
    WorkerHeartbeat,
    WorkerHello,
)
from lattice_server.core.scheduling.scheduler import Scheduler
from tests.server.core.scenes import Scene, node, ready
from tests.server.core.test_sending import revoked, warmed


def test_silence_counts_towards_the_time_a_session_has() -> None:
    machine = Scheduler("e", session_ttl_s=10.0)
    machine.handle(node(), 0.0)
    machine.handle(WorkerDetached(machine.nodes["n"].session_id, silent_s=6.0), 100.0)
    assert machine.next_deadline() == 104.0
    machine.tick(103.9)
    assert machine.nodes
    machine.tick(104.0)
    assert not machine.nodes


def test_draining_node_returns_leases_that_have_not_started() -> None:
    scene = warmed()
    scene.tell(ready("long"), ready("a"))
    scene.tell(DrainRequested("n", 5.0))
    assert revoked(scene) == ["a"]
    session_id = scene.leases["a"].session_id
    assert DrainWorker(session_id, 5.0) in scene.effects


def test_task_is_requeued_uncharged_when_the_drain_deadline_passes() -> None:
    scene = Scene(node("old", cpu=2.0))
    scene.tell(ready("started"), ready("assigned"))
    scene.start("started")
    scene.tell(DrainRequested("old", 5.0), at=10.0)
    scene.tell(DrainRequested("old", 60.0), at=11.0)
    scene.tell(node("new", cpu=2.0), at=14.9)
    assert set(scene.machine.nodes) == {"old", "new"}
    assert scene.tell(at=15.0) == ["started", "assigned"]
    retried = [effect.task_id for effect in scene.effects if isinstance(effect, TaskRetrying)]
    assert retried == ["started"]
    assert [scene.leases[name].attempts[0].attempt for name in ("started", "assigned")] == [2, 2]
    assert any(isinstance(effect, CloseSession) and effect.reason == "DRAINED" for effect in scene.effects)
    assert all(task.losses == 0 for task in scene.machine.tasks.values())


def test_a_lease_that_does_not_arrive_is_sent_again_after_a_while() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    lease = scene.leases["a"]
    silent = WorkerHeartbeat(lease.session_id, frozenset(), 0)
    assert scene.tell(silent, at=1.0) == []
    assert scene.tell(silent, at=31.0) == ["a"]
    assert (scene.leases["a"].lease_id, scene.leases["a"].sequence) == (lease.lease_id, 2)
    assert scene.tell(silent, at=32.0) == []


def test_stop_is_sent_again_with_each_heartbeat_that_lists_the_lease() -> None:
    scene = warmed()
    scene.tell(ready("long"), ready("a"))
    scene.tick_when_due()
    held = frozenset(scene.leases[name].lease_id for name in ("long", "a"))
    scene.tell(WorkerHeartbeat(scene.leases["a"].session_id, held, 99))
    assert [type(effect) for effect in scene.effects] == [RevokeLease]


def detach(scene: Scene, node_id: str, at: float) -> None:
    scene.tell(WorkerDetached(scene.machine.nodes[node_id].session_id), at=at)


def back(scene: Scene, node_id: str) -> WorkerHello:
    """Return the greeting of a worker that comes back to its session."""
    known = scene.machine.nodes[node_id]
    return replace(node(node_id), session_id=known.session_id)


def closed(scene: Scene) -> list[str]:
    return [effect.reason for effect in scene.effects if isinstance(effect, CloseSession)]


def test_a_node_that_is_drained_while_it_is_away_leaves_when_it_is_back() -> None:
    scene = Scene(node())
    detach(scene, "n", at=1.0)
    scene.tell(DrainRequested("n"), at=2.0)
    assert closed(scene) == []
    scene.tell(back(scene, "n"), at=3.0)
    assert closed(scene) == ["DRAINED"]
    assert not scene.machine.nodes


def test_a_node_that_is_drained_and_away_when_its_time_is_up_leaves_when_it_is_back() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.start("a")
    scene.tell(DrainRequested("n", 5.0), at=1.0)
    detach(scene, "n", at=2.0)
    scene.tell(at=6.0)
    assert "n" in scene.machine.nodes
    due = scene.machine.next_deadline()
    assert due is not None
    assert due > 6.0, "it is over, and would be due for ever"
    assert scene.tell(node("m"), at=7.0) == ["a"]
    scene.tell(back(scene, "n"), at=8.0)
    assert closed(scene) == ["DRAINED"]


def test_a_worker_that_resumes_is_told_again_that_it_is_drained() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.start("a")
    scene.tell(DrainRequested("n", 5.0), at=1.0)
    detach(scene, "n", at=2.0)
    scene.tell(back(scene, "n"), at=3.0)
    drains = [effect.deadline_s for effect in scene.effects if isinstance(effect, DrainWorker)]
    assert drains == [3.0]


def test_a_worker_that_was_lost_while_it_was_drained_is_not_taken_back() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.start("a")
    scene.tell(DrainRequested("n"), at=1.0)
    detach(scene, "n", at=2.0)
    scene.tell(at=100.0)
    assert not scene.machine.nodes
    assert scene.tell(node(), at=101.0) == []
    assert closed(scene) == ["DRAINED"]
    assert scene.tell(replace(node(), worker_id="started anew"), at=102.0) == ["a"]
