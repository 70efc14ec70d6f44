"""Owns the leases that workers have, and the slots that hold them.

Rule: a slot is opened with its first lease and closed with its last one; its resources and its permit are taken and
released with it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from lattice_server.core.messages import Assign, AttemptInputs, EarlierLease, HeldLease
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.permits import Concurrency, Permits
from lattice_server.core.scheduling.placement import Shape, suits
from lattice_server.core.scheduling.virtual_time import TenantClocks
from lattice_server.core.scheduling.work import Task
from lattice_server.core.states import LEASE_TRANSITIONS, LeaseState, transition

# The leases of a slot have the same needs and count towards the same concurrency key.
SlotKind = tuple[Shape, Concurrency | None]


@dataclass(slots=True, eq=False)
class Lease:
    """One batch that a worker has. `tasks` are its members by position, `ended` the positions that have ended.

    Its tenant's share of the cluster is `share` while it is the first of its slot. `sequence` is the number of its
    newest assignment, which was sent again at `repeated_at`. `after_lease_id` names the lease whose outputs it needs.
    """

    lease_id: str
    tasks: list[Task]
    slot: Slot
    expected_s: float
    shape: Shape
    tenant: str
    share: float
    sent_at: float
    after_lease_id: str = ""
    state: LeaseState = LeaseState.ASSIGNED
    started_at: float | None = None
    sequence: int = 0
    repeated_at: float = 0.0
    ended: set[int] = field(default_factory=set)

    def move(self, state: LeaseState) -> None:
        """Change the lease's state. Raises InvalidTransition."""
        self.state = transition("lease", self.lease_id, self.state, state, LEASE_TRANSITIONS)

    def time_of(self, at: float | None, now: float) -> float | None:
        """Return the time of an event of the lease that is reported `now`, limited to when its worker had the lease.

        None means now. Nothing happens in a lease before its start, which may have been noted by its time of receipt.
        """
        earliest = self.sent_at if self.started_at is None else self.started_at
        return None if at is None else min(max(at, earliest), now)

    def members(self) -> list[Task]:
        """Return the members that have not ended."""
        if not self.ended:
            return self.tasks
        return [task for item, task in enumerate(self.tasks) if item not in self.ended]

    def member(self, item: int) -> Task | None:
        """Return the member at a position; None when there is none, or when it has ended."""
        return self.tasks[item] if 0 <= item < len(self.tasks) and item not in self.ended else None

    @property
    def run_id(self) -> str:
        """The run of its first task; a batch may have tasks of several runs."""
        return self.tasks[0].ready.run_id

    @property
    def waits_for_input(self) -> bool:
        """Whether the predecessor of its task has not succeeded, so that it cannot have started."""
        return self.tasks[0].predecessor is not None

    @property
    def is_ending(self) -> bool:
        """Whether all of its members must end."""
        return all(task.ending is not None for task in self.members())


