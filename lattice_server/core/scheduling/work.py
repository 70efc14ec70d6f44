"""Owns tasks that the scheduler has, and the groups in which they are queued.

Rule: a batch has at most the size that its policy allows, and its inputs fit into a message. A task without a batch
policy waits in a group as well, whose batches have one member.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from zlib import crc32

from lattice_server.core.environment import NO_ENVIRONMENT, Environment
from lattice_server.core.frozen import frozen
from lattice_server.core.messages import TaskReady
from lattice_server.core.model import BatchPolicy, BatchScope, Binding, Failure
from lattice_server.core.references import inline_bytes
from lattice_server.core.scheduling.permits import Concurrency
from lattice_server.core.scheduling.placement import Shape

INFINITY = float("inf")
PRIORITY_S = 600.0  # By how much a level of priority lowers the rank; see decision 0021.
MAX_BATCH_BYTES = 64 * 1024 * 1024  # The limit of the inputs of a batch with several members.
SLACK = 64  # How many outdated entries a heap may have beyond the number of queued tasks.


@dataclass(slots=True, eq=False)
class Task:
    """One task that the scheduler has. It is in one place: behind another task, queued, in backoff, or in a lease.

    Tasks are ordered by `rank` and then `ticket`, lowest first; both stay the same over retries. `predecessor` is the
    task it waits for, to whose outputs `inputs` refer until that task succeeds; `dependents` wait for this task.
    `group` is set while it is queued, and `stay` counts how often it was. `retry_at` is set during backoff, `lease_id`
    while a worker has it. `attempt` is the number of its newest attempt. `losses` counts the workers that were lost
    while it was alone on their node. `cohort` identifies the rest of a batch that crashed. `ending` is why it must end,
    `is_over` that it has.
    """

    ready: TaskReady
    shape: Shape
    concurrency: Concurrency | None
    ticket: int
    inputs: Mapping[str, Binding]
    admitted_at: float
    rank: float = field(init=False)
    predecessor: "Task | None" = None
    dependents: "dict[int, Task]" = field(default_factory=dict)
    group: "TaskGroup | None" = None
    stay: int = 0
    waiting_since: float = 0.0
    retry_at: float | None = None
    lease_id: str = ""
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    cohort: int = 0
    ending: Failure | None = None
    is_over: bool = False

    def __post_init__(self) -> None:
        self.rank = self.ready.rank - PRIORITY_S * self.ready.priority

    @property
    def key(self) -> tuple[str, str]:
        """The ids of its run and of itself."""
        return self.ready.run_id, self.ready.spec.task_id

    @property
    def named(self) -> tuple[str, str, int]:
        """The ids of its run and of itself, and the number of its newest attempt."""
        return self.ready.run_id, self.ready.spec.task_id, self.attempt

    def jitter(self) -> float:
        """Return a factor from 0.5 to 1 that depends on the task and the attempt only."""
        name = f"{self.ready.run_id}/{self.ready.spec.task_id}/{self.attempt}"
        return 0.5 + crc32(name.encode()) / 2**33


@frozen
class GroupKey:
    """The properties that the tasks of one group share. The code and the way it is called count only if it is batched.

    `run_id` is set for batches within one run. `cohort` is set for the rest of a batch that crashed: its members are
    batched with each other only, so that the one at fault is found.
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
    environment: Environment = NO_ENVIRONMENT


def group_key(task: Task) -> GroupKey | tuple[Shape, Concurrency | None]:
    """Return the key of the group in which a task waits; a pair, which is quicker to look up, if it is not batched.

    A task that runs alone on its node is batched only with the other members of its cohort.
    """
    ready, spec = task.ready, task.ready.spec
    policy = spec.batch
    if policy is None or policy.max_size <= 1 or (task.shape.is_exclusive and not task.cohort):
        return task.shape, task.concurrency
    run_id = ready.run_id if policy.scope is BatchScope.RUN else ""
    call = (spec.function.digest, spec.outputs, ready.split_outputs, spec.attempt_timeout_s)
    return GroupKey(task.shape, task.concurrency, *call, policy, run_id, task.cohort, ready.environment)


