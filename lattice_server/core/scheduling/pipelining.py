"""Owns the work that is sent to a slot before the attempt in front has ended, so that its worker never waits.

Rule: only short work is sent ahead, and what waits behind an attempt that turned out long is taken back.
"""

from collections.abc import Callable, Iterable, Sized

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.messages import RevokeLease
from lattice_server.core.scheduling.batching import TaskGroup
from lattice_server.core.scheduling.lease_table import LeaseTable
from lattice_server.core.scheduling.node_registry import Fleet
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.placement import Shape
from lattice_server.core.scheduling.work import Lease, Task

AHEAD_S = 0.010  # Work worth at most this long waits behind other work on a worker.
AHEAD_LEASES = 64
PATIENCE_S = 0.020  # Work that waits behind one attempt for longer is taken back.
SHARED_AHEAD_S = 0.002  # The same while tenants share the cluster: none waits long for what others sent ahead.
SHARED_FOR_S = 0.1  # How long after the last change from one tenant to another they are thought to share it.
MAX_FUNCTIONS = 10_000  # Of how many functions it is known how long they take.


class SendingAhead:
    """How long functions take, and the slots that have work behind an attempt. `queued` are the tenants that wait."""

    def __init__(self, fleet: Fleet, table: LeaseTable, queued: Sized, emit: Callable[[RevokeLease], None]) -> None:
        self._fleet = fleet
        self._table = table
        self._queued = queued
        self._emit = emit
        self._crowded: Deadlines[Slot] = Deadlines()
        self._durations: dict[str, float] = {}
        self._last_tenant = ""
        self._shared_at = -SHARED_FOR_S

    def expected_s(self, task: Task) -> float | None:
        """Return how long an attempt of the task's function usually runs; None when that is not known."""
        return self._durations.get(task.ready.spec.function.digest)

    def learn(self, task: Task, duration_s: float) -> None:
        """Note how long an attempt ran."""
        digest = task.ready.spec.function.digest
        known = self._durations.pop(digest, duration_s)
        self._durations[digest] = known + 0.3 * (duration_s - known)
        if len(self._durations) > MAX_FUNCTIONS:
            del self._durations[next(iter(self._durations))]

    def slot_for(
        self, group: TaskGroup, reserved_for: Callable[[Node], TaskGroup | None], blocked: Iterable[Shape], now: float
    ) -> tuple[Slot, float] | None:
        """Return the slot to send the first task of a group to, and how long that task is expected to run.

        None when there is none: a slot that always has something behind it is never free, so none is used on a node
        that is reserved for another group or could run one of the `blocked` shapes.
        """
        shape, head = group.shape, group.head()
        if shape.is_async or shape.is_exclusive or group.key.policy is not None or head is None:
            return None
        expected_s = self.expected_s(head)
        slots = self._table.slots((shape, group.concurrency))
        if not slots or expected_s is None or expected_s > AHEAD_S:
            return None
        slot = min(slots, key=lambda slot: (self._is_long(slot, now), slot.backlog_s, len(slot.lease_ids)))
        node = self._fleet.nodes[slot.node_id]
        if self._is_long(slot, now) or not node.takes_work or not self._has_room(slot, expected_s, now):
            return None
        if reserved_for(node) not in {None, group}:
            return None
        if any(self._fleet.could_run(other, node) for other in blocked if other is not shape):
            return None
        return slot, expected_s

    def next_along(self, task: Task, now: float) -> tuple[Task, float] | None:
        """Return the task to send to the slot of a leased one because it follows it, and how long it may run.

        Only along a chain: of several followers all but one would run sooner elsewhere.
        """
        if len(task.followers) != 1:
            return None
        lease = self._table.leases[task.lease_id]
        if lease.is_revoked or len(lease.tasks) > 1 or not self._fleet.nodes[lease.slot.node_id].takes_work:
            return None
        (following,) = task.followers.values()
        expected_s = self.expected_s(following)
        if expected_s is None or following.lease_id or task.shape.is_async or task.shape.is_exclusive:
            return None
        if (following.shape, following.concurrency) != (task.shape, task.concurrency):
            return None
        if following.ready.spec.batch is not None or not self._has_room(lease.slot, expected_s, now):
            return None
        return following, expected_s

    def note_assigned(self, lease: Lease, now: float) -> None:
        """Note whose lease was the last, and that it may have others in front of it."""
        if lease.tenant != self._last_tenant:
            self._last_tenant, self._shared_at = lease.tenant, now
        slot = lease.slot
        if len(slot.lease_ids) > 1 and lease.tasks[0].follows is None:
            self._crowded.set(slot, slot.progress_at + PATIENCE_S)

    def note_released(self, slot: Slot) -> None:
        """Note that a lease has left a slot."""
        if slot in self._crowded:
            if len(slot.lease_ids) > 1:
                self._crowded.set(slot, slot.progress_at + PATIENCE_S)
            else:
                self._crowded.discard(slot)

    def take_back(self, now: float) -> None:
        """Revoke what waits behind attempts that turned out to be long."""
        for slot in self._crowded.due(now):
            slot.is_slow = True
            self._revoke(slot)

    def vacate(self, node: Node) -> None:
        """Revoke what a node has not come to."""
        for slot in node.slots.values():
            self._revoke(slot)

    def next_deadline(self) -> float | None:
        """Return when `take_back` is due next."""
        return self._crowded.next_at()

    def _revoke(self, slot: Slot) -> None:
        """Revoke what waits behind the first lease of a slot."""
        session_id = self._fleet.nodes[slot.node_id].session_id
        for lease_id in list(slot.lease_ids)[1:]:
            lease = self._table.leases[lease_id]
            # What follows another task cannot run sooner elsewhere.
            follows = any(task.follows is not None for task in lease.members())
            if lease.started_at is None and not lease.is_revoked and not follows:
                lease.is_revoked = True
                self._emit(RevokeLease(session_id, lease_id))

    def _has_room(self, slot: Slot, expected_s: float, now: float) -> bool:
        """Whether more may be sent behind what a slot has."""
        is_shared = len(self._queued) > 1 or now < self._shared_at + SHARED_FOR_S
        limit_s = SHARED_AHEAD_S if is_shared else AHEAD_S
        return slot.backlog_s + expected_s <= limit_s and len(slot.lease_ids) < AHEAD_LEASES

    def _is_long(self, slot: Slot, now: float) -> bool:
        """Whether the attempt in front takes, or took already, longer than what is behind it should wait."""
        return slot.is_slow or now >= slot.progress_at + PATIENCE_S
