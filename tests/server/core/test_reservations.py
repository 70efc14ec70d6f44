"""Reservations: a big task among small ones starts in the end, and blocks no more than it must."""

from dataclasses import replace
from typing import Any

import pytest

from lattice_server.core.messages import DrainRequested, WorkerLost
from lattice_server.core.model import Resources
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.placement import shape_of
from lattice_server.core.scheduling.reservations import RESERVE_AFTER_S, RESERVE_ANYWAY_S
from tests.server.core.graphs import task
from tests.server.core.scenes import Scene, node, ready

BIG = Resources(4.0)


def crowd(scene: Scene) -> None:
    """Fill four CPUs with small tasks, queue a big one, and place others until a node is reserved for it."""
    scene.tell(*[ready(f"s{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG))
    scene.tell(ready("pass"))
    scene.succeed("s0", at=0.5)
    scene.tell(at=RESERVE_AFTER_S + 0.5)


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
    assert scene.now < RESERVE_AFTER_S + 1.0
    assert passed >= 5, "until then others pass"


@pytest.mark.parametrize(("priority", "after_s"), [(0, RESERVE_AFTER_S), (1, RESERVE_ANYWAY_S)])
def test_a_big_task_starts_though_others_that_go_first_keep_coming(priority: int, after_s: float) -> None:
    scene = Scene(node())
    running = scene.tell(*[ready(f"t{n}") for n in range(4)])
    scene.tell(replace(ready("big", resources=BIG), rank=100.0))
    for number in range(4, 1000):
        scene.tell(replace(ready(f"t{number}", priority=priority), rank=float(-number)))
        running += scene.succeed(running.pop(0), at=scene.now + 0.1)
        if "big" in running:
            break
    assert "big" in running
    assert after_s < scene.now < after_s + 1.0


def test_task_runs_on_a_reserved_node_when_it_takes_none_of_the_reserved_resources() -> None:
    scene = Scene(node())
    crowd(scene)
    assert scene.succeed("s1") == []
    assert scene.tell(ready("small"), ready("waits only", resources=Resources(0.0))) == ["waits only"]


def test_a_reservation_leaves_other_nodes_open() -> None:
    scene = Scene(node())
    crowd(scene)
    assert scene.tell(node("m", cpu=1)) == []
    assert scene.tell(ready("small")) == ["small"]


def test_a_reservation_is_not_used_by_another_group_of_the_same_needs() -> None:
    scene = Scene(node())
    crowd(scene)
    for name in ("s1", "s2", "s3"):
        scene.succeed(name, at=scene.now + 1)
    scene.tell(ready("same", resources=BIG, tenant="had less"))
    assert scene.succeed("pass", at=scene.now + 1) == ["big"]


def test_a_reservation_ends_when_its_task_is_cancelled() -> None:
    scene = Scene(node())
    crowd(scene)
    scene.succeed("s1")
    scene.tell(ready("small"))
    scene.cancel("big")
    assert "small" in scene.leases


@pytest.mark.parametrize("gone", [DrainRequested("n"), WorkerLost("worker-of-n", "killed")])
def test_another_node_is_reserved_when_the_first_is_drained_or_lost(gone: Any) -> None:
    scene = Scene(node("n", labels={"on": "n"}), node("m", labels={"on": "m"}))
    scene.tell(*[ready(f"{on}{number}", node_selector=(("on", on),)) for on in "nm" for number in range(4)])
    scene.tell(ready("big", resources=BIG))
    scene.tell(ready("pass"))
    scene.succeed("n0", at=0.5)
    scene.tell(at=RESERVE_AFTER_S + 0.5)
    assert reserved(scene) == ["n"]
    scene.tell(gone)
    assert reserved(scene) == ["m"]


def start_on(scene: Scene, task_id: str, resources: Resources, at: str, **more: Any) -> None:
    """Start a task on the node of these labels."""
    assert scene.tell(ready(task_id, resources=resources, node_selector=(("at", at),), **more)) == [task_id]
    scene.start(task_id)


def pass_big(scene: Scene, until_s: float) -> float | None:
    """Queue a big task for either node, and have short tasks fill the second node; return when the big one starts."""
    running = scene.tell(*[ready(f"t{n}", function="short", node_selector=(("at", "b"),)) for n in range(4)])
    scene.tell(ready("big", resources=BIG))
    for number in range(4, 4000):
        scene.tell(ready(f"t{number}", function="short", node_selector=(("at", "b"),)))
        running += scene.succeed(running.pop(0), at=scene.now + 0.05, took=0.2)
        if "big" in running:
            return scene.now
        if scene.now > until_s or not running:
            break
    return None


def test_node_is_not_reserved_when_a_service_on_it_leaves_too_little() -> None:
    scene = Scene(node("a", labels={"at": "a"}), node("b", labels={"at": "b"}))
    start_on(scene, "service", Resources(1.0), "a", is_service=True)
    started_at = pass_big(scene, until_s=10.0)
    assert started_at is not None
    assert started_at < RESERVE_AFTER_S + 1.0


@pytest.mark.parametrize("is_known", [True, False])
def test_node_of_short_tasks_is_reserved_when_another_one_has_a_long_one(is_known: bool) -> None:
    scene = Scene(node("a", labels={"at": "a"}), node("b", labels={"at": "b"}))
    if is_known:
        start_on(scene, "before", Resources(1.0), "a", function="long")
        scene.succeed("before", at=40.0, took=40.0)
    start_on(scene, "long", Resources(1.0), "a", function="long")
    # One of unknown duration is expected to take as long as it has run.
    scene.tell(at=scene.now + (0.0 if is_known else 20.0))
    began = scene.now
    started_at = pass_big(scene, until_s=began + 10.0)
    assert started_at is not None
    assert started_at - began < RESERVE_AFTER_S + 1.0


def test_no_node_is_reserved_while_services_leave_too_little_on_each_node() -> None:
    scene = Scene(node("b", labels={"at": "b"}))
    start_on(scene, "service", Resources(1.0), "b", is_service=True)
    scene.tell(*[ready(f"s{n}", node_selector=(("at", "b"),)) for n in range(3)])
    scene.tell(ready("big", resources=BIG), ready("t0"), ready("t1"), ready("t2"))
    scene.succeed("s0", at=RESERVE_AFTER_S / 2)
    # A reservation would keep the CPU idle for a task that cannot start.
    assert scene.succeed("s1", at=RESERVE_AFTER_S + 0.5) == ["t1"]
    scene.cancel("service")
    scene.succeed("service", at=RESERVE_AFTER_S * 3)
    assert reserved(scene) == ["b"]
    assert "big" in scene.succeed("s2", "t0", "t1", at=RESERVE_AFTER_S * 4)


def reserved(scene: Scene) -> list[str]:
    """Return the nodes that are reserved, as the explanation of a queued task names them."""
    scene.tell(ready("asks", resources=Resources(3.0)))
    return [reason.node_id for reason in scene.why("asks") if "gathers" in reason.message]


def test_no_node_is_reserved_for_a_task_whose_key_has_no_free_permit() -> None:
    scene = Scene(node())
    one = {"concurrency_key": "k", "max_parallel": 1}
    scene.tell(ready("light", resources=Resources(0.0), **one), *[ready(f"s{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG, **one))
    scene.tell(ready("pass"))
    scene.succeed("s0", at=0.5)
    scene.tell(at=RESERVE_AFTER_S + 0.5)
    scene.succeed("s1")
    assert scene.tell(ready("small")) == ["small"]


def test_a_reservation_holds_a_permit_until_its_task_is_placed() -> None:
    scene = Scene(node())
    one = {"concurrency_key": "k", "max_parallel": 1}
    scene.tell(*[ready(f"s{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG, **one))
    scene.tell(ready("pass"))
    scene.succeed("s0", at=0.5)
    scene.tell(at=RESERVE_AFTER_S + 0.5)
    assert scene.tell(ready("light", resources=Resources(0.0), priority=1, **one)) == []
    assert scene.succeed("s1", "s2", "s3", "pass") == ["big"]
    assert scene.succeed("big") == ["light"]


def test_a_permit_is_free_again_when_the_task_with_a_reservation_is_cancelled() -> None:
    scene = Scene(node())
    one = {"concurrency_key": "k", "max_parallel": 1}
    scene.tell(*[ready(f"s{n}") for n in range(4)])
    scene.tell(ready("big", resources=BIG, **one))
    scene.tell(ready("pass"))
    scene.succeed("s0", at=0.5)
    scene.tell(at=RESERVE_AFTER_S + 0.5)
    scene.tell(ready("light", resources=Resources(0.0), **one))
    assert scene.cancel("big") == ["light"]


def test_a_node_that_comes_back_larger_can_run_more() -> None:
    registry = NodeRegistry(session_ttl_s=1.0)
    shape = shape_of(task("t", resources=BIG))
    small = registry.join(node("n", cpu=2), "s1")
    assert (registry.could_run(shape, small), registry.share(shape)) == (False, 2.0)
    registry.remove(small, may_return=True)
    large = registry.join(node("n", cpu=8), "s2")
    assert (registry.could_run(shape, large), registry.share(shape)) == (True, 0.5)
