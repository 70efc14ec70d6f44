"""However many tasks are queued and nodes are there, a pass tries only a few of them."""

from collections.abc import Callable
from typing import Any

import pytest

from lattice_server.core.messages import WorkerDetached, WorkerHeartbeat
from lattice_server.core.model import BatchPolicy, Resources
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import TaskGroup
from tests.server.core.scenes import Scene, node, ready

TASKS = 500
A_FEW = 4


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name the limit of each line that is tried, from when the list is cleared on."""
    names: list[str] = []
    attempt: Callable[[Placer, TaskGroup, float], bool] = Placer._place

    def note(placer: Placer, group: TaskGroup, now: float) -> bool:
        names.append("" if group.concurrency is None else group.concurrency.key)
        return attempt(placer, group, now)

    monkeypatch.setattr(Placer, "_place", note)
    return names


def keyed(number: int, **settings: Any) -> Any:
    """A task of a session that may have one call at a time."""
    return ready(f"t{number}", concurrency_key=f"session-{number}", max_parallel=1, **settings)


def beat(scene: Scene) -> WorkerHeartbeat:
    """Return a heartbeat of the only worker."""
    (one,) = scene.machine.nodes.values()
    held = frozenset(lease_id for slot in one.slots.values() for lease_id in slot.lease_ids)
    return WorkerHeartbeat(one.session_id, held, one.assignments)


def test_a_pass_tries_nothing_when_nothing_changed(tried: list[str]) -> None:
    scene = Scene(node(cpu=2))
    scene.tell(*[keyed(number) for number in range(TASKS)])
    scene.tell(at=0.1)
    tried.clear()
    scene.start("t0", "t1")
    scene.tell(beat(scene), at=0.2)
    assert tried == []


def test_a_pass_tries_a_few_groups_when_a_task_comes_or_ends(tried: list[str]) -> None:
    scene = Scene(node(cpu=2))
    scene.tell(*[keyed(number) for number in range(TASKS)])
    for now in range(1, 5):
        tried.clear()
        assert scene.tell(keyed(TASKS + now), at=float(now)) == []
        assert len(tried) <= A_FEW
        tried.clear()
        assert scene.succeed(f"t{now - 1}") == [f"t{now + 1}"], "in the order in which they came"
        assert len(tried) <= A_FEW


def test_a_pass_tries_the_groups_of_a_key_when_a_permit_of_it_is_released(tried: list[str]) -> None:
    scene = Scene(node(cpu=60))
    policy = BatchPolicy(2, 0.0)
    scene.tell(*[keyed(number, batch=policy) for number in range(50)])
    scene.tell(*[keyed(number, batch=policy, run="s") for number in range(50)])
    tried.clear()
    assert scene.succeed("t7", at=2.0) == ["t7"]
    assert set(tried) == {"session-7"}


def test_a_pass_tries_other_shapes_when_no_node_has_room_for_the_first(tried: list[str]) -> None:
    scene = Scene(node(cpu=2))
    scene.tell(*[keyed(number, resources=Resources(4.0)) for number in range(TASKS)])
    tried.clear()
    assert scene.tell(keyed(TASKS)) == [f"t{TASKS}"]
    assert len(tried) <= A_FEW


def test_a_pass_looks_at_a_few_nodes_when_all_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    nodes = 300
    for number in range(nodes):
        scene.machine.handle(node(f"n{number}", cpu=2), 0.0)
    scene.tell(*[ready(f"t{number}") for number in range(2 * nodes)])
    looked_at: list[str] = []
    fits = Node.fits

    def note(one: Node, *args: Any) -> bool:
        looked_at.append(one.node_id)
        return fits(one, *args)

    monkeypatch.setattr(Node, "fits", note)
    assert scene.tell(*[ready(f"queued{number}") for number in range(5)]) == []
    assert scene.succeed("t7", at=1.0) == ["queued0"]
    (one, *_) = scene.machine.nodes.values()
    scene.tell(WorkerHeartbeat(one.session_id, frozenset(), 0))
    scene.tell(WorkerDetached(one.session_id), at=2.0)
    assert len(looked_at) <= A_FEW


@pytest.mark.parametrize("wanted", [Resources(2.0), Resources(1.0, gpu=1.0), Resources(0.5, gpu=0.25)])
def test_a_placement_looks_at_nodes_with_room_first(wanted: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    for number in range(100):
        gpus = (16, 16) if number % 2 else ()
        scene.machine.handle(node(f"n{number}", cpu=4, gpus=gpus), 0.0)
    looked_at: list[str] = []
    fits = Node.fits
    monkeypatch.setattr(Node, "fits", lambda one, *args: looked_at.append(one.node_id) or fits(one, *args))
    for number in range(60):
        looked_at.clear()
        assert scene.tell(ready(f"t{number}", resources=wanted)) == [f"t{number}"]
        assert len(looked_at) <= A_FEW
