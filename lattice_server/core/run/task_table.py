"""Owns what a run knows of its tasks. Rule: a state changes only by `TaskTable.move`, which keeps the counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lattice_server.core.messages import Split
from lattice_server.core.model import Failure, Outputs, TaskSpec
from lattice_server.core.run.dag import Dag
from lattice_server.core.states import TASK_TRANSITIONS, InvalidTransition, TaskState
from lattice_server.core.steps import Steps, stepwise


@dataclass(slots=True, eq=False)
class TaskRecord:
    """One task of the run. Times are monotonic seconds.

    `queued_at` is when it could start for the first time, `first_started_at` when its first attempt started. Its
    function ran for `duration_s` in the attempt that succeeded.

    `missing` counts predecessors that have neither succeeded nor turned out to be dispensable. `is_promised` tells that
    the task was handed over while it waited for the last of them. `cancelled` is why it was asked to end.

    A mapped task never runs itself: once its list is known, `items` are the tasks that do, and `open_items` counts
    those that have not ended. `item_of` names the mapped task an item belongs to, `spawned_by` the task that added it.

    `is_taken_over` tells that its outputs are those of the run that this one retries.
    """

    spec: TaskSpec
    missing: int
    state: TaskState = TaskState.BLOCKED
    attempt: int = 0
    node_id: str = ""
    outputs: Outputs | None = None
    split: Split | None = None
    failure: Failure | None = None
    queued_at: float | None = None
    first_started_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    is_promised: bool = False
    cancelled: Failure | None = None
    items: list[str] | None = None
    open_items: int = 0
    item_of: str = ""
    spawned_by: str = ""
    depth: int = 0
    duration_s: float | None = None
    is_taken_over: bool = False

    @property
    def is_with_scheduler(self) -> bool:
        """Whether the scheduler has the task, and will say how it ends."""
        if self.spec.over:
            return False
        return self.state in WITH_SCHEDULER or (self.is_promised and self.state is TaskState.BLOCKED)


WITH_SCHEDULER = frozenset({TaskState.QUEUED, TaskState.RUNNING})


@dataclass(slots=True, eq=False)
class TaskTable:
    """The tasks of one run by id, and how many are in which state. `roots` are those that come after no task."""

    run_id: str
    records: dict[str, TaskRecord] = field(default_factory=dict)
    counts: dict[TaskState, int] = field(default_factory=lambda: dict.fromkeys(TaskState, 0))
    roots: list[str] = field(default_factory=list)

    def add(self, record: TaskRecord) -> None:
        """Add a task."""
        self.records[record.spec.task_id] = record
        self.counts[record.state] += 1

    def extend(self, records: Mapping[str, TaskRecord]) -> None:
        """Add many tasks that are blocked."""
        self.records.update(records)
        self.counts[TaskState.BLOCKED] += len(records)

    def move(self, record: TaskRecord, state: TaskState) -> None:
        """Change a task's state. Raises InvalidTransition when the table does not allow it."""
        if state not in TASK_TRANSITIONS.get(record.state, ()):
            raise InvalidTransition(f"task {record.spec.task_id} of run {self.run_id}", record.state, state)
        self.counts[record.state] -= 1
        self.counts[state] += 1
        record.state = state

    def is_done(self) -> bool:
        """Whether every task has ended."""
        counts = self.counts
        return not (counts[TaskState.BLOCKED] or counts[TaskState.QUEUED] or counts[TaskState.RUNNING])


def tabulating(run_id: str, dag: Dag) -> Steps[TaskTable]:
    """Return the tasks of a run that has not started, in steps."""
    table = TaskTable(run_id)
    for (task_id, task), is_step in stepwise(dag.tasks.items()):
        missing = len(dag.predecessors[task_id])
        table.add(TaskRecord(task, missing))
        if not missing:
            table.roots.append(task_id)
        if is_step:
            yield
    return table
