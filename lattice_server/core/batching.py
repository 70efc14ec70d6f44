"""Owns what waits in one line, and how much of it leaves at once. Rule: a batch never holds more than its size,
nor several members whose inputs no message would hold.

A task that is not batched stands in a line too, whose batches have one member.
"""

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from lattice_server.core.attempts import Task
from lattice_server.core.model import BatchPolicy, BatchScope, inline_bytes
from lattice_server.core.placement import Shape

INFINITY = float("inf")
MAX_BATCH_BYTES = 64 * 1024 * 1024  # What the inputs of a batch that has several members take at most.
SLACK = 64  # How many entries of tasks that left may stay beyond the number of those that wait.


@dataclass(frozen=True, slots=True)
class Group:
    """What tasks must share to meet in one batch: the caller, the code and how it is called, what they need, and how
    they are batched. Never the name.

    `run_id` is set for batches within one run. `cohort` is set for what is left of a batch that crashed: its members
    meet again with each other and with nobody else, so that the one at fault is found.
    """

    tenant: str
    shape: Shape
    digest: str = ""
    outputs: tuple[str, ...] = ()
    split_outputs: tuple[str, ...] = ()
    timeout_s: float | None = None
    policy: BatchPolicy | None = None
    run_id: str = ""
    cohort: int = 0


def line_of(task: Task) -> Group | Shape:
    """Return what tells the line in which a task waits: its group, or its shape alone when it is not batched.

    A task that runs alone on its node meets no others in a batch but those with which its batch was halved.
    """
    ready, spec = task.ready, task.ready.spec
    policy = spec.batch
    if policy is None or policy.max_size <= 1 or (task.shape.is_exclusive and not task.cohort):
        return task.shape
    run_id = ready.run_id if policy.scope is BatchScope.RUN else ""
    call = (spec.function.digest, spec.outputs, ready.split_outputs, spec.attempt_timeout_s)
    return Group(ready.tenant, task.shape, *call, policy, run_id, task.cohort)


class Stage(Enum):
    """How far a line has come that waits for resources; what does not hold any more puts it back to the first."""

    OPEN = "open"  # Is tried in every round.
    ALIKE = "alike"  # Is tried until one of its very shape could not start.
    WAITING = "waiting"  # It could not start; is tried while its kind can, limits aside.
    PASSED = "passed"  # The same, and others were placed since.
    RIPE = "ripe"  # The same, for so long that a node may be kept for it.
    LIMITED = "limited"  # Its limit is reached; is tried until one of the same limit could not start for that.
    HELD = "held"  # The same, and no other has that limit; is not tried until a call of it starts or ends.


class Lane(NamedTuple):
    """What lines of one caller share that are passed over together. `shape` is without its limit but for `ALIKE`."""

    stage: Stage
    shape: Shape | None = None
    limit_key: str = ""


OPEN = Lane(Stage.OPEN)
HELD = Lane(Stage.HELD)


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


# A task's stay in a line, by its place and by its time: what orders it, which stay it is, and the task.
_Ordered = tuple[int, float, int, int, Task]
_Dated = tuple[float, int, int, Task]
# A line's place among those of its caller: the rank and the ticket of the task that leaves first.
Entry = tuple[int, float, int, "BatchCollector"]


@dataclass(slots=True, eq=False)
class BatchCollector:
    """The tasks of one group that wait, in the order they will leave.

    `blocked_since` is when its first batch last began to wait for resources only; `was_passed` tells that others, later
    in turn or earlier only by their rank, were placed since. `entry` and `lane` are where the queue has it while a
    batch may leave, `noted_due` when it has it down for being due.
    """

    group: Group
    count: int = 0
    blocked_since: float | None = None
    was_passed: bool = False
    entry: Entry | None = None
    lane: Lane = OPEN
    noted_due: float | None = None
    _order: list[_Ordered] = field(default_factory=list)
    _since: list[_Dated] = field(default_factory=list)

    @property
    def max_size(self) -> int:
        """The most tasks a batch of this group may hold."""
        return 1 if self.group.policy is None else self.group.policy.max_size

    def add(self, task: Task, now: float) -> None:
        """Let a task wait here."""
        # A task that comes back finds entries of its last stay, which must not count again.
        task.entry += 1
        task.collector, task.waiting_since = self, now
        self.count += 1
        heapq.heappush(self._order, (*task.rank, task.ticket, task.entry, task))
        if self.group.policy is not None:
            heapq.heappush(self._since, (now, task.ticket, task.entry, task))

    def remove(self, task: Task) -> None:
        """Let a task wait no longer."""
        assert task.collector is self
        task.collector = None
        self.count -= 1
        if len(self._order) > 2 * self.count + SLACK:
            self._order = [entry for entry in self._order if self._holds(entry)]
            heapq.heapify(self._order)
        if len(self._since) > 2 * self.count + SLACK:
            self._since = [entry for entry in self._since if self._holds(entry)]
            heapq.heapify(self._since)

    def head(self) -> Task | None:
        """Return the task that leaves first."""
        order = self._order
        while order and not self._holds(order[0]):
            heapq.heappop(order)
        return order[0][-1] if order else None

    def priority(self) -> int:
        """Return the priority of the task that leaves first; zero when there is none."""
        head = self.head()
        return 0 if head is None else head.ready.priority

    def due_at(self) -> float:
        """Return when the next batch may leave: at once when it is full, or when its first task waited long enough."""
        if self.count == 0:
            return INFINITY
        if self.group.policy is None or self.group.cohort or self.count >= self.max_size:
            return -INFINITY
        since = self._since
        while not self._holds(since[0]):
            heapq.heappop(since)
        return since[0][0] + self.group.policy.max_wait_s

    def next_batch(self) -> list[Task]:
        """Return the tasks that would leave next, and let them wait on."""
        if self.max_size == 1:
            head = self.head()
            return [] if head is None else [head]
        found: list[_Ordered] = []
        size = 0
        while self._order and len(found) < self.max_size and size <= MAX_BATCH_BYTES:
            entry = heapq.heappop(self._order)
            if self._holds(entry):
                found.append(entry)
                size += sum(map(inline_bytes, entry[-1].inputs.values()))
        for entry in found:
            heapq.heappush(self._order, entry)
        if size > MAX_BATCH_BYTES and len(found) > 1:
            found.pop()
        return [entry[-1] for entry in found]

    def tasks(self) -> list[Task]:
        """Return all that wait, in no order."""
        return [entry[-1] for entry in self._order if self._holds(entry)]

    def _holds(self, entry: _Ordered | _Dated) -> bool:
        task = entry[-1]
        return task.collector is self and task.entry == entry[-2]
