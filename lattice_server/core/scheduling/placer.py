"""Owns the way of a task from the queue to a worker: fair share, permits, reservations, work sent ahead.

Rule: a pass offers room to the tenant whose clock is furthest behind, group by group in the order of its tasks. A shape
that no node has room for, and a key that has no permit left, are tried once.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping

from lattice_server.core.messages import Assign, RevokeLease
from lattice_server.core.scheduling.batching import TaskGroup
from lattice_server.core.scheduling.lease_table import LeaseTable
from lattice_server.core.scheduling.node_registry import Fleet
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.permits import Permits
from lattice_server.core.scheduling.pipelining import AHEAD_S, SendingAhead
from lattice_server.core.scheduling.placement import Shape, devices_on
from lattice_server.core.scheduling.queue import Candidates, Queue
from lattice_server.core.scheduling.reservations import Reservations
from lattice_server.core.scheduling.work import Lease, Task


class Placer:
    """Turns queued tasks into leases, and gives back what leases held.

    `_full` are the shapes that could not be placed, nor sent ahead, since anything was released last.
    """

    def __init__(
        self,
        fleet: Fleet,
        numbers: Iterator[int],
        epoch: str,
        emit: Callable[[Assign | RevokeLease], None],
        limits: Mapping[str, int],
    ) -> None:
        self.queue = Queue()
        self.permits = Permits(limits)
        self.reservations = Reservations(fleet, self.permits)
        self.table = LeaseTable(fleet, self.queue.clocks, self.permits, numbers, epoch, emit)
        self.ahead = SendingAhead(fleet, self.table, self.queue.tenants, emit)
        self._fleet = fleet
        self._full: set[Shape] = set()
        self._is_due = False

    def look_again(self) -> None:
        """Note that something changed by which more may be placed."""
        self._is_due = True
        self._full.clear()

    def place_queued(self, now: float) -> None:
        """Place what can be placed; nothing is tried while nothing changed by which more could be."""
        if not self._may_place(now):
            return
        self._is_due = True
        while self._is_due:
            self._is_due = False
            for group in self.reservations.forget(self.queue.shapes):
                self._reopen(group)
            self.queue.refresh(now)
            self._place_reserved(now)
            self._place_in_order(now)

    def assign(self, tasks: list[Task], slot: Slot, expected_s: float, now: float) -> None:
        """Lease queued tasks to the worker of a slot."""
        for task in tasks:
            self.queue.discard(task)
        self.ahead.note_assigned(self.table.assign(tasks, slot, expected_s, now), now)

    def send_along(self, task: Task, now: float) -> None:
        """Send the chain of tasks that follows a leased one to the same slot, so that the worker goes on by itself."""
        while (found := self.ahead.next_along(task, now)) is not None:
            following, expected_s = found
            self.assign([following], self.table.leases[task.lease_id].slot, expected_s, now)
            task = following

    def release(self, lease: Lease, now: float) -> None:
        """Give back what a lease held."""
        self.look_again()
        self.table.release(lease, now)
        self.ahead.note_released(lease.slot)
        if lease.slot.concurrency is not None:
            self.queue.reopen(lease.slot.concurrency.key)

    def learn(self, task: Task, duration_s: float) -> None:
        """Note how long an attempt of a task ran."""
        self.look_again()
        self.ahead.learn(task, duration_s)

    def next_deadline(self) -> float | None:
        """Return when something is to be placed, reserved or taken back by time alone."""
        due = (self.ahead.next_deadline(), self.queue.next_due(), self.reservations.next_deadline())
        return min((at for at in due if at is not None), default=None)

    def check(self) -> None:
        """Assert what must hold between the queue, the leases, permits and reservations."""
        self.queue.check()
        self.table.check()
        self.reservations.check()
        held = self.table.permits()
        held.update(group.concurrency for group, _ in self.reservations.items() if group.concurrency is not None)
        self.permits.check(held)

    def _may_place(self, now: float) -> bool:
        """Whether more could be placed than the last time."""
        starving = list(self.reservations.starving(now))
        self._full.difference_update(starving)
        due_at = self.queue.next_due()
        is_batch_due = due_at is not None and due_at <= now
        return self._is_due or bool(starving) or is_batch_due or self.queue.has_changed

    def _place_reserved(self, now: float) -> None:
        """Place groups on the nodes that are reserved for them, as soon as they have room."""
        for group, node in self.reservations.items():
            devices = devices_on(node, group.shape) if group.due_at() <= now else None
            if devices is not None:
                self._start(group, node, devices, now)

    def _place_in_order(self, now: float) -> None:
        clocks, tenants = self.queue.clocks, self.queue.tenants
        # A tenant that was served is behind others of the same clock.
        turns = [(clocks.turn(name, now), number, name) for number, name in enumerate(tenants)]
        heapq.heapify(turns)
        candidates: dict[str, Candidates] = {}
        served = len(turns)
        while turns:
            name = turns[0][-1]
            if name not in candidates and name in tenants:
                candidates[name] = Candidates(tenants[name], self._full)
            group = candidates[name].first() if name in tenants else None
            if group is None:
                heapq.heappop(turns)
            elif self._place(group, now):
                served += 1
                heapq.heapreplace(turns, (clocks.turn(name, now), served, name))

    def _place(self, group: TaskGroup, now: float) -> bool:
        """Place a batch of a group, or note why none can be."""
        shape, key = group.shape, group.concurrency
        found = self._fleet.index.find(shape, self.reservations.of_others(group))
        if found is not None and (self.permits.has_free(key) or self.reservations.has(group)):
            self._start(group, *found, now)
            return True
        if self._send_ahead(group, now):
            return True
        if found is None:
            self._full.add(shape)
            self.reservations.note_blocked(group, now)
        elif key is not None:
            self.queue.exhaust(key.key)
        return False

    def _start(self, group: TaskGroup, node: Node, devices: tuple[int, ...], now: float) -> None:
        """Lease the next batch of a group to a node that has room for it."""
        batch = group.next_batch()
        if self.reservations.note_placed(group, batch[0].ready.priority):
            # The node it had reserved, if another one, has room for others.
            self.look_again()
        else:
            self.permits.take(group.concurrency)
        slot = self.table.open(node, group.shape, group.concurrency, devices, now)
        expected_s = self.ahead.expected_s(batch[0])
        # Nothing is sent behind what may take any time.
        self._assign_first(group, batch, slot, 2 * AHEAD_S if expected_s is None else expected_s, now)
        if len(batch) == 1:
            self.send_along(batch[0], now)

    def _send_ahead(self, group: TaskGroup, now: float) -> bool:
        """Send the first task of a group to a slot that runs others of its kind; False when there is none."""
        found = self.ahead.slot_for(group, self.reservations.group_of, self._full, now)
        head = group.head()
        if found is None or head is None:
            return False
        self._assign_first(group, [head], *found, now)
        return True

    def _assign_first(self, group: TaskGroup, tasks: list[Task], slot: Slot, expected_s: float, now: float) -> None:
        """Lease the first tasks of a group, and count that as a turn of its tenant."""
        self.assign(tasks, slot, expected_s, now)
        self.queue.clocks.serve(group.tenant, now)
        self.queue.refresh(now)

    def _reopen(self, group: TaskGroup) -> None:
        """Note that what a group had reserved is free again."""
        self._full.clear()
        if group.concurrency is not None:
            self.queue.reopen(group.concurrency.key)
