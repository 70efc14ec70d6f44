"""Owns queued tasks that are alike, and how many of them are placed as one batch.

Rule: a batch never holds more than its size, nor several members whose inputs no message would hold. A task that is not
batched waits in a group too, whose batches have one member.
"""

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from lattice_server.core.model import BatchPolicy, BatchScope, inline_bytes
from lattice_server.core.scheduling.permits import Concurrency
from lattice_server.core.scheduling.placement import Shape
from lattice_server.core.scheduling.work import Task

INFINITY = float("inf")
MAX_BATCH_BYTES = 64 * 1024 * 1024  # What the inputs of a batch that has several members take at most.
SLACK = 64  # How many entries of tasks that left may stay beyond the number of those that wait.


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What tasks of one tenant must share to be in one group: what they need and what they count for; if they are
    batched, also the code, how it is called, and how it is batched. Never the name.

    `run_id` is set for batches within one run. `cohort` is set for what is left of a batch that crashed: its members
    meet again with each other and with no other task, so that the one at fault is found.
    """

    shape: Shape
    concurrency: Concurrency | None
    digest: str = ""
    outputs: tuple[str, ...] = ()
    split_outputs: tuple[str, ...] = ()
    timeout_s: float | None = None
    policy: BatchPolicy | None = None
    run_id: str = ""
    cohort: int = 0


def group_key(task: Task) -> GroupKey | tuple[Shape, Concurrency | None]:
    """Return the key of the group in which a task waits; a plain pair, which is quicker to look up, when it is not
    batched.

    A task that runs alone on its node meets no others in a batch but those with which its batch was halved.
    """
    ready, spec = task.ready, task.ready.spec
    policy = spec.batch
    if policy is None or policy.max_size <= 1 or (task.shape.is_exclusive and not task.cohort):
        return task.shape, task.concurrency
    run_id = ready.run_id if policy.scope is BatchScope.RUN else ""
    call = (spec.function.digest, spec.outputs, ready.split_outputs, spec.attempt_timeout_s)
    return GroupKey(task.shape, task.concurrency, *call, policy, run_id, task.cohort)


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


# A task's stay in a group, by its place and by its time: what orders it, which stay it is, and the task.
_Ordered = tuple[int, float, int, int, Task]
_Dated = tuple[float, int, int, Task]
# A group's place among those of its tenant: the rank and the ticket of the task that leaves first.
Entry = tuple[int, float, int, "TaskGroup"]


@dataclass(slots=True, eq=False)
class TaskGroup:
    """The queued tasks of one tenant and one key, in the order in which they will leave.

    `entry` is the group's place in the order of its tenant while a batch of it may be placed.
    """

    tenant: str
    key: GroupKey
    count: int = 0
    entry: Entry | None = None
    _order: list[_Ordered] = field(default_factory=list)
    _since: list[_Dated] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """All that placement looks at in its tasks."""
        return self.key.shape

    @property
    def concurrency(self) -> Concurrency | None:
        """What its calls count for."""
        return self.key.concurrency

    @property
    def max_size(self) -> int:
        """The most tasks a batch of this group may hold."""
        return 1 if self.key.policy is None else self.key.policy.max_size

    def add(self, task: Task, now: float) -> None:
        """Let a task wait here."""
        # A task that comes back finds entries of its last stay, which must not count again.
        task.entry += 1
        task.group, task.waiting_since = self, now
        self.count += 1
        heapq.heappush(self._order, (*task.rank, task.ticket, task.entry, task))
        if self.key.policy is not None:
            heapq.heappush(self._since, (now, task.ticket, task.entry, task))

    def remove(self, task: Task) -> None:
        """Let a task wait no longer."""
        assert task.group is self
        task.group = None
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

    def due_at(self) -> float:
        """Return when the next batch may leave: at once when it is full, or when its first task waited long enough."""
        if self.count == 0:
            return INFINITY
        if self.key.policy is None or self.key.cohort or self.count >= self.max_size:
            return -INFINITY
        since = self._since
        while not self._holds(since[0]):
            heapq.heappop(since)
        return since[0][0] + self.key.policy.max_wait_s

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
        return task.group is self and task.entry == entry[-2]
