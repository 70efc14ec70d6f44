"""Big tasks among small ones: neither passed for ever nor in the way."""

from dataclasses import replace
from typing import Any

import pytest

from lattice_server.core.fleet import Fleet
from lattice_server.core.launching import KEEP_AFTER_S
from lattice_server.core.messages import DrainRequested, WorkerLost
from lattice_server.core.model import Resources
from lattice_server.core.placement import shape_of
from tests.server.core.graphs import task
from tests.server.core.scenes import Scene, node, ready

BIG = Resources(4.0)


def crowd(scene: Scene) -> None:
    """Fill four CPUs with small ones, let a big one wait, and let others pass it until a node is kept for it."""
    scene.tell(*[ready(f"s{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG))
    scene.tell(ready("pass"))
    scene.succeed("s0", at=0.5)
    scene.tell(at=KEEP_AFTER_S + 0.5)


@pytest.mark.parametrize("tenant", ["", "other"])
def test_a_big_task_does_not_starve(tenant: str) -> None:
    scene = Scene(node())
    number, passed = 0, 0
    running = scene.tell(*[ready(f"t{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG, tenant=tenant))
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


@pytest.mark.parametrize(("priority", "starves"), [(0, False), (1, True)])
def test_a_big_task_does_not_starve_behind_those_that_go_first_by_rank_alone(priority: int, starves: bool) -> None:
    scene = Scene(node())
    running = scene.tell(*[ready(f"t{n}") for n in range(4)])
    scene.tell(replace(ready("big", resources=BIG), rank=100.0))
    for number in range(4, 100):
        scene.tell(replace(ready(f"t{number}", priority=priority), rank=float(-number)))
        running += scene.succeed(running.pop(0), at=scene.now + 0.1)
        if "big" in running:
            break
    assert ("big" not in running) is starves
    assert starves or scene.now < KEEP_AFTER_S + 1.0


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


def test_who_comes_earlier_with_the_same_needs_does_not_take_what_was_gathered() -> None:
    scene = Scene(node())
    crowd(scene)
    for name in ("s1", "s2", "s3"):
        scene.succeed(name, at=scene.now + 1)
    scene.tell(ready("same", resources=BIG, tenant="had less"))
    assert scene.succeed("pass", at=scene.now + 1) == ["big"]


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


def test_no_node_is_kept_for_what_a_limit_keeps_from_starting() -> None:
    scene = Scene(node())
    scene.tell(*[ready(f"s{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG, concurrency_key="k", max_parallel=1))
    scene.tell(ready("pass"))
    scene.succeed("s0", at=0.5)
    scene.tell(at=KEEP_AFTER_S + 0.5)
    assert scene.succeed("s1") == []
    scene.tell(ready("light", resources=Resources(0.0), priority=1, concurrency_key="k", max_parallel=1))
    assert scene.tell(ready("small")) == ["small"]


def test_what_a_node_can_run_is_looked_at_anew_when_it_comes_back() -> None:
    fleet = Fleet(session_ttl_s=1.0)
    shape = shape_of(task("t", resources=BIG))
    small = fleet.join(node("n", cpu=2), "s1")
    assert (fleet.could_run(shape, small), fleet.share(shape)) == (False, 2.0)
    large = fleet.join(node("n", cpu=8), "s2")
    assert (fleet.could_run(shape, large), fleet.share(shape)) == (True, 0.5)
