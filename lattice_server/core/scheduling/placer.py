"""Owns the placement of queued tasks: fair share, permits, reservations, sending ahead.

Rule: a pass serves the tenant whose clock is furthest behind, group by group in the order of its tasks. It tries a
shape that no node has room for once, and likewise a concurrency key without a free permit.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping

from lattice_server.core.messages import Assign, RevokeLease
from lattice_server.core.scheduling.lease_table import Lease, LeaseTable
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node, Slot
from lattice_server.core.scheduling.permits import Concurrency, Permits
from lattice_server.core.scheduling.pipelining import AHEAD_S, Pipeline
from lattice_server.core.scheduling.placement import Shape, devices_on
from lattice_server.core.scheduling.queue import Candidates, Queue
from lattice_server.core.scheduling.reservations import Reservations
from lattice_server.core.scheduling.work import Task, TaskGroup


class Placer:
    """Turns queued tasks into leases, and releases leases.

    `on_release` is called with each lease before it is released. `_full` are the shapes that could neither be placed
    nor sent ahead since the last release.
    """

    def __init__(
        self,
        registry: NodeRegistry,
        numbers: Iterator[int],
        epoch: str,
        emit: Callable[[Assign | RevokeLease], None],
        limits: Mapping[str, int],
    ) -> None:
        self.queue = Queue()
        self.permits = Permits(limits)
        self.reservations = Reservations(registry, self.permits)
        self.table = LeaseTable(registry, self.queue.clocks, self.permits, numbers, epoch, emit)
        self.pipeline = Pipeline(registry, self.table, self.queue.tenants, emit)
        self.on_release: Callable[[Lease], None] = lambda lease: None
        self._registry = registry
        self._full: set[Shape] = set()
        self._is_due = False

    def note_change(self) -> None:
        """Note a change after which more tasks may be placed."""
        self._is_due = True
        self._full.clear()

    def place_queued(self, now: float) -> None:
        """Place as many tasks as possible; try none if nothing has changed since the last time."""
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
        self.pipeline.note_assigned(self.table.assign(tasks, slot, expected_s, now), now)

    def send_along(self, task: Task, now: float) -> None:
        """Send the chain of dependents of a leased task to the same slot, so that the worker need not wait for them."""
        while (found := self.pipeline.next_along(task, now)) is not None:
            dependent, expected_s = found
            self.assign([dependent], self.table.leases[task.lease_id].slot, expected_s, now)
            task = dependent

    def release(self, lease: Lease, now: float) -> None:
        """Release a lease."""
        self.note_change()
        self.on_release(lease)
        self.table.release(lease, now)
        self.pipeline.note_released(lease.slot)
        if lease.slot.concurrency is not None:
            self.queue.reopen(lease.slot.concurrency.key)

    def release_permit(self, held: Concurrency | None) -> None:
        """Release the permit of a lease of an earlier life of the server."""
        self.note_change()
        self.permits.release(held)
        if held is not None:
            self.queue.reopen(held.key)

    def learn(self, task: Task, duration_s: float) -> None:
        """Note how long an attempt of a task ran."""
        self.note_change()
        self.pipeline.note_duration(task, duration_s)

    def next_deadline(self) -> float | None:
        """Return when a task may have to be placed, a node reserved, or a lease revoked next."""
        due = (self.pipeline.next_deadline(), self.queue.next_due(), self.reservations.next_deadline())
        return min((at for at in due if at is not None), default=None)

    def check(self, permits: Iterable[Concurrency]) -> None:
        """Assert the invariants of the queue, the leases, permits and reservations; others hold these `permits`."""
        self.queue.check()
        self.table.check()
        self.reservations.check()
        held = self.table.permits()
        held.update(group.concurrency for group, _ in self.reservations.items() if group.concurrency is not None)
        held.update(permits)
        self.permits.check(held)

    def _may_place(self, now: float) -> bool:
        """Whether more tasks may be placed than the last time."""
        starving = list(self.reservations.starving(now))
        self._full.difference_update(starving)
        due_at = self.queue.next_due()
        is_batch_due = due_at is not None and due_at <= now
        return self._is_due or bool(starving) or is_batch_due or self.queue.has_changed

    def _place_reserved(self, now: float) -> None:
        """Place groups on the nodes reserved for them, if these have room."""
        for group, node in self.reservations.items():
            devices = devices_on(node, group.shape) if group.due_at() <= now else None
            if devices is not None:
                self._start(group, node, devices, now)

    def _place_in_order(self, now: float) -> None:
        clocks, tenants = self.queue.clocks, self.queue.tenants
        # Among tenants of the same clock, the one served last comes last.
        turns = [(clocks.time(name, now), number, name) for number, name in enumerate(tenants)]
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
                heapq.heapreplace(turns, (clocks.time(name, now), served, name))

    def _place(self, group: TaskGroup, now: float) -> bool:
        """Place a batch of a group, or note why that is not possible."""
        shape, key = group.shape, group.concurrency
        found = self._registry.index.find(shape, self.reservations.of_others(group))
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
            # Another node that was reserved for the group is free for others now.
            self.note_change()
        else:
            self.permits.take(group.concurrency)
        slot = self.table.open(node, group.shape, group.concurrency, devices, now)
        expected_s = self.pipeline.expected_s(batch[0])
        # No lease is sent behind one whose duration is unknown.
        self._assign_first(group, batch, slot, 2 * AHEAD_S if expected_s is None else expected_s, now)
        if len(batch) == 1:
            self.send_along(batch[0], now)

    def _send_ahead(self, group: TaskGroup, now: float) -> bool:
        """Send the first task of a group to a busy slot of its kind; return whether there is one."""
        found = self.pipeline.slot_for(group, self.reservations.group_of, self._full, now)
        head = group.head()
        if found is None or head is None:
            return False
        self._assign_first(group, [head], *found, now)
        return True

    def _assign_first(self, group: TaskGroup, tasks: list[Task], slot: Slot, expected_s: float, now: float) -> None:
        """Lease the first tasks of a group, and note that its tenant was served."""
        self.assign(tasks, slot, expected_s, now)
        self.queue.clocks.serve(group.tenant, now)
        self.queue.refresh(now)

    def _reopen(self, group: TaskGroup) -> None:
        """Note that the reservation of a group has ended."""
        self._full.clear()
        if group.concurrency is not None:
            self.queue.reopen(group.concurrency.key)
