"""Owns queued tasks, by tenant and in the order in which they are placed.

Rule: a group is in the order while a batch of it is due and its concurrency key is not exhausted.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.scheduling.placement import Shape
from lattice_server.core.scheduling.virtual_time import TenantClocks
from lattice_server.core.scheduling.work import INFINITY, Entry, GroupKey, Task, TaskGroup, group_key


@dataclass(slots=True, eq=False)
class TenantQueue:
    """The groups of one tenant. `order` lists by shape, in order, the groups of which a batch may be placed."""

    name: str
    groups: dict[object, TaskGroup] = field(default_factory=dict)
    order: dict[Shape, list[Entry]] = field(default_factory=dict)

    def move(self, group: TaskGroup, entry: Entry | None) -> None:
        """Give a group another place in the order, or none."""
        if group.entry is not None:
            entries = self.order[group.shape]
            del entries[bisect_left(entries, group.entry)]
            if not entries:
                del self.order[group.shape]
        group.entry = entry
        if entry is not None:
            insort(self.order.setdefault(group.shape, []), entry)


class Candidates:
    """The groups of one tenant in the order in which a pass tries them, except those of `full` shapes."""

    def __init__(self, tenant: TenantQueue, full: Container[Shape]) -> None:
        self._order = tenant.order
        self._full = full
        # The first group of each shape when it was looked at last.
        self._heads = [(entries[0], shape) for shape, entries in tenant.order.items() if shape not in full]
        heapq.heapify(self._heads)

    def first(self) -> TaskGroup | None:
        """Return the next group; None when there is none."""
        heads = self._heads
        while heads:
            entry, shape = heads[0]
            entries = self._order.get(shape)
            if not entries or shape in self._full:
                heapq.heappop(heads)
            elif entries[0] is not entry:
                heapq.heapreplace(heads, (entries[0], shape))
            else:
                return entry[-1]
        return None


class Queue:
    """All queued tasks. `shapes` counts their groups by shape."""

    def __init__(self) -> None:
        self.tenants: dict[str, TenantQueue] = {}
        self.shapes: Counter[Shape] = Counter()
        self.clocks = TenantClocks()
        self._by_key: dict[str, dict[TaskGroup, None]] = {}
        self._exhausted: set[str] = set()
        self.has_changed = False  # Whether tasks came or went since the last `refresh`.
        self._changed: dict[TaskGroup, None] = {}
        self._due: Deadlines[TaskGroup] = Deadlines()

    def push(self, task: Task, now: float) -> None:
        """Queue a task."""
        name = task.ready.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            if not self.tenants:
                self.clocks.level(now)
            self.clocks.join(name, now)
            tenant = self.tenants[name] = TenantQueue(name)
        key = group_key(task)
        group = tenant.groups.get(key)
        if group is None:
            group = TaskGroup(name, key if isinstance(key, GroupKey) else GroupKey(*key))
            tenant.groups[key] = group
            self.shapes[group.shape] += 1
            if group.concurrency is not None:
                self._by_key.setdefault(group.concurrency.key, {})[group] = None
        group.add(task, now)
        self._note_changed(group)

    def discard(self, task: Task) -> None:
        """Remove a task from the queue, if it is there."""
        group = task.group
        if group is None:
            return
        group.remove(task)
        self._note_changed(group)
        if group.count == 0:
            tenant = self.tenants[group.tenant]
            del tenant.groups[group_key(task)]
            self._remove(group, tenant)
            if not tenant.groups:
                del self.tenants[tenant.name]

    def refresh(self, now: float) -> None:
        """Sort in the groups that changed, and those of which a batch became due."""
        for group in self._due.due(now):
            self._changed[group] = None
        for group in self._changed:
            if group.count:
                self._update(group, now)
        self._changed.clear()
        self.has_changed = False

    def exhaust(self, key: str) -> None:
        """Take the groups of a concurrency key out of the order until the key is reopened."""
        self._exhausted.add(key)
        for group in self._by_key.get(key, ()):
            self.tenants[group.tenant].move(group, None)

    def reopen(self, key: str) -> None:
        """Note that a permit of a concurrency key may be free."""
        if key in self._exhausted:
            self._exhausted.remove(key)
            self._changed.update(self._by_key.get(key, {}))

    def is_exhausted(self, key: str) -> bool:
        """Whether the groups of a concurrency key wait for a permit."""
        return key in self._exhausted

    def groups(self) -> Iterator[TaskGroup]:
        """Yield all groups."""
        for tenant in self.tenants.values():
            yield from tenant.groups.values()

    def load(self, now: float) -> tuple[int, float]:
        """Return how many tasks are queued, and how many seconds the first one of a group has waited at most."""
        groups = list(self.groups())
        heads = (head for group in groups if (head := group.head()) is not None)
        since = min((head.waiting_since for head in heads), default=now)
        return sum(group.count for group in groups), now - since

    def next_due(self) -> float | None:
        """Return when the next batch that waits for more tasks is due."""
        return self._due.next_at()

    def check(self) -> None:
        """Assert the invariants of the order of groups."""
        groups = list(self.groups())
        assert self.shapes == Counter(group.shape for group in groups)
        keyed: dict[str, set[TaskGroup]] = {}
        for group in groups:
            if group.concurrency is not None:
                keyed.setdefault(group.concurrency.key, set()).add(group)
        assert {key: set(found) for key, found in self._by_key.items()} == keyed
        assert self._exhausted <= keyed.keys()
        for tenant in self.tenants.values():
            placeable = [group for group in tenant.groups.values() if group.entry is not None]
            assert all(group.concurrency is None or group.concurrency.key not in self._exhausted for group in placeable)
            ordered = [entry[-1] for entries in tenant.order.values() for entry in entries]
            assert set(ordered) == set(placeable)
            assert len(ordered) == len(placeable)
            for shape, entries in tenant.order.items():
                assert entries, "a shape without groups"
                assert entries == sorted(entries), "groups are out of order"
                assert all(entry[-1].shape == shape and entry[-1].entry is entry for entry in entries)

    def _note_changed(self, group: TaskGroup) -> None:
        self.has_changed = True
        self._changed[group] = None

    def _update(self, group: TaskGroup, now: float) -> None:
        head, due_at = group.head(), group.due_at()
        if now < due_at < INFINITY:
            self._due.set(group, due_at)
        else:
            self._due.discard(group)
        is_exhausted = group.concurrency is not None and group.concurrency.key in self._exhausted
        entry = None if head is None or due_at > now or is_exhausted else (head.rank, head.ticket, group)
        if entry != group.entry:
            self.tenants[group.tenant].move(group, entry)

    def _remove(self, group: TaskGroup, tenant: TenantQueue) -> None:
        tenant.move(group, None)
        self._due.discard(group)
        del self._changed[group]
        self.shapes[group.shape] -= 1
        if not self.shapes[group.shape]:
            del self.shapes[group.shape]
        if group.concurrency is not None:
            key = group.concurrency.key
            del self._by_key[key][group]
            # It may have been the only one that allows so few calls.
            self.reopen(key)
            if not self._by_key[key]:
                del self._by_key[key]
