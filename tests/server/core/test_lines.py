"""However much waits, only what could have changed is tried again."""

from collections.abc import Callable
from typing import Any

import pytest

from lattice_server.core.batching import BatchCollector
from lattice_server.core.launching import Launcher
from lattice_server.core.messages import WorkerHeartbeat
from lattice_server.core.model import BatchPolicy, Resources
from tests.server.core.scenes import Scene, node, ready

LINES = 500
A_FEW = 4


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name the limit of each line that is tried, from when the list is cleared on."""
    names: list[str] = []
    attempt: Callable[[Launcher, BatchCollector, float], bool] = Launcher._try

    def note(launcher: Launcher, line: BatchCollector, now: float) -> bool:
        names.append(line.group.shape.limit_key)
        return attempt(launcher, line, now)

    monkeypatch.setattr(Launcher, "_try", note)
    return names


def keyed(number: int, **settings: Any) -> Any:
    """A task of a session that may have one call at a time."""
    return ready(f"t{number}", concurrency_key=f"session-{number}", max_parallel=1, **settings)


def beat(scene: Scene) -> WorkerHeartbeat:
    """What the only worker says when nothing happens."""
    (one,) = scene.machine.nodes.values()
    held = frozenset(lease_id for slot in one.slots.values() for lease_id in slot.lease_ids)
    return WorkerHeartbeat(one.session_id, held, one.assignments)


def test_nothing_is_tried_when_nothing_happened(tried: list[str]) -> None:
    scene = Scene(node(cpu=2))
    scene.tell(*[keyed(number) for number in range(LINES)])
    scene.tell(at=0.1)
    tried.clear()
    scene.start("t0", "t1")
    scene.tell(beat(scene), at=0.2)
    assert tried == []


def test_one_that_comes_is_tried_alone_and_one_that_ends_has_the_next_one_tried(tried: list[str]) -> None:
    scene = Scene(node(cpu=2))
    scene.tell(*[keyed(number) for number in range(LINES)])
    for now in range(1, 5):
        tried.clear()
        assert scene.tell(keyed(LINES + now), at=float(now)) == []
        assert len(tried) <= A_FEW
        tried.clear()
        assert scene.succeed(f"t{now - 1}") == [f"t{now + 1}"], "in the order in which they came"
        assert len(tried) <= A_FEW


def test_what_its_limit_holds_is_tried_when_a_call_of_it_ends(tried: list[str]) -> None:
    scene = Scene(node(cpu=50))
    policy = BatchPolicy(2, 0.0)
    scene.tell(*[keyed(number, batch=policy) for number in range(50)])
    scene.tell(*[keyed(number, batch=policy, run="s") for number in range(50)])
    tried.clear()
    assert scene.succeed("t7", at=2.0) == ["t7"]
    assert set(tried) == {"session-7"}


def test_a_line_nobody_can_run_is_in_nobodys_way(tried: list[str]) -> None:
    scene = Scene(node(cpu=2))
    scene.tell(*[keyed(number, resources=Resources(4.0)) for number in range(LINES)])
    tried.clear()
    assert scene.tell(keyed(LINES)) == [f"t{LINES}"]
    assert len(tried) <= A_FEW
