"""Owns who is next: fair between callers, by priority and age within one. Rule: whoever has had least goes first.

Each caller has a clock that runs while its tasks hold a share of the cluster: by the share, times the time it is held.
The caller whose clock is furthest behind is next. One that comes, or comes back, starts where the clock of the one
served last was before its turn: it can neither save up turns nor be made to pay for the time before it came. When
nobody waits, nobody is owed a turn, and all clocks are made equal.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from lattice_server.core.attempts import Task
from lattice_server.core.batching import BatchCollector, Group, group_of

MAX_CLOCKS = 1000


@dataclass(slots=True, eq=False)
class Tenant:
    """One caller that waits: its clock, where the clocks were when it came, and what it has waiting by group."""

    name: str
    floor: float
    clock: float
    collectors: dict[Group, BatchCollector] = field(default_factory=dict)


class Queue:
    """All that waits for resources."""

    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}
        self._clocks: dict[str, float] = {}
        self._max_clocks = MAX_CLOCKS
        self._now = 0.0

    def push(self, task: Task, now: float) -> None:
        """Let a task wait."""
        name = task.ready.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            if not self.tenants and self._clocks:
                self._now = max(self._now, *self._clocks.values())
                self._clocks.clear()
            tenant = Tenant(name, self._now, max(self._now, self._clocks.pop(name, 0.0)))
            self.tenants[name] = tenant
        group = group_of(task)
        collector = tenant.collectors.get(group)
        if collector is None:
            collector = tenant.collectors[group] = BatchCollector(group)
        collector.add(task, now)

    def discard(self, task: Task) -> None:
        """Let a task wait no longer."""
        collector = task.collector
        if collector is None:
            return
        collector.remove(task)
        if collector.count == 0:
            tenant = self.tenants[collector.group.tenant]
            del tenant.collectors[collector.group]
            if not tenant.collectors:
                del self.tenants[tenant.name]
                self._remember(tenant.name, tenant.clock)

    def charge(self, name: str, amount: float) -> None:
        """Move a caller's clock by a share of the cluster times seconds; back, when it was charged too much."""
        tenant = self.tenants.get(name)
        if tenant is not None:
            # What is paid back may be from before it came, when it counted for nothing.
            tenant.clock = max(tenant.floor, tenant.clock + amount)
        else:
            self._remember(name, self._clocks.pop(name, self._now) + amount)

    def turns(self, now: float) -> "Turns":
        """Return the turns of one round of placing."""
        return Turns(self, now)

    def serve(self, clock: float) -> None:
        """Note where the clock was of the caller whose turn it was; whoever comes later starts from there."""
        self._now = max(self._now, clock)

    def collectors(self) -> Iterator[BatchCollector]:
        """Yield everything that waits, by group."""
        for tenant in self.tenants.values():
            yield from tenant.collectors.values()

    def next_due(self, after: float) -> float | None:
        """Return when, after a time, a batch that waits for more tasks will wait no longer.

        One that was due before waits for resources, and no time will give it those.
        """
        due = (collector.due_at() for collector in self.collectors() if collector.group.policy is not None)
        return min((at for at in due if at > after), default=None)

    def _remember(self, name: str, clock: float) -> None:
        # Only a caller that is ahead must not be forgotten: it would come back with its clock set back.
        if clock > self._now:
            self._clocks[name] = clock
        if len(self._clocks) > self._max_clocks:
            self._clocks = {n: c for n, c in self._clocks.items() if c > self._now}
            self._max_clocks = max(MAX_CLOCKS, 2 * len(self._clocks))


class Turns:
    """The order in which groups are tried in one round of placing."""

    def __init__(self, queue: Queue, now: float) -> None:
        self._queue = queue
        self._now = now
        self._numbers = 0
        self._tenants: list[tuple[float, int, Tenant]] = []
        self._groups: dict[str, list[tuple[tuple[int, float, int], int, BatchCollector]]] = {}
        for tenant in queue.tenants.values():
            self._groups[tenant.name] = []
            for collector in tenant.collectors.values():
                self._offer(tenant, collector)
            self._line_up(tenant)

    def next(self) -> BatchCollector | None:
        """Return the group whose turn it is; say afterwards what became of it, by `served` or `passed`."""
        if not self._tenants:
            return None
        _, _, tenant = self._tenants[0]
        return self._groups[tenant.name][0][2]

    def served(self) -> None:
        """Note that the group whose turn it was had a batch placed."""
        clock, collector = self._leave()
        self._queue.serve(clock)
        tenant = self._queue.tenants.get(collector.group.tenant)
        if tenant is not None:
            if collector.count:
                self._offer(tenant, collector)
            self._line_up(tenant)

    def passed(self) -> None:
        """Note that the group whose turn it was could not be placed in this round."""
        _, collector = self._leave()
        self._line_up(self._queue.tenants[collector.group.tenant])

    def _leave(self) -> tuple[float, BatchCollector]:
        clock, _, tenant = heapq.heappop(self._tenants)
        return clock, heapq.heappop(self._groups[tenant.name])[2]

    def _offer(self, tenant: Tenant, collector: BatchCollector) -> None:
        head = collector.head()
        if head is not None and collector.due_at() <= self._now:
            self._numbers += 1
            heapq.heappush(self._groups[tenant.name], ((*head.rank, head.ticket), self._numbers, collector))

    def _line_up(self, tenant: Tenant) -> None:
        if self._groups[tenant.name]:
            self._numbers += 1
            heapq.heappush(self._tenants, (tenant.clock, self._numbers, tenant))
