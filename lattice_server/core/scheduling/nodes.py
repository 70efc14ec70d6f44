"""Owns the ledger: what each node has, and which slot holds how much of it. Rule: taken once, released once.

A slot reserves resources on a node and holds leases that run one after the other: the first is on the worker's
processor, the others were sent ahead. The reservation is taken with the first lease and released with the last.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from lattice_server.core.model import Capacity, Gpu, Isolation, Resources, Runtime
from lattice_server.core.scheduling.permits import Concurrency

EPSILON = 1e-9


@dataclass(slots=True, eq=False)
class Slot:
    """One reservation. `gpu_indices` are the devices it uses; `lease_ids` run in order, and tell how many attempts each
    has; `progress_at` is when the first of them became first, and `is_slow` tells that it took longer than others were
    ready to wait. `concurrency` is what its calls count for. `is_exclusive` tells that its one lease is the only one of
    its node."""

    slot_id: int
    node_id: str
    resources: Resources
    is_async: bool
    gpu_indices: tuple[int, ...]
    concurrency: Concurrency | None = None
    lease_ids: dict[str, int] = field(default_factory=dict)
    backlog_s: float = 0.0
    progress_at: float = 0.0
    is_slow: bool = False
    is_exclusive: bool = False


class NodeState(Enum):
    """Where a node is."""

    READY = "ready"  # Takes work.
    DETACHED = "detached"  # Its worker's stream broke; its leases go on until the session's time is over.
    DRAINING = "draining"  # Finishes what it has and takes nothing new.


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as it was at one moment; `attempts` counts those assigned to it."""

    node_id: str
    worker_id: str
    session_id: str
    hostname: str
    node_ip: str
    state: NodeState
    capacity: Capacity
    free: Capacity
    labels: Mapping[str, str]
    isolations: frozenset[Isolation]
    runtime: Runtime
    pid: int
    attempts: int
    entrypoints: frozenset[str]


