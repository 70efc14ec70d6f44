"""Owns what waits in one line, and how much of it leaves at once. Rule: a batch never holds more than its size.

A task that is not batched stands in a line too, whose batches have one member.
"""

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from lattice_server.core.attempts import Task
from lattice_server.core.model import BatchPolicy, BatchScope
from lattice_server.core.placement import Shape

INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class Group:
    """What tasks must share to meet in one batch: the caller, the code, what they need, and how they are batched.

    `run_id` is set for batches within one run. `cohort` is set for what is left of a batch that crashed: its members
    meet again with each other and with nobody else, so that the one at fault is found.
    """

    tenant: str
    shape: Shape
    digest: str = ""
    policy: BatchPolicy | None = None
    run_id: str = ""
    cohort: int = 0


def group_of(task: Task) -> Group:
    """Return the group of a task."""
    ready, spec = task.ready, task.ready.spec
    policy = spec.batch
    if policy is None or policy.max_size <= 1:
        return Group(ready.tenant, task.shape)
    run_id = ready.run_id if policy.scope is BatchScope.RUN else ""
    return Group(ready.tenant, task.shape, spec.function.digest, policy, run_id, task.cohort)


class NameMatch(Enum):
    """How a rule's pattern is compared with a task's name."""

    EXACT = "exact"
    PREFIX = "prefix"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class BatchRule:
    """Says how tasks that can be batched, and whose name fits, are batched, whatever they say themselves."""

    match: NameMatch
    pattern: str
    max_size: int
    max_wait_s: float

    def fits(self, name: str) -> bool:
        """Whether the rule is about a task of this name."""
        match self.match:
            case NameMatch.EXACT:
                return name == self.pattern
            case NameMatch.PREFIX:
                return name.startswith(self.pattern)
            case NameMatch.REGEX:
                return re.fullmatch(self.pattern, name) is not None


def by_rule(name: str, policy: BatchPolicy, rules: Iterable[BatchRule]) -> BatchPolicy:
    """Return the policy of a task that can be batched: by the first rule that fits its name, or else its own."""
    rule = next((rule for rule in rules if rule.fits(name)), None)
    return policy if rule is None else replace(policy, max_size=rule.max_size, max_wait_s=rule.max_wait_s)


@dataclass(slots=True, eq=False)
class BatchCollector:
    """The tasks of one group that wait, in the order they will leave.

    `blocked_since` is when its first batch last began to wait for resources only; `was_passed` tells that others, later
    in turn, were placed since.
    """

    group: Group
    count: int = 0
    blocked_since: float | None = None
    was_passed: bool = False
    _order: list[tuple[int, float, int, Task]] = field(default_factory=list)
    _since: list[tuple[float, int, Task]] = field(default_factory=list)

    @property
    def max_size(self) -> int:
        """The most tasks a batch of this group may hold."""
        return 1 if self.group.policy is None else self.group.policy.max_size

    def add(self, task: Task, now: float) -> None:
        """Let a task wait here."""
        task.collector, task.waiting_since = self, now
        self.count += 1
        heapq.heappush(self._order, (*task.rank, task.ticket, task))
        if self.group.policy is not None:
            heapq.heappush(self._since, (now, task.ticket, task))

    def remove(self, task: Task) -> None:
        """Let a task wait no longer."""
        assert task.collector is self
        task.collector = None
        self.count -= 1

    def head(self) -> Task | None:
        """Return the task that leaves first."""
        order = self._order
        while order and order[0][3].collector is not self:
            heapq.heappop(order)
        return order[0][3] if order else None

    def due_at(self) -> float:
        """Return when the next batch may leave: at once when it is full, or when its first task waited long enough."""
        if self.count == 0:
            return INFINITY
        if self.group.policy is None or self.group.cohort or self.count >= self.max_size:
            return -INFINITY
        since = self._since
        while since[0][2].collector is not self:
            heapq.heappop(since)
        return since[0][0] + self.group.policy.max_wait_s

    def next_batch(self) -> list[Task]:
        """Return the tasks that would leave next, and let them wait on."""
        if self.max_size == 1:
            head = self.head()
            return [] if head is None else [head]
        found: list[Task] = []
        kept: list[tuple[int, float, int, Task]] = []
        while self._order and len(found) < self.max_size:
            entry = heapq.heappop(self._order)
            if entry[3].collector is self:
                found.append(entry[3])
                kept.append(entry)
        for entry in kept:
            heapq.heappush(self._order, entry)
        return found

    def tasks(self) -> list[Task]:
        """Return all that wait, in no order."""
        return [entry[3] for entry in self._order if entry[3].collector is self]