@dataclass(slots=True, eq=False)
class LeaseTable:
    """The leases by id, and the slots by the kind of their leases."""

    _registry: NodeRegistry
    _clocks: TenantClocks
    _permits: Permits
    _numbers: Iterator[int]
    _epoch: str
    _emit: Callable[[Assign], None]
    leases: dict[str, Lease] = field(default_factory=dict)
    _slots: dict[SlotKind, dict[int, Slot]] = field(default_factory=dict)

    def slots(self, kind: SlotKind) -> Collection[Slot]:
        """Return the slots of a kind."""
        return self._slots.get(kind, {}).values()

    def open(
        self, node: Node, shape: Shape, concurrency: Concurrency | None, devices: tuple[int, ...], now: float
    ) -> Slot:
        """Take the resources for a shape on a node; the permit is taken already."""
        slot = _slot(next(self._numbers), node, shape, concurrency, devices, now)
        self._take(node, slot, shape)
        return slot

    def assign(self, tasks: list[Task], slot: Slot, expected_s: float, now: float) -> Lease:
        """Lease tasks to the worker of a slot, which runs them after the earlier leases of the slot."""
        first = tasks[0]
        after_lease_id = "" if first.predecessor is None else first.predecessor.lease_id
        share, tenant = self._registry.share(first.shape), first.ready.tenant
        lease_id = f"{self._epoch}-{next(self._numbers)}"
        lease = Lease(lease_id, list(tasks), slot, expected_s, first.shape, tenant, share, now, after_lease_id)
        for task in tasks:
            task.attempt += 1
        self._add(lease, now)
        self._emit(self.assignment(lease))
        return lease

    def adopt(
        self, node: Node, tasks: list[Task], known: EarlierLease, held: HeldLease, expected_s: float, now: float
    ) -> bool:
        """Take over a started lease of an earlier life of the server, in a slot of its own; False without room for it.

        It is expected to run for so long that no lease is sent behind it: its worker has it in another slot.
        """
        first = tasks[0]
        shape, key = first.shape, None if held.has_ended else first.concurrency
        slot = _slot(next(self._numbers), node, shape, key, known.gpu_indices, now)
        slot.is_parked, slot.is_over = bool(held.waits) and not held.has_ended, held.has_ended
        if not (node.has_all_of(slot) and self._permits.has_free(key)):
            return False
        self._permits.take(key)
        self._take(node, slot, shape)
        started_at, share = min(known.started_at, now), self._registry.share(shape)
        tenant = first.ready.tenant
        lease = Lease(known.lease_id, tasks, slot, expected_s, shape, tenant, share, started_at)
        lease.move(LeaseState.STARTED)
        lease.started_at = started_at
        self._add(lease, now)
        return True

    def release(self, lease: Lease, now: float) -> None:
        """Release a lease, and with the last one its slot."""
        slot, clocks = lease.slot, self._clocks
        lease.move(LeaseState.RELEASED)
        del self.leases[lease.lease_id]
        is_first = next(iter(slot.lease_ids)) == lease.lease_id
        del slot.lease_ids[lease.lease_id]
        slot.backlog_s = max(0.0, slot.backlog_s - lease.expected_s)
        if is_first:
            # Only the end of the first lease is progress of the slot.
            slot.progress_at, slot.is_slow = now, False
            if slot.is_parked and len(slot.lease_ids):
                self._unpark(slot)
            clocks.add_share(lease.tenant, -lease.share, now)
            if slot.lease_ids:
                following = self.leases[next(iter(slot.lease_ids))]
                clocks.send_ahead(following.tenant, -following.share * following.expected_s, now)
                clocks.add_share(following.tenant, following.share, now)
        else:
            clocks.send_ahead(lease.tenant, -lease.share * lease.expected_s, now)
        if not slot.lease_ids:
            self._close(slot, lease.shape)

    def assignment(self, lease: Lease) -> Assign:
        """Return the message that sends a lease to its worker."""
        first = lease.tasks[0]
        spec = first.ready.spec
        node = self._registry.nodes[lease.slot.node_id]
        node.assignments += 1
        lease.sequence = node.assignments
        return Assign(
            session_id=node.session_id,
            lease_id=lease.lease_id,
            sequence=lease.sequence,
            slot=lease.slot.slot_id,
            tenant=lease.tenant,
            function=spec.function,
            attempts=tuple(
                AttemptInputs(t.ready.run_id, t.ready.spec.task_id, t.attempt, t.inputs) for t in lease.tasks
            ),
            is_batched=spec.batch is not None,
            outputs=spec.outputs,
            split_outputs=first.ready.split_outputs,
            isolation=spec.isolation,
            resources=spec.resources,
            gpu_indices=lease.slot.gpu_indices,
            timeout_s=spec.attempt_timeout_s,
            after_lease_id="" if first.predecessor is None else lease.after_lease_id,
            network=spec.network,
            environment=first.ready.environment,
        )

    def end_member(self, lease: Lease, task: Task) -> bool:
        """Note that a member of a lease has ended; return whether it was the last one."""
        task.lease_id = ""
        lease.ended.add(lease.tasks.index(task))
        self._registry.nodes[lease.slot.node_id].attempts -= 1
        return len(lease.ended) == len(lease.tasks)

    def of_node(self, node: Node) -> list[Lease]:
        """Return the leases of a node, slot by slot in the order in which they run."""
        return [self.leases[lease_id] for slot in node.slots.values() for lease_id in slot.lease_ids]

    def permits(self) -> Counter[Concurrency]:
        """Return the permits that slots have taken."""
        slots = (slot for slots in self._slots.values() for slot in slots.values())
        return Counter(slot.concurrency for slot in slots if slot.concurrency is not None)

    def check(self) -> None:
        """Assert the invariants between leases, slots, nodes and the clocks of tenants."""
        nodes = self._registry.nodes
        here = {slot.slot_id: slot for node in nodes.values() for slot in node.slots.values()}
        assert here == {slot_id: slot for slots in self._slots.values() for slot_id, slot in slots.items()}
        assert sorted(lease_id for slot in here.values() for lease_id in slot.lease_ids) == sorted(self.leases)
        held: dict[str, float] = defaultdict(float)
        ahead: dict[str, float] = defaultdict(float)
        attempts: Counter[str] = Counter()
        for lease in self.leases.values():
            _check_lease(lease, nodes[lease.slot.node_id])
            attempts[lease.slot.node_id] += len(lease.members())
            if next(iter(lease.slot.lease_ids)) == lease.lease_id:
                held[lease.tenant] += lease.share
            else:
                ahead[lease.tenant] += lease.share * lease.expected_s
        assert attempts == {node.node_id: node.attempts for node in nodes.values() if node.attempts}
        self._clocks.check(held, ahead)

    def _take(self, node: Node, slot: Slot, shape: Shape) -> None:
        self._registry.take(node, slot)
        self._slots.setdefault((shape, slot.concurrency), {})[slot.slot_id] = slot

    def _add(self, lease: Lease, now: float) -> None:
        """Add a lease behind the others of its slot."""
        slot = lease.slot
        for task in lease.tasks:
            task.lease_id = lease.lease_id
        if slot.lease_ids:
            self._clocks.send_ahead(lease.tenant, lease.share * lease.expected_s, now)
        else:
            self._clocks.add_share(lease.tenant, lease.share, now)
        self.leases[lease.lease_id] = lease
        slot.lease_ids[lease.lease_id] = None
        self._registry.nodes[slot.node_id].attempts += len(lease.tasks)
        slot.backlog_s += lease.expected_s

    def _unpark(self, slot: Slot) -> None:
        """Take the CPUs for the leases behind a parked one that has ended, if they are free.

        These were revoked when it was parked. The worker may begin one before it reads that, which is a short time.
        """
        if self._registry.nodes[slot.node_id].has_room_for(slot):
            self._registry.unpark(slot)

    def _close(self, slot: Slot, shape: Shape) -> None:
        self._registry.release(slot)
        self._permits.release(slot.concurrency)
        kind = (shape, slot.concurrency)
        slots = self._slots[kind]
        del slots[slot.slot_id]
        if not slots:
            del self._slots[kind]


