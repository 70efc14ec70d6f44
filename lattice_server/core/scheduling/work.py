"""Owns what the scheduler knows of a task handed over, and of a lease in the hands of a worker."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zlib import crc32

from lattice_server.core.messages import TaskReady
from lattice_server.core.model import Binding, Failure
from lattice_server.core.scheduling.nodes import Slot
from lattice_server.core.scheduling.permits import Concurrency
from lattice_server.core.scheduling.placement import Shape

if TYPE_CHECKING:
    from lattice_server.core.scheduling.batching import TaskGroup


@dataclass(slots=True, eq=False)
class Task:
    """One task handed over.

    `rank` and then `ticket` order it among its equals; both stay with it over retries. `follows` is the task it still
    waits for, and `inputs` refer to that one's outputs until it succeeds. `concurrency` is what its calls count for.
    `group` is where it waits, `entry` which of its stays in a group is the present one. `lease_id` is set while a
    worker holds it. `attempt` is the number of its newest attempt. `losses` counts the workers lost under it when
    nothing else was on them. `cohort` names what is left of a batch that crashed. `ending` is why it must end,
    `is_over` that it has.
    """

    ready: TaskReady
    shape: Shape
    concurrency: Concurrency | None
    ticket: int
    inputs: Mapping[str, Binding]
    admitted_at: float
    follows: "Task | None" = None
    followers: "dict[int, Task]" = field(default_factory=dict)
    group: "TaskGroup | None" = None
    entry: int = 0
    waiting_since: float = 0.0
    retry_at: float | None = None
    lease_id: str = ""
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    cohort: int = 0
    ending: Failure | None = None
    is_over: bool = False

    @property
    def rank(self) -> tuple[int, float]:
        """What orders it among the tasks of its caller: lower goes first."""
        return (-self.ready.priority, self.ready.rank)

    @property
    def named(self) -> tuple[str, str, int]:
        """Its run, its id, and the number of its newest attempt: how effects name it."""
        return self.ready.run_id, self.ready.spec.task_id, self.attempt

    def jitter(self) -> float:
        """Return a factor from a half to one, different for each task and attempt and the same when played again."""
        name = f"{self.ready.run_id}/{self.ready.spec.task_id}/{self.attempt}"
        return 0.5 + crc32(name.encode()) / 2**33


@dataclass(slots=True, eq=False)
class Lease:
    """One batch in the hands of a worker. `tasks` are its members by position, `ended` the positions that are over.

    `sent_at` is no later than when it was handed out. `share` is the part of the cluster its caller holds by it while
    it is the first of its slot. `sequence` numbers its last assignment, which was sent again at
    `repeated_at`.
    """

    lease_id: str
    tasks: list[Task]
    slot: Slot
    expected_s: float
    shape: Shape
    tenant: str
    share: float
    sent_at: float
    after_lease_id: str = ""
    started_at: float | None = None
    is_revoked: bool = False
    sequence: int = 0
    repeated_at: float = 0.0
    ended: set[int] = field(default_factory=set)

    def time_of(self, at: float | None, now: float) -> float | None:
        """Return when something told at `now` happened to the lease: at `at`, but while the worker had it. None means
        now."""
        return None if at is None else min(max(at, self.sent_at), now)

    def members(self) -> list[Task]:
        """Return the members that have not ended."""
        if not self.ended:
            return self.tasks
        return [task for item, task in enumerate(self.tasks) if item not in self.ended]

    def member(self, item: int) -> Task | None:
        """Return the member at a position; None when there is none, or when it has ended."""
        return self.tasks[item] if 0 <= item < len(self.tasks) and item not in self.ended else None
