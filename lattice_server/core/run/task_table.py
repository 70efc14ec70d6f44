"""Owns the records of a run's tasks. Rule: a state changes only here, with the counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lattice_server.core.messages import Split
from lattice_server.core.model import Failure, Outputs, TaskSpec
from lattice_server.core.run.dag import Dag
from lattice_server.core.states import TASK_TERMINAL, TASK_TRANSITIONS, TaskState, transition
from lattice_server.core.steps import Steps, stepwise


@dataclass(slots=True, eq=False)
class TaskRecord:
    """One task of the run. Times are monotonic seconds.

    `queued_at` is when it could start for the first time, `first_started_at` when its first attempt started. Its
    function ran for `duration_s` in the attempt that succeeded.

    `missing` counts the predecessors that the task still waits for. `is_promised` tells that it was sent to the
    scheduler while it waited for the last one. `cancelled` is why it was asked to end.

    A mapped task does not run itself: once its list is known, its `items` run, and `open_items` counts the items that
    have not ended. `item_of` is the mapped task of an item, `spawned_by` the task that added this one. A task that
    `is_called` was added to be waited for: its failure is that task's to handle. `calls` are the tasks that it called.

    `is_reused` tells that its outputs are those of the run that this one retries.
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
    is_called: bool = False
    calls: tuple[str, ...] = ()
    depth: int = 0
    duration_s: float | None = None
    is_reused: bool = False

    @property
    def is_with_scheduler(self) -> bool:
        """Whether the scheduler has the task and will report its end."""
        if self.spec.over:
            return False
        return self.state in WITH_SCHEDULER or (self.is_promised and self.state is TaskState.BLOCKED)


WITH_SCHEDULER = frozenset({TaskState.QUEUED, TaskState.RUNNING})


@dataclass(slots=True, eq=False)
class TaskTable:
    """The tasks of one run by id, and how many are in each state. `roots` are the tasks that depend on no other.

    `open_tasks` is how many have not ended.
    """

    run_id: str
    records: dict[str, TaskRecord] = field(default_factory=dict)
    counts: dict[TaskState, int] = field(default_factory=lambda: dict.fromkeys(TaskState, 0))
    roots: list[str] = field(default_factory=list)
    open_tasks: int = 0

    def add(self, record: TaskRecord) -> None:
        """Add a task."""
        self.records[record.spec.task_id] = record
        self.counts[record.state] += 1
        self.open_tasks += record.state not in TASK_TERMINAL

    def extend(self, records: Mapping[str, TaskRecord]) -> None:
        """Add many tasks that are blocked."""
        self.records.update(records)
        self.counts[TaskState.BLOCKED] += len(records)
        self.open_tasks += len(records)

    def move(self, record: TaskRecord, state: TaskState) -> None:
        """Change a task's state. Raises InvalidTransition."""
        self.place(record, transition("task", record.spec.task_id, record.state, state, TASK_TRANSITIONS))

    def place(self, record: TaskRecord, state: TaskState) -> None:
        """Set a task's state without a check of the transition."""
        old, record.state = record.state, state
        self.counts[old] -= 1
        self.counts[state] += 1
        self.open_tasks += (state not in TASK_TERMINAL) - (old not in TASK_TERMINAL)


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