# Entries of heaps: what orders them, the number of the task's stay in the queue, and the task.
_Ordered = tuple[float, int, int, Task]
_Dated = tuple[float, int, int, Task]
# A group's place among those of its tenant: the rank and the ticket of its first task.
Entry = tuple[float, int, "TaskGroup"]


@dataclass(slots=True, eq=False)
class TaskGroup:
    """The queued tasks of one tenant and one key, in order.

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
        """The needs of its tasks."""
        return self.key.shape

    @property
    def concurrency(self) -> Concurrency | None:
        """The concurrency key that its calls count towards."""
        return self.key.concurrency

    @property
    def max_size(self) -> int:
        """The largest size of its batches."""
        return 1 if self.key.policy is None else self.key.policy.max_size

    def add(self, task: Task, now: float) -> None:
        """Queue a task."""
        # Entries of its earlier stays may still be in the heaps.
        task.stay += 1
        task.group, task.waiting_since = self, now
        self.count += 1
        heapq.heappush(self._order, (task.rank, task.ticket, task.stay, task))
        if self.key.policy is not None:
            heapq.heappush(self._since, (now, task.ticket, task.stay, task))

    def remove(self, task: Task) -> None:
        """Remove a task from the queue."""
        assert task.group is self
        task.group = None
        self.count -= 1
        for heap in (self._order, self._since):
            if len(heap) > 2 * self.count + SLACK:
                heap[:] = [entry for entry in heap if self._is_queued(entry)]
                heapq.heapify(heap)

    def head(self) -> Task | None:
        """Return the first task."""
        order = self._order
        while order and not self._is_queued(order[0]):
            heapq.heappop(order)
        return order[0][-1] if order else None

    def due_at(self) -> float:
        """Return when the next batch may be placed: at once if it is full, or when its first task has waited enough."""
        if self.count == 0:
            return INFINITY
        if self.key.policy is None or self.key.cohort or self.count >= self.max_size:
            return -INFINITY
        since = self._since
        while not self._is_queued(since[0]):
            heapq.heappop(since)
        return since[0][0] + self.key.policy.max_wait_s

    def next_batch(self) -> list[Task]:
        """Return the tasks of the next batch, and leave them in the queue."""
        if self.max_size == 1:
            head = self.head()
            return [] if head is None else [head]
        found: list[_Ordered] = []
        size = 0
        while self._order and len(found) < self.max_size and size <= MAX_BATCH_BYTES:
            entry = heapq.heappop(self._order)
            if self._is_queued(entry):
                found.append(entry)
                size += sum(map(inline_bytes, entry[-1].inputs.values()))
        for entry in found:
            heapq.heappush(self._order, entry)
        if size > MAX_BATCH_BYTES and len(found) > 1:
            found.pop()
        return [entry[-1] for entry in found]

    def count_ahead(self, task: Task, most: int) -> int:
        """Return how many tasks go before one of this group; `most` if there are more.

        In a heap, the entries before one form a tree from the root, so that only they and their children are visited.
        """
        order, mine = self._order, (task.rank, task.ticket)
        ahead = visited = 0
        frontier = [0]
        while frontier and visited < 2 * most + SLACK:
            index = frontier.pop()
            if index < len(order) and order[index][:2] < mine:
                visited += 1
                ahead += self._is_queued(order[index])
                frontier += (2 * index + 1, 2 * index + 2)
        return most if frontier else min(ahead, most)

    def tasks(self) -> list[Task]:
        """Return all queued tasks, in no order."""
        return [entry[-1] for entry in self._order if self._is_queued(entry)]

    def _is_queued(self, entry: _Ordered | _Dated) -> bool:
        """Whether the stay of an entry's task has not ended."""
        task = entry[-1]
        return task.group is self and task.stay == entry[-2]
