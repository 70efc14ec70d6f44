"""Owns every event and every effect that crosses between threads. Rule: events are past tense, effects imperative."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from lattice_server.core.model import (
    Artifact,
    Binding,
    Capacity,
    Failure,
    Function,
    Isolation,
    Outputs,
    Payload,
    Resources,
    Runtime,
    TaskSpec,
)
from lattice_server.core.run.questions import AnswerQuestion, AttemptAsked, QuestionAsked
from lattice_server.core.scheduling.nodes import Node, NodeView
from lattice_server.core.states import RunState

Split = Mapping[str, Sequence[Payload]]

# What happens to tasks, told by the scheduler to the orchestrator.


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """An attempt started on a worker, at `at` if that is not now."""

    run_id: str
    task_id: str
    attempt: int
    node_id: str
    node_ip: str
    gpu_indices: tuple[int, ...]
    at: float | None = None


@dataclass(frozen=True, slots=True)
class TaskSucceeded:
    """A task ended well, at `at` if that is not now, after its function ran for `duration_s` seconds. `split` holds the
    outputs others map over, item by item."""

    run_id: str
    task_id: str
    attempt: int
    outputs: Outputs
    split: Split = field(default_factory=dict)
    duration_s: float = 0.0
    at: float | None = None


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
    """A task ended in a failure, at `at` if that is not now."""

    run_id: str
    task_id: str
    attempt: int
    failure: Failure
    at: float | None = None


@dataclass(frozen=True, slots=True)
class TaskCancelled:
    """A task was cancelled, and nothing of it runs any more."""

    run_id: str
    task_id: str
    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class TaskSkipped:
    """A task will never start; without a failure, because its condition, or that of one it needs, was not met."""

    run_id: str
    task_id: str
    failure: Failure | None


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


@dataclass(frozen=True, slots=True)
class TasksSpawned:
    """A task added others to its run while it ran."""

    run_id: str
    task_id: str
    tasks: tuple[TaskSpec, ...]


TaskEvent = TaskStarted | TaskSucceeded | TaskRetrying | TaskFailed | TaskCancelled | TaskSkipped | TaskLogged

# What happens to runs, besides what happens to their tasks.


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run was accepted."""

    workflow_id: str
    task_count: int


@dataclass(frozen=True, slots=True)
class TasksAdded:
    """The run grew: by the items of the mapped task `parent_task_id`, by what that task spawned, or, when it is empty,
    by a caller."""

    task_ids: tuple[str, ...]
    parent_task_id: str
    revision: int


@dataclass(frozen=True, slots=True)
class RunCancelling:
    """Nothing new of the run starts."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run ended; always its last fact."""

    state: RunState
    failure: Failure | None


Fact = RunStarted | TasksAdded | RunCancelling | RunFinished | TaskEvent


@dataclass(frozen=True, slots=True)
class RunEvent:
    """A numbered public fact; `time_s` is wall time in seconds since the epoch."""

    sequence: int
    time_s: float
    fact: Fact


# What the orchestrator wants of the scheduler.


@dataclass(frozen=True, slots=True)
class TaskReady:
    """A task's inputs are all there, or will be once task `after` of its run succeeds and gives its outputs.

    `tenant` is the caller that fair share counts. Among the tasks of one caller higher `priority` goes first, then
    lower `rank`, then the one handed over earlier. `split_outputs` names the outputs others map over.
    """

    run_id: str
    spec: TaskSpec
    inputs: Mapping[str, Binding]
    priority: int
    after: str = ""
    tenant: str = ""
    rank: float = 0.0
    split_outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Tasks handed over earlier must end."""

    run_id: str
    task_ids: tuple[str, ...]
    failure: Failure


@dataclass(frozen=True, slots=True)
class ExplainRequested:
    """Somebody asks why a task waits; `TaskExplained` answers."""

    request_id: int
    run_id: str
    task_id: str


@dataclass(frozen=True, slots=True)
class NodesRequested:
    """Somebody asks what the ledger holds; `NodesDescribed` answers."""

    request_id: int


# What workers say.


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """A worker introduced itself. One that names `entrypoints` runs those only, one that names none runs Python.

    `greeting` names this hello among all; the welcome that answers it carries it back.
    """

    worker_id: str
    node_id: str
    session_id: str
    held_lease_ids: tuple[str, ...]
    hostname: str
    node_ip: str
    capacity: Capacity
    labels: Mapping[str, str]
    isolations: frozenset[Isolation]
    runtime: Runtime
    pid: int
    entrypoints: frozenset[str] = frozenset()
    greeting: int = 0


@dataclass(frozen=True, slots=True)
class WorkerDetached:
    """A session's stream broke, or nothing came on it for `silent_s` seconds."""

    session_id: str
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerHeartbeat:
    """A worker said which leases it holds, of those assigned to its session up to number `assignment_sequence`."""

    session_id: str
    held_lease_ids: frozenset[str]
    assignment_sequence: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is known to be gone."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """A node must take nothing new; what still runs there in `deadline_s` seconds goes elsewhere."""

    node_id: str
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """An attempt of a lease started; at `at` as far as can be told of another clock."""

    session_id: str
    lease_id: str
    item: int
    at: float | None = None


@dataclass(frozen=True, slots=True)
class AttemptSucceeded:
    """An attempt of a lease ended well after `duration_s` seconds. See `TaskSucceeded` for `split` and `AttemptStarted`
    for `at`."""

    session_id: str
    lease_id: str
    item: int
    outputs: Outputs
    duration_s: float
    split: Split = field(default_factory=dict)
    at: float | None = None


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt of a lease ended in a failure after `duration_s` seconds; see `AttemptStarted` for `at`."""

    session_id: str
    lease_id: str
    item: int
    failure: Failure
    duration_s: float = 0.0
    at: float | None = None


