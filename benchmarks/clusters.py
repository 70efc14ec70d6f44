"""Owns how large simulations are, and the nodes they run on. Rule: nodes are unlike each other."""

from dataclasses import dataclass

from benchmarks.shapes import GIB
from lattice_server.core.messages import WorkerHello
from lattice_server.core.model import Capacity, Gpu, Isolation
from lattice_server.core.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Setting:
    """How large a simulation is. `tasks` is met to within one run; `load` is the work that arrives while runs arrive,
    as a share of the cluster's capacity in that time, counted for the scarcest resource. `crowd` and `swarm` are the
    shares of all tasks that one caller brings in one run, and in runs of one task each."""

    nodes: int
    tasks: int
    callers: int
    chunks: tuple[int, int]
    load: float = 0.9
    round_s: float = 0.001
    crowd: float = 0.25
    swarm: float = 0.05


SMALL = Setting(nodes=10, tasks=5_000, callers=12, chunks=(20, 150))
LARGE = Setting(nodes=100, tasks=100_000, callers=60, chunks=(200, 2_000))


def cluster(setting: Setting) -> tuple[WorkerHello, ...]:
    """Return the nodes of a setting."""
    return tuple(_node(index) for index in range(setting.nodes))


def _node(index: int) -> WorkerHello:
    """Return a node: of ten, five are small, three are larger, two have two GPUs each."""
    place = index % 10
    gpus = (0, 2, 2)[max(0, place - 7)]
    cpu = 8.0 if place < 5 else 16.0
    return WorkerHello(
        worker_id=f"worker-{index}",
        node_id=f"node-{index}",
        session_id="",
        held_lease_ids=(),
        hostname=f"host-{index}",
        node_ip="127.0.0.1",
        capacity=Capacity(cpu, int(cpu) * 4 * GIB, tuple(Gpu(device, memory_bytes=24 * GIB) for device in range(gpus))),
        labels={},
        isolations=frozenset({Isolation.NONE}),
        runtime=Runtime("python"),
        pid=index,
    )
