"""Owns the messages about tasks between the orchestrator, which owns runs, and the scheduler."""

from collections.abc import Mapping, Sequence
from dataclasses import field

from lattice_server.core.environment import NO_ENVIRONMENT, Environment
from lattice_server.core.frozen import frozen
from lattice_server.core.messages.network import NetworkAccess
from lattice_server.core.model import Binding, Failure, Outputs, Payload, TaskSpec

Split = Mapping[str, Sequence[Payload]]


@frozen
class TaskMessage:
    """A message about one task of a run."""

    run_id: str
    task_id: str


@frozen
class AttemptMessage(TaskMessage):
    """A message about one attempt at a task."""

    attempt: int


# From the scheduler to the orchestrator. `at` is the monotonic time of an event that the worker reported later.


@frozen
class TaskStarted(AttemptMessage):
    """An attempt started on a worker, as the member at position `item` of a lease.

    `queued_at` and `sent_at` are the monotonic times when it was queued, and sent to its worker.
    """

    node_id: str
    node_ip: str
    gpu_indices: tuple[int, ...]
    at: float | None = None
    lease_id: str = field(default="", compare=False, repr=False)
    item: int = field(default=0, compare=False, repr=False)
    queued_at: float | None = None
    sent_at: float | None = None


@frozen
class TaskSucceeded(AttemptMessage):
    """A task succeeded after its function ran for `duration_s` seconds.

    `split` holds, item by item, the outputs that other tasks are mapped over.
    """

    outputs: Outputs
    split: Split = field(default_factory=dict)
    duration_s: float = 0.0
    at: float | None = None


@frozen
class TaskRetrying(AttemptMessage):
    """An attempt failed; the next one may start after `delay_s` seconds."""

    failure: Failure
    delay_s: float


@frozen
class TaskFailed(AttemptMessage):
    """A task failed and is not retried."""

    failure: Failure
    at: float | None = None


@frozen
class TaskCancelled(AttemptMessage):
    """A task was cancelled, and no attempt at it runs any more."""

    failure: Failure


@frozen
class TaskSkipped(TaskMessage):
    """A task will never start. Without a failure, a condition was not met: its own, or that of a task it needs."""

    failure: Failure | None


@frozen
class TaskLogged(AttemptMessage):
    """A task wrote to its standard output (`is_error` false) or standard error."""

    is_error: bool
    text: str
    is_truncated: bool


@frozen
class TaskAccessedNetwork(AttemptMessage):
    """An attempt at a task connected to a server, or was refused a connection."""

    access: NetworkAccess


@frozen
class TaskReturned(TaskMessage):
    """The scheduler returns a task that was to run after another one, which has ended already."""


@frozen
class TasksSpawned(TaskMessage):
    """A running task added tasks to its run; with `is_called` it waits for them."""

    tasks: tuple[TaskSpec, ...]
    is_called: bool = False


TaskEnd = TaskSucceeded | TaskFailed | TaskCancelled | TaskSkipped
TaskEvent = TaskStarted | TaskRetrying | TaskEnd | TaskLogged | TaskAccessedNetwork

# From the orchestrator to the scheduler.


@frozen
class AttemptHistory:
    """The attempts at a task so far: their number, and how many of them failed or lost their worker."""

    attempts: int = 0
    failures: int = 0
    losses: int = 0


NO_HISTORY = AttemptHistory()


@frozen
class EarlierLease:
    """A lease by which an earlier life of the server started the newest attempt at a task, as member `item`.

    `started_at` is in monotonic seconds.
    """

    lease_id: str
    item: int
    node_id: str
    gpu_indices: tuple[int, ...]
    started_at: float


@frozen
class TaskReady:
    """A task may start: its inputs are known, or will be once task `after` of its run succeeds.

    Fair share is counted by `tenant`. Among the tasks of one tenant, the one with the lowest `rank` in seconds goes
    first; each level of `priority` takes `work.PRIORITY_S` seconds off. `split_outputs` names the outputs that other
    tasks are mapped over. `history` counts the attempts that an earlier life of the server made; the newest of them may
    still run, by an `earlier` lease. Its time limit counts from `since`; None means now. `environment` has the values
    of its variables. With a `refusal` no attempt of it may start.
    """

    run_id: str
    spec: TaskSpec
    inputs: Mapping[str, Binding]
    priority: int
    after: str = ""
    tenant: str = ""
    rank: float = 0.0
    split_outputs: tuple[str, ...] = ()
    history: AttemptHistory = NO_HISTORY
    environment: Environment = NO_ENVIRONMENT
    refusal: Failure | None = None
    earlier: EarlierLease | None = None
    since: float | None = None


@frozen
class CancelRequested:
    """Tasks that the scheduler has must end."""

    run_id: str
    task_ids: tuple[str, ...]
    failure: Failure
