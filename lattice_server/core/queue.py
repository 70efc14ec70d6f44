"""Owns who is next: fair between callers, by priority and age within one. Rule: whoever has had least goes first."""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lattice_server.core.attempts import Task
from lattice_server.core.batching import BatchCollector, Group, line_of
from lattice_server.core.clocks import Clocks
from lattice_server.core.placement import Shape


@dataclass(slots=True, eq=False)
class Tenant:
    """One caller that waits, and what it has waiting by line."""

    name: str
    collectors: dict[Group | Shape, BatchCollector] = field(default_factory=dict)


class Queue:
    """All that waits for resources. `shapes` counts the lines of each shape."""

    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}
        self.shapes: Counter[Shape] = Counter()
        self.clocks = Clocks()

    def push(self, task: Task, now: float) -> None:
        """Let a task wait."""
        name = task.ready.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            if not self.tenants:
                self.clocks.level(now)
            self.clocks.come(name, now)
            tenant = self.tenants[name] = Tenant(name)
        line = line_of(task)
        collector = tenant.collectors.get(line)
        if collector is None:
            group = line if isinstance(line, Group) else Group(name, line)
            collector = tenant.collectors[line] = BatchCollector(group)
            self.shapes[group.shape] += 1
        collector.add(task, now)

    def discard(self, task: Task) -> None:
        """Let a task wait no longer."""
        collector = task.collector
        if collector is None:
            return
        collector.remove(task)
        if collector.count == 0:
            tenant = self.tenants[collector.group.tenant]
            del tenant.collectors[line_of(task)]
            self.shapes[task.shape] -= 1
            if not self.shapes[task.shape]:
                del self.shapes[task.shape]
            if not tenant.collectors:
                del self.tenants[tenant.name]

    def turns(self, now: float) -> "Turns":
        """Return the turns of one round of placing."""
        return Turns(self, now)

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
        collector = self._leave()
        self._queue.clocks.serve(collector.group.tenant, self._now)
        tenant = self._queue.tenants.get(collector.group.tenant)
        if tenant is not None:
            if collector.count:
                self._offer(tenant, collector)
            self._line_up(tenant)

    def passed(self) -> None:
        """Note that the group whose turn it was could not be placed in this round."""
        self._line_up(self._queue.tenants[self._leave().group.tenant])

    def _leave(self) -> BatchCollector:
        _, _, tenant = heapq.heappop(self._tenants)
        return heapq.heappop(self._groups[tenant.name])[2]

    def _offer(self, tenant: Tenant, collector: BatchCollector) -> None:
        head = collector.head()
        if head is not None and collector.due_at() <= self._now:
            self._numbers += 1
            heapq.heappush(self._groups[tenant.name], ((*head.rank, head.ticket), self._numbers, collector))

    def _line_up(self, tenant: Tenant) -> None:
        if self._groups[tenant.name]:
            self._numbers += 1
            turn = self._queue.clocks.turn(tenant.name, self._now)
            heapq.heappush(self._tenants, (turn, self._numbers, tenant))
