"""Owns the leases that workers hold, and the slots that hold them.

Rule: a slot is opened with its first lease and closed with its last; its resources and its permit are taken and given
back with it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from lattice_server.core.messages import Assign, AttemptInputs
from lattice_server.core.scheduling.node_registry import Fleet
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.permits import Concurrency, Permits
from lattice_server.core.scheduling.placement import Shape
from lattice_server.core.scheduling.virtual_time import Clocks
from lattice_server.core.scheduling.work import Lease, Task

# What the calls of a slot share: work of the same needs that counts for the same key may follow in it.
SlotKind = tuple[Shape, Concurrency | None]


class LeaseTable:
    """The leases by id, and the slots by what may run in them."""

    def __init__(
        self,
        fleet: Fleet,
        clocks: Clocks,
        permits: Permits,
        numbers: Iterator[int],
        epoch: str,
        emit: Callable[[Assign], None],
    ) -> None:
        self.leases: dict[str, Lease] = {}
        self._fleet = fleet
        self._clocks = clocks
        self._permits = permits
        self._numbers = numbers
        self._epoch = epoch
        self._emit = emit
        self._slots: dict[SlotKind, dict[int, Slot]] = {}

    def slots(self, kind: SlotKind) -> Sequence[Slot]:
        """Return the slots in which work of a kind runs."""
        return tuple(self._slots.get(kind, {}).values())

    def open(
        self, node: Node, shape: Shape, concurrency: Concurrency | None, devices: tuple[int, ...], now: float
    ) -> Slot:
        """Reserve what a shape needs on a node; the permit is taken already."""
        slot = Slot(
            next(self._numbers),
            node.node_id,
            shape.resources,
            shape.is_async,
            devices,
            concurrency,
            progress_at=now,
            is_exclusive=shape.is_exclusive,
        )
        self._fleet.take(node, slot)
        self._slots.setdefault((shape, concurrency), {})[slot.slot_id] = slot
        return slot

    def assign(self, tasks: list[Task], slot: Slot, expected_s: float, now: float) -> Lease:
        """Lease tasks to the worker of a slot, which runs them after what the slot holds already."""
        first = tasks[0]
        after_lease_id = "" if first.follows is None else first.follows.lease_id
        share, tenant = self._fleet.share(first.shape), first.ready.tenant
        lease_id = f"{self._epoch}-{next(self._numbers)}"
        lease = Lease(lease_id, list(tasks), slot, expected_s, first.shape, tenant, share, now, after_lease_id)
        for task in tasks:
            task.attempt += 1
            task.lease_id = lease_id
        if slot.lease_ids:
            self._clocks.send_ahead(tenant, share * expected_s, now)
        else:
            self._clocks.hold(tenant, share, now)
        self.leases[lease_id] = lease
        slot.lease_ids[lease_id] = len(tasks)
        slot.backlog_s += expected_s
        self._emit(self.assignment(lease))
        return lease

    def release(self, lease: Lease, now: float) -> None:
        """Give back what a lease held."""
        slot, clocks = lease.slot, self._clocks
        del self.leases[lease.lease_id]
        is_first = next(iter(slot.lease_ids)) == lease.lease_id
        del slot.lease_ids[lease.lease_id]
        slot.backlog_s = max(0.0, slot.backlog_s - lease.expected_s)
        if is_first:
            # A lease that leaves from behind the first says nothing about the attempt in front.
            slot.progress_at, slot.is_slow = now, False
            clocks.hold(lease.tenant, -lease.share, now)
            if slot.lease_ids:
                following = self.leases[next(iter(slot.lease_ids))]
                clocks.send_ahead(following.tenant, -following.share * following.expected_s, now)
                clocks.hold(following.tenant, following.share, now)
        else:
            clocks.send_ahead(lease.tenant, -lease.share * lease.expected_s, now)
        if not slot.lease_ids:
            self._close(slot, lease.shape)

    def assignment(self, lease: Lease) -> Assign:
        """Return the message that hands a lease to its worker."""
        first = lease.tasks[0]
        spec = first.ready.spec
        node = self._fleet.nodes[lease.slot.node_id]
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
            after_lease_id="" if first.follows is None else lease.after_lease_id,
        )

    def held_by(self, node: Node) -> list[Lease]:
        """Return the leases of a node, slot by slot in the order in which they run."""
        return [self.leases[lease_id] for slot in node.slots.values() for lease_id in slot.lease_ids]

    def permits(self) -> Counter[Concurrency]:
        """Return the permits that slots hold."""
        slots = (slot for slots in self._slots.values() for slot in slots.values())
        return Counter(slot.concurrency for slot in slots if slot.concurrency is not None)

    def check(self) -> None:
        """Assert what must hold between leases, slots and the clocks of tenants."""
        here = {slot.slot_id: slot for node in self._fleet.nodes.values() for slot in node.slots.values()}
        assert here == {slot_id: slot for slots in self._slots.values() for slot_id, slot in slots.items()}
        held: dict[str, float] = {}
        ahead: dict[str, float] = {}
        for lease in self.leases.values():
            name, is_first = lease.tenant, next(iter(lease.slot.lease_ids)) == lease.lease_id
            if is_first:
                held[name] = held.get(name, 0.0) + lease.share
            else:
                ahead[name] = ahead.get(name, 0.0) + lease.share * lease.expected_s
            policy = lease.tasks[0].ready.spec.batch
            assert len(lease.tasks) <= (1 if policy is None else policy.max_size), "a batch is too large"
        self._clocks.check(held, ahead)

    def _close(self, slot: Slot, shape: Shape) -> None:
        self._fleet.release(slot)
        self._permits.release(slot.concurrency)
        kind = (shape, slot.concurrency)
        slots = self._slots[kind]
        del slots[slot.slot_id]
        if not slots:
            del self._slots[kind]
