"""Owns the leases that are sent to a slot before its present one has ended, so that its worker need not wait.

Rule: only short tasks are sent ahead, and leases behind an attempt that turns out to be long are revoked.
"""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.messages import RevokeLease
from lattice_server.core.scheduling.lease_table import Lease, LeaseTable
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.placement import Shape
from lattice_server.core.scheduling.work import Task, TaskGroup
from lattice_server.core.states import LeaseState

AHEAD_S = 0.010  # The longest expected time of the leases of a slot.
AHEAD_LEASES = 64
# Leases that wait longer than this behind one attempt are revoked. Far more than a short attempt takes: a worker and a
# server that share a busy machine may tell each other of an end tens of milliseconds after it.
PATIENCE_S = 0.1
# The limits while several runs share the cluster, so that they wait less for each other. A worker takes about a
# millisecond for a lease, however short its function is.
SHARED_AHEAD_S = 0.002
SHARED_AHEAD_LEASES = 8
SHARED_FOR_S = 1.0  # How long runs count as sharing the cluster after two of them had a lease at the same time.
MAX_FUNCTIONS = 10_000  # The number of functions whose duration is remembered.


@dataclass(slots=True, eq=False)
class Pipeline:
    """The durations of functions, and the slots with leases behind an attempt. `queued` are the tenants that queue."""

    _registry: NodeRegistry
    _table: LeaseTable
    _queued: Sized
    _emit: Callable[[RevokeLease], None]
    _waiting: Deadlines[Slot] = field(default_factory=Deadlines)
    _durations: dict[str, float] = field(default_factory=dict)
    _last: Lease | None = None
    _shared_at: float = -SHARED_FOR_S

    def expected_s(self, task: Task) -> float | None:
        """Return how long an attempt of the task's function usually runs; None when it has not run yet."""
        return self._durations.get(task.ready.spec.function.digest)

    def note_duration(self, task: Task, duration_s: float) -> None:
        """Note how long an attempt ran."""
        digest = task.ready.spec.function.digest
        known = self._durations.pop(digest, duration_s)
        self._durations[digest] = known + 0.3 * (duration_s - known)
        if len(self._durations) > MAX_FUNCTIONS:
            del self._durations[next(iter(self._durations))]

    def slot_for(
        self, group: TaskGroup, reserved_for: Callable[[Node], TaskGroup | None], blocked: Iterable[Shape], now: float
    ) -> tuple[Slot, float] | None:
        """Return a busy slot to send the first task of a group to, and how long that task is expected to run.

        Sending ahead keeps a slot from becoming free. So no slot is used on a node that is reserved for another group
        or could run one of the `blocked` shapes. None when there is no slot.
        """
        shape, head = group.shape, group.head()
        if shape.is_async or shape.is_exclusive or shape.is_service or group.key.policy is not None or head is None:
            return None
        expected_s = self.expected_s(head)
        slots = self._table.slots((shape, group.concurrency))
        if not slots or expected_s is None or expected_s > AHEAD_S:
            return None
        slot = min(slots, key=lambda slot: (self._is_long(slot, now), slot.backlog_s, len(slot.lease_ids)))
        node = self._registry.nodes[slot.node_id]
        if (
            self._is_long(slot, now)
            or not node.takes_work
            or node.owes_cpu
            or not self._has_room(slot, expected_s, now)
        ):
            return None
        if reserved_for(node) not in {None, group}:
            return None
        if any(self._registry.could_run(other, node) for other in blocked if other is not shape):
            return None
        return slot, expected_s

    def next_along(self, task: Task, now: float) -> tuple[Task, float] | None:
        """Return the dependent of a leased task to send to the same slot, and how long it is expected to run.

        Only a single dependent is sent along: of several, all but one would start sooner elsewhere.
        """
        if len(task.dependents) != 1:
            return None
        lease = self._table.leases[task.lease_id]
        if (
            lease.state is LeaseState.REVOKED
            or lease.slot.is_parked
            or len(lease.tasks) > 1
            or not self._registry.nodes[lease.slot.node_id].takes_work
        ):
            return None
        (dependent,) = task.dependents.values()
        expected_s = self.expected_s(dependent)
        if expected_s is None or dependent.lease_id or task.shape.is_async or task.shape.is_exclusive:
            return None
        if (dependent.shape, dependent.concurrency) != (task.shape, task.concurrency):
            return None
        if dependent.ready.spec.batch is not None or not self._has_room(lease.slot, expected_s, now):
            return None
        return dependent, expected_s

    def note_assigned(self, lease: Lease, now: float) -> None:
        """Note a new lease, which may wait behind others of its slot."""
        last, self._last = self._last, lease
        if last is not None and last.run_id != lease.run_id and last.lease_id in self._table.leases:
            self._shared_at = now
        slot = lease.slot
        if len(slot.lease_ids) > 1 and not lease.waits_for_input:
            self._waiting.set(slot, slot.progress_at + PATIENCE_S)

    def note_released(self, slot: Slot) -> None:
        """Note that a lease of a slot was released."""
        if slot in self._waiting:
            if len(slot.lease_ids) > 1:
                self._waiting.set(slot, slot.progress_at + PATIENCE_S)
            else:
                self._waiting.discard(slot)

    def revoke_overdue(self, now: float) -> None:
        """Revoke leases behind attempts that turned out to be long."""
        for slot in self._waiting.due(now):
            slot.is_slow = True
            self._revoke(slot)

    def vacate(self, node: Node) -> None:
        """Revoke the leases of a node behind the first ones of its slots."""
        for slot in node.slots.values():
            self._revoke(slot)

    def vacate_slot(self, slot: Slot) -> None:
        """Revoke the leases behind the first one of a slot, and send no more: it waits for called tasks."""
        slot.is_slow = True
        self._revoke(slot)

    def next_deadline(self) -> float | None:
        """Return when `revoke_overdue` is due next."""
        return self._waiting.next_at()

    def _revoke(self, slot: Slot) -> None:
        """Revoke the leases behind the first one of a slot."""
        session_id = self._registry.nodes[slot.node_id].session_id
        for lease_id in list(slot.lease_ids)[1:]:
            lease = self._table.leases[lease_id]
            # A lease that waits for the output of another one of its slot cannot start sooner elsewhere.
            if lease.state is LeaseState.ASSIGNED and not lease.waits_for_input:
                lease.move(LeaseState.REVOKED)
                self._emit(RevokeLease(session_id, lease_id))

    def _has_room(self, slot: Slot, expected_s: float, now: float) -> bool:
        """Whether a slot may get one more lease."""
        is_shared = len(self._queued) > 1 or now < self._shared_at + SHARED_FOR_S
        limit_s, leases = (SHARED_AHEAD_S, SHARED_AHEAD_LEASES) if is_shared else (AHEAD_S, AHEAD_LEASES)
        return slot.backlog_s + expected_s <= limit_s and len(slot.lease_ids) < leases

    def _is_long(self, slot: Slot, now: float) -> bool:
        """Whether the first lease of a slot runs longer than others should wait behind it."""
        return slot.is_slow or now >= slot.progress_at + PATIENCE_S