@dataclass(slots=True, eq=False)
class Node:
    """What one worker offers, and what of it is free. GPUs are counted by device.

    `entrypoints` are the functions its worker has, and runs alone; empty for one that runs Python. `drain_at` is when
    what still runs on a node that is drained goes elsewhere; `assignments` counts those sent in the worker's session.
    `is_exclusive` tells that its slot is the only one it may have.
    """

    node_id: str
    worker_id: str
    session_id: str
    hostname: str
    node_ip: str
    capacity: Capacity
    labels: Mapping[str, str]
    isolations: frozenset[Isolation]
    runtime: Runtime
    pid: int
    entrypoints: frozenset[str] = frozenset()
    is_draining: bool = False
    drain_at: float | None = None
    detached_at: float | None = None
    assignments: int = 0
    free_cpu: float = 0.0
    free_memory_bytes: int = 0
    free_slots: int = 0
    free_async_slots: int = 0
    free_gpu: dict[int, float] = field(default_factory=dict)
    free_gpu_memory_bytes: dict[int, int] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    is_exclusive: bool = False

    def __post_init__(self) -> None:
        self.free_cpu = self.capacity.cpu
        self.free_memory_bytes = self.capacity.memory_bytes
        self.free_slots = self.capacity.slots
        self.free_async_slots = self.capacity.async_slots
        self.free_gpu = {gpu.index: 1.0 for gpu in self.capacity.gpus}
        self.free_gpu_memory_bytes = {gpu.index: gpu.memory_bytes for gpu in self.capacity.gpus}

    @property
    def takes_work(self) -> bool:
        """Whether new leases may be placed here."""
        return not self.is_draining and self.detached_at is None

    def admits(self, *, is_exclusive: bool) -> bool:
        """Whether one more slot may be on this node, or, if it is to be exclusive, the only one."""
        return not self.slots if is_exclusive else not self.is_exclusive

    def devices_for(
        self, wanted: Resources, *, besides: Resources | None = None, on: tuple[int, ...] = ()
    ) -> tuple[int, ...] | None:
        """Return the devices for `wanted`, fullest first so that whole ones stay whole; None if there are none.

        A whole device is one nobody else uses, not even for its memory alone. With `besides`, as if that were running
        `on` these devices already.
        """
        if wanted.gpu <= 0 and wanted.gpu_memory_bytes <= 0:
            return ()
        count = 1 if wanted.gpu < 1 else int(wanted.gpu)
        free, memory = self.free_gpu, self.free_gpu_memory_bytes
        if besides is not None:
            taken = share_of_device(besides)
            free = {index: left - taken * (index in on) for index, left in free.items()}
            memory = {index: left - besides.gpu_memory_bytes * (index in on) for index, left in memory.items()}
        fitting = [i for i in self.sharing(wanted, free, memory) if memory[i] >= wanted.gpu_memory_bytes]
        fitting.sort(key=lambda i: (free[i], memory[i], i))
        return tuple(fitting[:count]) if len(fitting) >= count else None

    def sharing(self, wanted: Resources, free: Mapping[int, float], memory: Mapping[int, int]) -> list[int]:
        """Return the devices of which `wanted` can have its share, memory aside."""
        if wanted.gpu >= 1:
            return [gpu.index for gpu in self.capacity.gpus if _is_whole(gpu, free, memory)]
        least = max(wanted.gpu, 2 * EPSILON)
        return [index for index, left in free.items() if left + EPSILON >= least]

    def fits(self, wanted: Resources, is_async: bool) -> bool:
        """Whether `wanted` is free here, devices aside."""
        has_slot = self.free_async_slots > 0 if is_async else self.free_slots > 0
        return has_slot and self.free_cpu + EPSILON >= wanted.cpu and self.free_memory_bytes >= wanted.memory_bytes

    def take(self, slot: Slot) -> None:
        """Reserve what `slot` holds."""
        self._move(slot, -1)
        self.slots[slot.slot_id] = slot
        self.is_exclusive = slot.is_exclusive

    def release(self, slot: Slot) -> None:
        """Free what `slot` held."""
        del self.slots[slot.slot_id]
        self._move(slot, 1)
        if not self.slots:
            self.is_exclusive = False
            # Fractions added and taken away many times no longer add up to exactly what there was.
            self.free_cpu = self.capacity.cpu
            self.free_gpu = dict.fromkeys(self.free_gpu, 1.0)

    def _move(self, slot: Slot, sign: int) -> None:
        wanted = slot.resources
        self.free_cpu += sign * wanted.cpu
        self.free_memory_bytes += sign * wanted.memory_bytes
        if slot.is_async:
            self.free_async_slots += sign
        else:
            self.free_slots += sign
        share = share_of_device(wanted)
        for index in slot.gpu_indices:
            self.free_gpu[index] += sign * share
            self.free_gpu_memory_bytes[index] += sign * wanted.gpu_memory_bytes

    def view(self) -> NodeView:
        """Return the node as it is now. The memory shown for each free GPU is what is left of it."""
        state = NodeState.READY
        if self.detached_at is not None:
            state = NodeState.DETACHED
        elif self.is_draining:
            state = NodeState.DRAINING
        memory = self.free_gpu_memory_bytes
        gpus = tuple(replace(gpu, memory_bytes=memory[gpu.index]) for gpu in self.capacity.gpus)
        return NodeView(
            self.node_id,
            self.worker_id,
            self.session_id,
            self.hostname,
            self.node_ip,
            state,
            self.capacity,
            Capacity(self.free_cpu, self.free_memory_bytes, gpus, self.free_slots, self.free_async_slots),
            self.labels,
            self.isolations,
            self.runtime,
            self.pid,
            sum(sum(slot.lease_ids.values()) for slot in self.slots.values()),
            self.entrypoints,
        )

    def check(self) -> None:
        """Assert that free and reserved add up to the capacity."""
        slots = list(self.slots.values())
        assert abs(self.free_cpu + sum(s.resources.cpu for s in slots) - self.capacity.cpu) < 1e-6
        assert self.free_cpu > -1e-6
        assert self.free_memory_bytes >= 0
        reserved = sum(s.resources.memory_bytes for s in slots)
        assert self.free_memory_bytes + reserved == self.capacity.memory_bytes
        assert self.free_slots + sum(not s.is_async for s in slots) == self.capacity.slots
        assert self.free_async_slots + sum(s.is_async for s in slots) == self.capacity.async_slots
        assert all(-1e-6 < free < 1 + 1e-6 for free in self.free_gpu.values())
        for gpu in self.capacity.gpus:
            on = [slot.resources for slot in slots if gpu.index in slot.gpu_indices]
            assert abs(self.free_gpu[gpu.index] + sum(map(share_of_device, on)) - 1.0) < 1e-6
            assert self.free_gpu_memory_bytes[gpu.index] + sum(r.gpu_memory_bytes for r in on) == gpu.memory_bytes
            assert self.free_gpu_memory_bytes[gpu.index] >= 0
            assert len(on) <= 1 or all(wanted.gpu < 1 for wanted in on), "a whole device is shared"
        assert all(slot.lease_ids for slot in slots), "a slot without a lease holds resources"
        assert self.is_exclusive == any(slot.is_exclusive for slot in slots)
        leases = sum(len(slot.lease_ids) for slot in slots)
        assert not self.is_exclusive or leases == 1, "an exclusive lease is not alone on its node"


def _is_whole(gpu: Gpu, free: Mapping[int, float], memory: Mapping[int, int]) -> bool:
    return free[gpu.index] + EPSILON >= 1 and memory[gpu.index] == gpu.memory_bytes


def share_of_device(wanted: Resources) -> float:
    """Return the share of each device used: all of it for whole GPUs, none when only memory is asked for."""
    return wanted.gpu if wanted.gpu < 1 else 1.0


def held_leases(nodes: Mapping[str, Node]) -> Iterator[str]:
    """Yield every lease some slot holds."""
    for node in nodes.values():
        for slot in node.slots.values():
            yield from slot.lease_ids
