"""Owns every event and every effect that crosses between threads. Rule: events are past tense, effects imperative."""

from collections.abc import Mapping
from dataclasses import dataclass

from lattice_server.core.model import (
    Binding,
    Capacity,
    Failure,
    Function,
    Isolation,
    Outputs,
    Resources,
    TaskSpec,
)
from lattice_server.core.states import RunState

# What happens to tasks, told by the scheduler to the orchestrator.


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """An attempt started on a worker."""

    run_id: str
    task_id: str
    attempt: int
    node_id: str
    node_ip: str
    gpu_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TaskSucceeded:
    """A task ended well."""

    run_id: str
    task_id: str
    attempt: int
    outputs: Outputs


@dataclass(frozen=True, slots=True)
class TaskRetrying:
    """An attempt failed; the next may start `delay_s` seconds later."""

    run_id: str
    task_id: str
    attempt: int
    failure: Failure
    delay_s: float


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task ended in a failure."""

    run_id: str
    task_id: str
    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class TaskCancelled:
    """A task was cancelled, and nothing of it runs any more."""

    run_id: str
    task_id: str
    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class TaskSkipped:
    """A task will never start."""

    run_id: str
    task_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class TaskLogged:
    """A task wrote to its standard output (`is_error` false) or standard error."""

    run_id: str
    task_id: str
    attempt: int
    is_error: bool
    text: str
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class TaskReturned:
    """A task handed over to follow another is back: the other had ended before."""

    run_id: str
    task_id: str


TaskEvent = TaskStarted | TaskSucceeded | TaskRetrying | TaskFailed | TaskCancelled | TaskSkipped | TaskLogged

# What happens to runs, besides what happens to their tasks.


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run was accepted."""

    workflow_id: str
    task_count: int


@dataclass(frozen=True, slots=True)
class RunCancelling:
    """Nothing new of the run starts."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run ended; always its last fact."""

    state: RunState
    failure: Failure | None


Fact = RunStarted | RunCancelling | RunFinished | TaskEvent


@dataclass(frozen=True, slots=True)
class RunEvent:
    """A numbered public fact; `time_s` is wall time in seconds since the epoch."""

    sequence: int
    time_s: float
    fact: Fact


# What the orchestrator wants of the scheduler.


@dataclass(frozen=True, slots=True)
class TaskReady:
    """A task's inputs are all there, or will be once task `after` of its run succeeds and gives its outputs."""

    run_id: str
    spec: TaskSpec
    inputs: Mapping[str, Binding]
    priority: int
    after: str = ""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Tasks handed over earlier must end."""

    run_id: str
    task_ids: tuple[str, ...]
    failure: Failure


# What workers say.


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """A worker introduced itself."""

    worker_id: str
    node_id: str
    session_id: str
    held_lease_ids: tuple[str, ...]
    hostname: str
    node_ip: str
    capacity: Capacity
    labels: Mapping[str, str]
    isolations: frozenset[Isolation]
    runtime: str
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerDetached:
    """A session's stream broke."""

    session_id: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is known to be gone."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """A node must take nothing new."""

    node_id: str


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """An attempt of a lease started."""

    session_id: str
    lease_id: str
    item: int


@dataclass(frozen=True, slots=True)
class AttemptSucceeded:
    """An attempt of a lease ended well after `duration_s` seconds."""

    session_id: str
    lease_id: str
    item: int
    outputs: Outputs
    duration_s: float


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt of a lease ended in a failure."""

    session_id: str
    lease_id: str
    item: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class AttemptLogged:
    """An attempt of a lease wrote to its output."""

    session_id: str
    lease_id: str
    item: int
    is_error: bool
    text: str
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class LeaseReturned:
    """A lease that never started is back."""

    session_id: str
    lease_id: str
    reason: str


SchedulerEvent = (
    TaskReady
    | CancelRequested
    | WorkerHello
    | WorkerDetached
    | WorkerLost
    | DrainRequested
    | AttemptStarted
    | AttemptSucceeded
    | AttemptFailed
    | AttemptLogged
    | LeaseReturned
)

# What the scheduler wants of workers.


@dataclass(frozen=True, slots=True)
class Assign:
    """Send a lease to a worker."""

    session_id: str
    lease_id: str
    slot: int
    function: Function
    run_id: str
    task_id: str
    attempt: int
    inputs: Mapping[str, Binding]
    outputs: tuple[str, ...]
    isolation: Isolation
    resources: Resources
    gpu_indices: tuple[int, ...]
    timeout_s: float | None
    after_lease_id: str = ""


@dataclass(frozen=True, slots=True)
class StopLease:
    """End a lease, running or not."""

    session_id: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class RevokeLease:
    """Take a lease back unless it started."""

    session_id: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class WelcomeWorker:
    """Answer a hello; `resumed` tells whether the session goes on."""

    worker_id: str
    session_id: str
    resumed: bool
    drop_lease_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CloseSession:
    """End a session's stream; `reason` is the name of a `CloseReason` without its prefix."""

    session_id: str
    reason: str
    message: str


WorkerEffect = Assign | StopLease | RevokeLease | WelcomeWorker | CloseSession
