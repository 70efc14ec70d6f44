"""GPUs by index: shares, whole devices, their memory."""

import pytest

from lattice_server.core.messages import ReasonKind
from lattice_server.core.model import Resources
from lattice_server.core.scheduling.placement import shape_of
from lattice_server.core.scheduling.shortages import impossibility
from tests.server.core.graphs import task
from tests.server.core.scenes import GIB, Scene, node, ready


def gpu(name: str, share: float = 0.0, memory_gib: float = 0.0, cpu: float = 0.5) -> object:
    return ready(name, resources=Resources(cpu, gpu=share, gpu_memory_bytes=int(memory_gib * GIB)))


def test_fractions_share_a_device() -> None:
    scene = Scene(node(gpus=[8, 8]))
    scene.tell(gpu("a", 0.5), gpu("b", 0.5), gpu("c", 0.4))
    assert [scene.devices(name) for name in "abc"] == [(0,), (0,), (1,)]


def test_fractions_that_do_not_add_up_exactly_still_fill_a_device() -> None:
    scene = Scene(node(gpus=[8]))
    assert scene.tell(*[gpu(f"t{n}", 0.1, cpu=0.1) for n in range(11)]) == [f"t{n}" for n in range(10)]


def test_whole_devices_stay_whole() -> None:
    scene = Scene(node(gpus=[8, 8, 8]))
    assert scene.tell(gpu("a", 0.3), gpu("b", 0.3), gpu("two", 2.0)) == ["a", "b", "two"]
    assert scene.devices("two") == (1, 2)


def test_memory_is_counted_on_each_device() -> None:
    scene = Scene(node(gpus=[8, 8]))
    assert scene.tell(gpu("a", 0.2, 6), gpu("b", 0.2, 6), gpu("c", 0.2, 6)) == ["a", "b"]
    assert scene.devices("a") != scene.devices("b")


def test_task_that_needs_gpu_memory_only_shares_a_device_with_enough_memory() -> None:
    scene = Scene(node(gpus=[4, 16]))
    assert scene.tell(gpu("a", memory_gib=8), gpu("b", memory_gib=8), gpu("c", memory_gib=4)) == ["a", "b", "c"]
    assert [scene.devices(name) for name in "abc"] == [(1,), (1,), (0,)]


def test_whole_device_has_no_memory_for_other_tasks() -> None:
    scene = Scene(node(gpus=[8]))
    scene.tell(gpu("whole", 1.0))
    assert scene.tell(gpu("b", memory_gib=1)) == []
    assert scene.succeed("whole") == ["b"]
    assert scene.tell(gpu("whole again", 1.0)) == []


def test_memory_only_and_fractions_get_on() -> None:
    scene = Scene(node(gpus=[8]))
    assert scene.tell(gpu("a", 0.9, 4), gpu("b", memory_gib=4)) == ["a", "b"]


def test_the_fullest_node_that_fits_is_used() -> None:
    scene = Scene(node("n", gpus=[8, 8]), node("m", gpus=[8, 8]))
    scene.tell(gpu("a", 1.0), gpu("b", 1.0))
    assert scene.leases["a"].session_id == scene.leases["b"].session_id
    assert scene.tell(gpu("two", 2.0)) == ["two"]


def test_task_without_gpu_avoids_gpu_nodes() -> None:
    scene = Scene(node("g", cpu=64, gpus=[8]), node("c", cpu=2))
    scene.tell(ready("a"), ready("b"), ready("c"))
    sessions = {name: node_.session_id for name, node_ in scene.machine.nodes.items()}
    assert [scene.leases[name].session_id for name in "abc"] == [sessions["c"], sessions["c"], sessions["g"]]


def test_a_two_gpu_task_waits_and_then_runs_without_draining_the_node() -> None:
    scene = Scene(node(cpu=8, gpus=[8, 8]))
    scene.tell(gpu("one", 1.0), gpu("other", 1.0))
    scene.tell(gpu("two", 2.0), at=0.5)
    # Others pass it for a while.
    assert scene.succeed("one", at=1.0) == []
    assert scene.tell(gpu("small", 1.0)) == ["small"]
    assert scene.succeed("other", at=2.0) == []
    assert scene.tell(gpu("late", 1.0)) == [], "the device is kept"
    assert scene.tell(ready("cpu only")) == ["cpu only"]
    assert scene.succeed("small", at=3.0) == ["two"]
    assert scene.succeed("two", at=4.0) == ["late"]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Resources(gpu=3.0), "gpu: 3 wanted, 2 in all"),
        (Resources(gpu=2.0, gpu_memory_bytes=8 * GIB), "gpu memory: 8 GiB wanted, 4 GiB in all"),
        (Resources(gpu_memory_bytes=20 * GIB), "gpu memory: 20 GiB wanted, 16 GiB in all"),
        (Resources(cpu=9.0, gpu=0.5), "cpu: 9 wanted, 4 in all"),
        (Resources(memory_bytes=9 * GIB), "memory: 9 GiB wanted, 8 GiB in all"),
        (Resources(memory_bytes=10**7 * 2**20), "memory: 9.537 TiB wanted, 8 GiB in all"),
        (Resources(memory_bytes=8 * GIB + 1), "memory: 8589934593 bytes wanted, 8589934592 bytes in all"),
    ],
)
def test_impossible_task_is_refused_with_the_missing_resource(wanted: Resources, text: str) -> None:
    scene = Scene(node(gpus=[4, 16]))
    why = impossibility(shape_of(task("t", resources=wanted)), [node.spec for node in scene.machine.nodes.values()])
    assert why == f"node 'n': {text}"


def test_task_is_possible_when_its_node_is_busy() -> None:
    scene = Scene(node(gpus=[8]))
    scene.tell(gpu("a", 1.0))
    spec = task("t", resources=Resources(gpu=1.0))
    assert impossibility(shape_of(spec), [node.spec for node in scene.machine.nodes.values()]) == ""


def test_device_needs_free_share_and_free_memory() -> None:
    scene = Scene(node(cpu=8, gpus=[8, 16]))
    scene.tell(gpu("a", 0.5, 6), gpu("b", 1.0))
    scene.tell(gpu("c", 0.5, 4))
    (reason,) = [reason for reason in scene.why("c") if reason.kind is ReasonKind.RESOURCES]
    assert (reason.resource, reason.wanted, reason.free) == ("gpu_memory", 4 * GIB, 2 * GIB)
    assert reason.message == "node 'n': gpu memory: 4 GiB wanted, 2 GiB free"
