"""Owns the ledger: what each node has, and which slot holds how much of it. Rule: taken once, released once.

A slot reserves resources on a node and holds leases that run one after the other: the first is on the worker's
processor, the others were sent ahead. The reservation is taken with the first lease and released with the last.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lattice_server.core.model import Capacity, Isolation, Resources

EPSILON = 1e-9


@dataclass(slots=True)
class Slot:
    """One reservation. `gpu_indices` are the devices it uses; `lease_ids` run in order; `progress_at` is when the
    first of them became first, and `is_slow` tells that it took longer than others were ready to wait."""

    slot_id: int
    node_id: str
    resources: Resources
    is_async: bool
    gpu_indices: tuple[int, ...]
    lease_ids: dict[str, None] = field(default_factory=dict)
    backlog_s: float = 0.0
    progress_at: float = 0.0
    is_slow: bool = False


@dataclass(slots=True)
class Node:
    """What one worker offers, and what of it is free. GPUs are counted by device."""

    node_id: str
    worker_id: str
    session_id: str
    hostname: str
    node_ip: str
    capacity: Capacity
    labels: Mapping[str, str]
    isolations: frozenset[Isolation]
    runtime: str
    pid: int
    is_draining: bool = False
    detached_at: float | None = None
    free_cpu: float = 0.0
    free_memory_bytes: int = 0
    free_slots: int = 0
    free_async_slots: int = 0
    free_gpu: dict[int, float] = field(default_factory=dict)
    free_gpu_memory_bytes: dict[int, int] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)

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

    def devices_for(self, wanted: Resources) -> tuple[int, ...] | None:
        """Return the devices for `wanted`, fullest first so that whole ones stay whole; None if there are none."""
        if wanted.gpu <= 0 and wanted.gpu_memory_bytes <= 0:
            return ()
        share = wanted.gpu if wanted.gpu < 1 else 1.0
        count = 1 if wanted.gpu < 1 else int(wanted.gpu)
        fitting = [
            index
            for index, free in self.free_gpu.items()
            if free + EPSILON >= share and self.free_gpu_memory_bytes[index] >= wanted.gpu_memory_bytes
        ]
        fitting.sort(key=lambda index: (self.free_gpu[index], index))
        return tuple(fitting[:count]) if len(fitting) >= count else None

    def fits(self, wanted: Resources, is_async: bool) -> bool:
        """Whether `wanted` is free here, devices aside."""
        has_slot = self.free_async_slots > 0 if is_async else self.free_slots > 0
        return has_slot and self.free_cpu + EPSILON >= wanted.cpu and self.free_memory_bytes >= wanted.memory_bytes

    def take(self, slot: Slot) -> None:
        """Reserve what `slot` holds."""
        self._move(slot, -1)
        self.slots[slot.slot_id] = slot

    def release(self, slot: Slot) -> None:
        """Free what `slot` held."""
        del self.slots[slot.slot_id]
        self._move(slot, 1)

    def _move(self, slot: Slot, sign: int) -> None:
        wanted = slot.resources
        self.free_cpu += sign * wanted.cpu
        self.free_memory_bytes += sign * wanted.memory_bytes
        if slot.is_async:
            self.free_async_slots += sign
        else:
            self.free_slots += sign
        share = wanted.gpu if wanted.gpu < 1 else 1.0
        for index in slot.gpu_indices:
            self.free_gpu[index] += sign * share
            self.free_gpu_memory_bytes[index] += sign * wanted.gpu_memory_bytes

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
        assert all(slot.lease_ids for slot in slots), "a slot without a lease holds resources"


def could_ever_fit(capacity: Capacity, wanted: Resources) -> bool:
    """Whether an idle node with `capacity` could hold `wanted`."""
    fresh = Node("", "", "", "", "", capacity, {}, frozenset(), "", 0)
    return fresh.fits(wanted, is_async=False) and fresh.devices_for(wanted) is not None


def held_leases(nodes: Mapping[str, Node]) -> Iterator[str]:
    """Yield every lease some slot holds."""
    for node in nodes.values():
        for slot in node.slots.values():
            yield from slot.lease_ids
