"""Owns what waits, in the order in which it would leave. Rule: who has not changed is not looked at again."""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lattice_server.core.attempts import Task
from lattice_server.core.batching import OPEN, BatchCollector, Entry, Group, Lane, Stage, line_of
from lattice_server.core.clocks import Clocks
from lattice_server.core.placement import Shape


@dataclass(slots=True, eq=False)
class Tenant:
    """One caller that waits, and what it has waiting by line.

    `order` holds the lines of which a batch may leave, first the one that leaves first; `lanes` holds them by lane, in
    the same order. `used` counts, for all callers, those that have lines in a lane.
    """

    name: str
    used: Counter[Lane]
    collectors: dict[Group | Shape, BatchCollector] = field(default_factory=dict)
    order: list[Entry] = field(default_factory=list)
    lanes: dict[Lane, list[Entry]] = field(default_factory=dict)

    def enter(self, collector: BatchCollector, entry: Entry) -> None:
        """Line up a line at its place, in its lane."""
        collector.entry = entry
        insort(self.order, entry)
        self._join(collector, entry, collector.lane)

    def leave(self, collector: BatchCollector) -> None:
        """Take a line out of the order."""
        if collector.entry is not None:
            del self.order[bisect_left(self.order, collector.entry)]
            self._quit(collector, collector.entry)
            collector.entry = None

    def move(self, collector: BatchCollector, lane: Lane) -> None:
        """Move a line that is lined up to another lane."""
        if collector.entry is not None and collector.lane != lane:
            self._quit(collector, collector.entry)
            self._join(collector, collector.entry, lane)

    def check(self) -> None:
        """Assert that every line that may leave is in the order and in its lane, once."""
        lined_up = sorted(c.entry for c in self.collectors.values() if c.entry is not None)
        assert self.order == lined_up
        assert sorted(entry for lane in self.lanes.values() for entry in lane) == lined_up
        for lane, entries in self.lanes.items():
            assert entries == sorted(entries), "a lane is out of order"
            assert entries, "an empty lane"
            assert all(entry[-1].lane == lane for entry in entries)

    def _join(self, collector: BatchCollector, entry: Entry, lane: Lane) -> None:
        collector.lane = lane
        entries = self.lanes.get(lane)
        if entries is None:
            self.lanes[lane] = [entry]
            self.used[lane] += 1
        else:
            insort(entries, entry)

    def _quit(self, collector: BatchCollector, entry: Entry) -> None:
        entries = self.lanes[collector.lane]
        del entries[bisect_left(entries, entry)]
        if not entries:
            del self.lanes[collector.lane]
            _subtract(self.used, collector.lane)


@dataclass(slots=True, eq=False)
class Key:
    """The lines that wait and count for one limit: whose, and of how many. `parked` are those that are not open."""

    owners: Counter[tuple[str, int]] = field(default_factory=Counter)
    parked: dict[BatchCollector, None] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether all lines are one caller's and agree on the limit, so that they reach it together."""
        return len(self.owners) == 1