@dataclass(frozen=True, slots=True)
class AttemptSpawned:
    """An attempt of a lease wants more tasks in its run; `refusal` says why what it sent cannot be taken."""

    session_id: str
    lease_id: str
    item: int
    tasks: tuple[TaskSpec, ...]
    refusal: Failure | None = None


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
    """A worker will not end a lease, through no fault of its members. One whose start was not reported never began."""

    session_id: str
    lease_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ArtifactsReported:
    """What workers said before this named these artifacts. `SettleArtifacts` comes when all that follows has."""

    artifacts: tuple[Artifact, ...]


SchedulerEvent = (
    TaskReady
    | CancelRequested
    | ExplainRequested
    | NodesRequested
    | WorkerHello
    | WorkerDetached
    | WorkerHeartbeat
    | WorkerLost
    | DrainRequested
    | AttemptStarted
    | AttemptSucceeded
    | AttemptFailed
    | AttemptLogged
    | AttemptSpawned
    | AttemptAsked
    | ArtifactsReported
    | LeaseReturned
)

# What the scheduler wants of workers.


@dataclass(frozen=True, slots=True)
class AttemptInputs:
    """One member of a lease: which attempt it is, and its inputs."""

    run_id: str
    task_id: str
    attempt: int
    inputs: Mapping[str, Binding]


@dataclass(frozen=True, slots=True)
class Assign:
    """Send a lease to a worker; `sequence` rises from 1 in its session."""

    session_id: str
    lease_id: str
    sequence: int
    slot: int
    tenant: str
    function: Function
    attempts: tuple[AttemptInputs, ...]
    is_batched: bool
    outputs: tuple[str, ...]
    split_outputs: tuple[str, ...]
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
    """Answer a hello; `resumed` tells whether the session goes on. What the hello said of artifacts is judged last, by
    who knows them."""

    worker_id: str
    session_id: str
    resumed: bool
    drop_lease_ids: tuple[str, ...]
    greeting: int = 0
    drop_artifact_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """Tell a worker that nothing more will come, and how long what it holds may still run."""

    session_id: str
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class ForgetSession:
    """A session was lost: nothing more is sent to it, and nothing it says counts."""

    session_id: str


@dataclass(frozen=True, slots=True)
class SendArtifact:
    """Have a worker upload an artifact of its node, from a byte on, as the transfer of this name."""

    session_id: str
    transfer_id: str
    artifact_id: str
    offset: int


@dataclass(frozen=True, slots=True)
class DropArtifact:
    """Tell a worker that nobody needs an artifact any more."""

    session_id: str
    artifact_id: str


@dataclass(frozen=True, slots=True)
class CloseSession:
    """End a session's stream; `reason` is the name of a `CloseReason` without its prefix."""

    session_id: str
    reason: str
    message: str


# What the scheduler answers, or tells about the cluster.


class ReasonKind(Enum):
    """The class of a reason to wait."""

    INPUT = "input"  # Another task has to succeed first.
    TURN = "turn"  # Others go first: by priority, by age, or because their caller had less.
    RESOURCES = "resources"  # A node does not have free what it needs.
    NODES = "nodes"  # There is no node.
    LIMIT = "limit"  # As many calls run as a limit allows.
    BATCH = "batch"  # Its batch waits for more tasks.
    RETRY = "retry"  # An attempt failed and the next one may not start yet.
    RUNNING = "running"  # It does not wait: a worker runs it.
    ENDED = "ended"  # It does not wait: it has ended.


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason why a task waits, for people and, where it applies, by name and number."""

    kind: ReasonKind
    message: str
    task_id: str = ""
    node_id: str = ""
    resource: str = ""
    wanted: float = 0.0
    free: float = 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a task is where it is: for `waited_s` seconds, and for a guessed `start_in_s` more when that can be told."""

    reasons: tuple[Reason, ...]
    waited_s: float
    start_in_s: float | None


@dataclass(frozen=True, slots=True)
class TaskExplained:
    """Answers `ExplainRequested`; None when the scheduler does not have the task."""

    request_id: int
    explanation: Explanation | None


@dataclass(frozen=True, slots=True)
class NodesDescribed:
    """Answers `NodesRequested`, with how many tasks wait and how many attempts workers hold."""

    request_id: int
    nodes: tuple[NodeView, ...]
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class NodesChanged:
    """These nodes are here or may come back, as they are when nothing runs on them."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class SettleArtifacts:
    """What named these artifacts has been decided on: those that no run keeps by now are nobody's."""

    artifacts: tuple[Artifact, ...]


Answer = TaskExplained | NodesDescribed

ToSession = Assign | StopLease | RevokeLease | DrainWorker | SendArtifact | DropArtifact | CloseSession | AnswerQuestion
WorkerEffect = WelcomeWorker | ForgetSession | ToSession
SchedulerEffect = (
    TaskEvent | TaskReturned | TasksSpawned | QuestionAsked | WorkerEffect | Answer | NodesChanged | SettleArtifacts
)