def _slot(number: int, node: Node, shape: Shape, key: Concurrency | None, devices: tuple[int, ...], now: float) -> Slot:
    return Slot(
        number,
        node.node_id,
        shape.resources,
        shape.is_async,
        devices,
        key,
        progress_at=now,
        is_exclusive=shape.is_exclusive,
        is_service=shape.is_service,
    )


def _check_lease(lease: Lease, node: Node) -> None:
    members, policy = lease.members(), lease.tasks[0].ready.spec.batch
    assert lease.state is not LeaseState.RELEASED
    assert (lease.state is LeaseState.STARTED) == (lease.started_at is not None)
    assert lease.slot.slot_id in node.slots
    assert members, "a lease without tasks"
    assert all(task.lease_id == lease.lease_id for task in members)
    assert len({id(task) for task in lease.tasks}) == len(lease.tasks), "a task is in a batch twice"
    assert len(lease.tasks) <= (1 if policy is None else policy.max_size), "a batch is too large"
    assert lease.slot.resources == lease.shape.resources, "a slot takes other resources than its lease needs"
    assert suits(lease.shape, node.spec)
    for task in members:
        assert (task.shape, task.ready.tenant) == (lease.shape, lease.tenant), "a batch mixes shapes or tenants"
    assert lease.started_at is None or not lease.waits_for_input, "a task started before its input was there"
