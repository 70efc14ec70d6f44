"""Owns the resources of each node, and which slot holds how much of them. Rule: taken once, released once.

A slot reserves resources on a node and holds leases that run one after the other: the first one runs, the others were
sent ahead. The resources are taken with the first lease and released with the last.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from math import inf

from lattice_server.core.messages import NodeStatus, NodeView
from lattice_server.core.model import Capacity, Gpu, NodeSpec, Resources
from lattice_server.core.scheduling.permits import Concurrency
from lattice_server.core.states import NODE_TRANSITIONS, SESSION_TRANSITIONS, NodeState, SessionState, transition

EPSILON = 1e-9


@dataclass(slots=True, eq=False)
class Slot:
    """A reservation of resources. `gpu_indices` are the devices it uses, `lease_ids` its leases in order.

    `progress_at` is when the first lease became first, and `is_slow` tells that it runs longer than others should wait
    behind it. `backlog_s` is how long all of them are expected to run. Its calls count towards the key of
    `concurrency`. `is_exclusive` tells that its one lease is the only one of its node, services aside. `is_service`
    tells that its lease does not end by itself. A slot that `is_parked` holds devices and memory only, because its
    first lease waits for tasks that it called. A slot that `is_over` holds nothing: its adopted lease has ended, and
    only reports about it are on their way.
    """

    slot_id: int
    node_id: str
    resources: Resources
    is_async: bool
    gpu_indices: tuple[int, ...]
    concurrency: Concurrency | None = None
    lease_ids: dict[str, None] = field(default_factory=dict)
    backlog_s: float = 0.0
    progress_at: float = 0.0
    is_slow: bool = False
    is_exclusive: bool = False
    is_service: bool = False
    is_parked: bool = False
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Node:
    """A node's resources and how much of them is free. GPUs are counted by device.

    `detached_at` is when its session's stream broke, `drain_at` when the leases of a draining node are requeued.
    `assignments` counts the ones sent in the session, `attempts` the ones of the node's leases. `is_exclusive` tells
    that its one slot is the only one it may have, parked slots aside, of which it has `parked`. A node that `owes_cpu`
    to a parked slot takes no new slots. Its worker had the session `replaced_session_id` before.
    """

    spec: NodeSpec
    session_id: str
    node_id: str = field(init=False)
    state: NodeState = NodeState.READY
    session: SessionState = SessionState.CONNECTED
    drain_at: float | None = None
    detached_at: float | None = None
    assignments: int = 0
    attempts: int = 0
    free_cpu: float = field(init=False)
    free_memory_bytes: int = field(init=False)
    free_slots: int = field(init=False)
    free_async_slots: int = field(init=False)
    free_gpu: dict[int, float] = field(init=False)
    free_gpu_memory_bytes: dict[int, int] = field(init=False)
    slots: dict[int, Slot] = field(default_factory=dict)
    is_exclusive: bool = False
    owes_cpu: bool = False
    parked: int = 0
    replaced_session_id: str = ""

    def __post_init__(self) -> None:
        capacity = self.spec.capacity
        self.node_id = self.spec.node_id
        self.free_cpu = capacity.cpu
        self.free_memory_bytes = capacity.memory_bytes
        self.free_slots = capacity.slots
        self.free_async_slots = capacity.async_slots
        self.free_gpu = {gpu.index: 1.0 for gpu in capacity.gpus}
        self.free_gpu_memory_bytes = {gpu.index: gpu.memory_bytes for gpu in capacity.gpus}

    @property
    def takes_work(self) -> bool:
        """Whether new leases may be placed here."""
        return self.state is NodeState.READY and self.session is SessionState.CONNECTED

    def move(self, state: NodeState) -> None:
        """Change the node's state. Raises InvalidTransition."""
        self.state = transition("node", self.node_id, self.state, state, NODE_TRANSITIONS)

    def move_session(self, state: SessionState) -> None:
        """Change the session's state. Raises InvalidTransition."""
        self.session = transition("session", self.session_id, self.session, state, SESSION_TRANSITIONS)

    def admits(self, *, is_exclusive: bool, is_service: bool = False) -> bool:
        """Whether one more slot may be on this node, or, if it is to be exclusive, the only one.

        Services are not counted and not kept out: an exclusive lease would wait for their end, which does not come.
        """
        if self.owes_cpu:
            return False
        if is_exclusive:
            return not self.attempts_beside_services()
        return is_service or not self.is_exclusive

    def attempts_beside_services(self) -> int:
        """Return the number of leases that run here and end by themselves."""
        slots = (s for s in self.slots.values() if not (s.is_parked or s.is_over or s.is_service))
        return sum(len(s.lease_ids) for s in slots)

    def devices_for(
        self, wanted: Resources, *, besides: Resources | None = None, on: tuple[int, ...] = ()
    ) -> tuple[int, ...] | None:
        """Return the devices for `wanted`, fullest first so that whole ones stay whole; None if there are none.

        A whole device is one without any other use, not even of its memory alone. With `besides`, the answer is that
        for when `besides` runs `on` these devices already.
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
        """Return the devices with a large enough free share for `wanted`, memory aside."""
        if wanted.gpu >= 1:
            return [gpu.index for gpu in self.spec.capacity.gpus if _is_whole(gpu, free, memory)]
        least = max(wanted.gpu, 2 * EPSILON)
        return [index for index, left in free.items() if left + EPSILON >= least]

    def fits(self, wanted: Resources, is_async: bool) -> bool:
        """Whether `wanted` is free here, devices aside."""
        has_slot = self.free_async_slots > 0 if is_async else self.free_slots > 0
        return has_slot and self.free_cpu + EPSILON >= wanted.cpu and self.free_memory_bytes >= wanted.memory_bytes

    def has_all_of(self, slot: Slot) -> bool:
        """Whether all that a slot with given devices holds is free here."""
        wanted, memory = slot.resources, self.free_gpu_memory_bytes
        if slot.is_over:
            return True
        fitting = self.sharing(wanted, self.free_gpu, memory) if slot.gpu_indices else []
        if any(i not in fitting or memory[i] < wanted.gpu_memory_bytes for i in slot.gpu_indices):
            return False
        has_memory = self.free_memory_bytes >= wanted.memory_bytes
        return has_memory and (slot.is_parked or self.fits(wanted, slot.is_async))

    def take(self, slot: Slot) -> None:
        """Take the resources of a slot."""
        self._move(slot, -1)
        self.slots[slot.slot_id] = slot
        self.is_exclusive = slot.is_exclusive or self.is_exclusive

    def release(self, slot: Slot) -> None:
        """Free the resources of a slot."""
        del self.slots[slot.slot_id]
        self._move(slot, 1)
        if slot.is_exclusive:
            self.is_exclusive = False
        if not self.slots:
            # Sums of many fractions drift.
            self.free_cpu = self.spec.capacity.cpu
            self.free_gpu = dict.fromkeys(self.free_gpu, 1.0)

    def park(self, slot: Slot) -> None:
        """Free a slot and its CPUs; it need not be alone on the node any more."""
        if slot.is_exclusive:
            slot.is_exclusive = self.is_exclusive = False
        self._run(slot, 1)
        slot.is_parked = True
        self.parked += 1

    def unpark(self, slot: Slot) -> None:
        """Occupy a parked slot and its CPUs again."""
        self._run(slot, -1)
        slot.is_parked = False
        self.parked -= 1

    def has_room_for(self, slot: Slot) -> bool:
        """Whether the CPUs of a parked slot are free."""
        has_slot = self.free_async_slots > 0 if slot.is_async else self.free_slots > 0
        return has_slot and self.free_cpu + EPSILON >= slot.resources.cpu and not self.is_exclusive

    def _run(self, slot: Slot, sign: int) -> None:
        """Free, or occupy, a slot and its CPUs."""
        self.free_cpu += sign * slot.resources.cpu
        if slot.is_async:
            self.free_async_slots += sign
        else:
            self.free_slots += sign

    def _move(self, slot: Slot, sign: int) -> None:
        wanted = slot.resources
        if slot.is_over:
            return
        self.free_memory_bytes += sign * wanted.memory_bytes
        if slot.is_parked:
            self.parked -= sign
        else:
            self._run(slot, sign)
        share = share_of_device(wanted)
        for index in slot.gpu_indices:
            self.free_gpu[index] += sign * share
            self.free_gpu_memory_bytes[index] += sign * wanted.gpu_memory_bytes

    def room_in_s(self, has_room: Callable[["Node"], bool], now: float) -> float:
        """Return in how many seconds a condition may hold, as leases end here; infinite when they do not suffice.

        A lease is expected to end after the time its function usually takes, and one that is overdue to take as long as
        it has run already. Services are not expected to end.
        """
        left = copy(self)
        left.slots, left.free_gpu = dict(self.slots), dict(self.free_gpu)
        left.free_gpu_memory_bytes = dict(self.free_gpu_memory_bytes)
        ends = sorted((_ends_in_s(slot, now), slot.slot_id) for slot in self.slots.values() if not slot.is_service)
        for ends_in_s, slot_id in [(0.0, 0), *ends]:
            if slot_id:
                left.release(self.slots[slot_id])
            if has_room(left):
                return ends_in_s
        return inf

    def view(self) -> NodeView:
        """Return the node as it is now. The memory of each free GPU is how much of it is free."""
        status = NodeStatus.DRAINING if self.state is NodeState.DRAINING else NodeStatus.READY
        if self.session is SessionState.DETACHED:
            status = NodeStatus.DETACHED
        spec, memory = self.spec, self.free_gpu_memory_bytes
        gpus = tuple(replace(gpu, memory_bytes=memory[gpu.index]) for gpu in spec.capacity.gpus)
        return NodeView(
            spec.node_id,
            spec.worker_id,
            spec.hostname,
            spec.node_ip,
            spec.capacity,
            spec.labels,
            spec.isolations,
            spec.runtime,
            spec.pid,
            spec.entrypoints,
            spec.isolation_refusals,
            spec.network_isolations,
            spec.limits_memory_by_cgroup,
            session_id=self.session_id,
            state=status,
            free=Capacity(self.free_cpu, self.free_memory_bytes, gpus, self.free_slots, self.free_async_slots),
            attempts=self.attempts,
            free_gpu=sum(self.free_gpu.values()),
        )

    def check(self) -> None:
        """Assert that free and reserved add up to the capacity."""
        slots = [slot for slot in self.slots.values() if not slot.is_over]
        running = [slot for slot in slots if not slot.is_parked]
        assert self.parked == len(slots) - len(running)
        assert abs(self.free_cpu + sum(s.resources.cpu for s in running) - self.spec.capacity.cpu) < 1e-6
        assert self.free_cpu > -1e-6
        assert self.free_memory_bytes >= 0
        reserved = sum(s.resources.memory_bytes for s in slots)
        assert self.free_memory_bytes + reserved == self.spec.capacity.memory_bytes
        assert self.free_slots + sum(not s.is_async for s in running) == self.spec.capacity.slots
        assert self.free_async_slots + sum(s.is_async for s in running) == self.spec.capacity.async_slots
        assert self.free_slots >= 0
        assert self.free_async_slots >= 0
        assert all(-1e-6 < free < 1 + 1e-6 for free in self.free_gpu.values())
        for gpu in self.spec.capacity.gpus:
            on = [slot.resources for slot in slots if gpu.index in slot.gpu_indices]
            assert abs(self.free_gpu[gpu.index] + sum(map(share_of_device, on)) - 1.0) < 1e-6
            assert self.free_gpu_memory_bytes[gpu.index] + sum(r.gpu_memory_bytes for r in on) == gpu.memory_bytes
            assert self.free_gpu_memory_bytes[gpu.index] >= 0
            assert len(on) <= 1 or all(wanted.gpu < 1 for wanted in on), "a whole device is shared"
        assert all(slot.lease_ids for slot in self.slots.values()), "a slot without a lease holds resources"
        assert (self.session is SessionState.DETACHED) == (self.detached_at is not None)
        assert self.is_exclusive == any(slot.is_exclusive for slot in slots)
        is_alone = self.attempts_beside_services() == 1
        assert not self.is_exclusive or is_alone, "an exclusive lease is not alone on its node"


def _is_whole(gpu: Gpu, free: Mapping[int, float], memory: Mapping[int, int]) -> bool:
    return free[gpu.index] + EPSILON >= 1 and memory[gpu.index] == gpu.memory_bytes


def share_of_device(wanted: Resources) -> float:
    """Return the share of each device used: all of it for whole GPUs, none when only memory is asked for."""
    return wanted.gpu if wanted.gpu < 1 else 1.0


def _ends_in_s(slot: Slot, now: float) -> float:
    """Return in how many seconds a slot is expected to be released."""
    left_s = slot.progress_at + slot.backlog_s - now
    return left_s if left_s > 0 else now - slot.progress_at