class Queue:
    """All that waits for resources. `shapes` counts the lines of each shape, `lanes` the callers in each lane."""

    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}
        self.shapes: Counter[Shape] = Counter()
        self.lanes: Counter[Lane] = Counter()
        self.keys: dict[str, Key] = {}
        self.clocks = Clocks()
        self._changed: dict[BatchCollector, None] = {}
        self._due: list[tuple[float, int, BatchCollector]] = []
        self._numbers = 0

    @property
    def has_changed(self) -> bool:
        """Whether tasks came or went since the last `refresh`."""
        return bool(self._changed)

    def push(self, task: Task, now: float) -> None:
        """Let a task wait."""
        name = task.ready.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            if not self.tenants:
                self.clocks.level(now)
            self.clocks.come(name, now)
            tenant = self.tenants[name] = Tenant(name, self.lanes)
        line = line_of(task)
        collector = tenant.collectors.get(line)
        if collector is None:
            group = line if isinstance(line, Group) else Group(name, line)
            lane = OPEN if group.shape.limit_key else Lane(Stage.ALIKE, group.shape)
            collector = tenant.collectors[line] = BatchCollector(group, lane=lane)
            self._add(collector)
        collector.add(task, now)
        self._changed[collector] = None

    def discard(self, task: Task) -> None:
        """Let a task wait no longer."""
        collector = task.collector
        if collector is None:
            return
        collector.remove(task)
        self._changed[collector] = None
        if collector.count == 0:
            tenant = self.tenants[collector.group.tenant]
            del tenant.collectors[line_of(task)]
            tenant.leave(collector)
            self._remove(collector)
            if not tenant.collectors:
                del self.tenants[tenant.name]

    def refresh(self, now: float) -> None:
        """Line up what came, what has changed, and what became due."""
        while self._due and self._due[0][0] <= now:
            collector = heapq.heappop(self._due)[-1]
            collector.noted_due = None
            self._changed[collector] = None
        for collector in self._changed:
            self.update(collector, now)
        self._changed.clear()

    def update(self, collector: BatchCollector, now: float) -> None:
        """Line up a line where it belongs now; one that stays where it was stays as it was."""
        head, due_at = collector.head(), collector.due_at()
        if head is None:
            return
        if due_at > now and due_at != collector.noted_due:
            self._numbers += 1
            collector.noted_due = due_at
            heapq.heappush(self._due, (due_at, self._numbers, collector))
        entry = None if due_at > now else (*head.rank, head.ticket, collector)
        if entry != collector.entry:
            tenant = self.tenants[collector.group.tenant]
            tenant.leave(collector)
            if collector.group.shape.limit_key:
                self._unpark(collector)
                collector.lane = OPEN
            if entry is not None:
                tenant.enter(collector, entry)

    def park(self, collector: BatchCollector, lane: Lane) -> None:
        """Move a line that is lined up to a lane."""
        self.tenants[collector.group.tenant].move(collector, lane)
        if lane == OPEN:
            self._unpark(collector)
        elif collector.group.shape.limit_key:
            self.keys[collector.group.shape.limit_key].parked[collector] = None

    def reopen(self, limit_key: str) -> None:
        """Have all lines looked at again that count for a limit."""
        key = self.keys.get(limit_key)
        if key is not None:
            parked, key.parked = key.parked, {}
            for collector in parked:
                self.tenants[collector.group.tenant].move(collector, OPEN)

    def collectors(self) -> Iterator[BatchCollector]:
        """Yield everything that waits, by group."""
        for tenant in self.tenants.values():
            yield from tenant.collectors.values()

    def next_due(self) -> float | None:
        """Return when a batch that waits for more tasks will wait no longer.

        One that was due before waits for resources, and no time will give it those.
        """
        while self._due and self._due[0][-1].due_at() != self._due[0][0]:
            heapq.heappop(self._due)[-1].noted_due = None
        return self._due[0][0] if self._due else None

    def check(self) -> None:
        """Assert that what is kept about lines is so."""
        lines = list(self.collectors())
        assert self.shapes == Counter(line.group.shape for line in lines)
        limited = [line for line in lines if line.group.shape.limit_key]
        assert self.keys.keys() == {line.group.shape.limit_key for line in limited}
        for name, key in self.keys.items():
            mine = [line for line in limited if line.group.shape.limit_key == name]
            assert key.owners == Counter(map(_owner, mine))
            assert key.parked.keys() == {line for line in mine if line.entry is not None and line.lane != OPEN}
        for tenant in self.tenants.values():
            tenant.check()
        assert self.lanes == Counter(lane for tenant in self.tenants.values() for lane in tenant.lanes)

    def _add(self, collector: BatchCollector) -> None:
        shape = collector.group.shape
        self.shapes[shape] += 1
        if not shape.limit_key:
            return
        key = self.keys.setdefault(shape.limit_key, Key())
        key.owners[_owner(collector)] += 1
        if not key.is_plain or self.shapes[shape] == 2 or key.owners.total() == 2:
            self.reopen(shape.limit_key)

    def _remove(self, collector: BatchCollector) -> None:
        shape = collector.group.shape
        _subtract(self.shapes, shape)
        if not shape.limit_key:
            return
        key = self.keys[shape.limit_key]
        self._unpark(collector)
        _subtract(key.owners, _owner(collector))
        if not key.owners:
            del self.keys[shape.limit_key]

    def _unpark(self, collector: BatchCollector) -> None:
        if collector.group.shape.limit_key:
            self.keys[collector.group.shape.limit_key].parked.pop(collector, None)


def _owner(collector: BatchCollector) -> tuple[str, int]:
    return collector.group.tenant, collector.group.shape.max_parallel


def _subtract(counter: Counter[Any], item: Any) -> None:
    counter[item] -= 1
    if not counter[item]:
        del counter[item]
