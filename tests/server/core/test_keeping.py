"""Big tasks among small ones: neither passed for ever nor in the way."""

from typing import Any

import pytest

from lattice_server.core.launching import KEEP_AFTER_S
from lattice_server.core.messages import DrainRequested, WorkerLost
from lattice_server.core.model import Resources
from tests.server.core.scenes import Scene, node, ready

BIG = Resources(4.0)


def crowd(scene: Scene) -> None:
    """Fill four CPUs with small ones, let a big one wait, and let others pass it until a node is kept for it."""
    scene.tell(*[ready(f"s{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG))
    scene.tell(ready("pass"))
    scene.succeed("s0", at=0.5)
    scene.tell(at=KEEP_AFTER_S + 0.5)


def test_a_big_task_does_not_starve() -> None:
    scene = Scene(node())
    number, passed = 0, 0
    running = scene.tell(*[ready(f"t{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG))
    for number in range(4, 200):
        scene.tell(ready(f"t{number}"))
        started = scene.succeed(running.pop(0), at=scene.now + 0.1)
        running += started
        passed += len(started)
        if "big" in running:
            break
    assert "big" in running
    assert scene.now < KEEP_AFTER_S + 1.0
    assert passed >= 5, "until then others pass"


def test_what_takes_nothing_of_what_is_gathered_goes_on() -> None:
    scene = Scene(node())
    crowd(scene)
    assert scene.succeed("s1") == []
    assert scene.tell(ready("small"), ready("waits only", resources=Resources(0.0))) == ["waits only"]


def test_other_nodes_stay_open() -> None:
    scene = Scene(node())
    crowd(scene)
    assert scene.tell(node("m", cpu=1)) == []
    assert scene.tell(ready("small")) == ["small"]


def test_a_node_is_kept_no_longer_for_a_task_that_was_cancelled() -> None:
    scene = Scene(node())
    crowd(scene)
    scene.succeed("s1")
    scene.tell(ready("small"))
    scene.cancel("big")
    assert "small" in scene.leases


@pytest.mark.parametrize("gone", [DrainRequested("n"), WorkerLost("worker-of-n", "killed")])
def test_another_node_is_kept_when_the_first_is_drained_or_lost(gone: Any) -> None:
    scene = Scene(node("n", labels={"on": "n"}), node("m", labels={"on": "m"}))
    scene.tell(*[ready(f"{on}{number}", node_selector=(("on", on),)) for on in "nm" for number in range(4)])
    scene.tell(ready("big", resources=BIG))
    scene.tell(ready("pass"))
    scene.succeed("n0", at=0.5)
    scene.tell(at=KEEP_AFTER_S + 0.5)
    assert kept(scene) == ["n"]
    scene.tell(gone)
    assert kept(scene) == ["m"]


def kept(scene: Scene) -> list[str]:
    """Return the nodes that are kept, as those who wait are told."""
    scene.tell(ready("asks", resources=Resources(3.0)))
    return [reason.node_id for reason in scene.why("asks") if "gathers" in reason.message]


def test_a_limit_is_no_reason_to_keep_a_node() -> None:
    scene = Scene(node("n", cpu=4))
    scene.tell(ready("one", concurrency_key="k", max_parallel=1, resources=Resources(1.0)))
    scene.tell(ready("two", concurrency_key="k", max_parallel=1, resources=Resources(4.0)))
    running = scene.tell(*[ready(f"s{n}") for n in range(6)])
    for _ in range(3):
        running += scene.succeed(running[-1], at=scene.now + 1)
    assert len(running) == 6, "the others use what is free"
