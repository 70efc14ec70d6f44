"""Owns the messages from workers to the scheduler, and from the scheduler to workers."""

from collections.abc import Mapping
from dataclasses import field

from lattice_server.core.environment import NO_ENVIRONMENT, Environment
from lattice_server.core.frozen import frozen
from lattice_server.core.messages.network import NetworkAccess
from lattice_server.core.messages.tasks import AttemptMessage, Split
from lattice_server.core.model import (
    Artifact,
    Binding,
    Failure,
    Function,
    Isolation,
    NodeSpec,
    Outputs,
    Resources,
    TaskSpec,
)


@frozen
class SessionMessage:
    """A message of one session: from the worker that serves it, or to it."""

    session_id: str


@frozen
class LeaseMessage(SessionMessage):
    """A message about one lease of a session."""

    lease_id: str


# From workers.


@frozen
class HeldLease:
    """A started lease of a worker. One that `has_ended` uses nothing; one that waits for called tasks uses no CPUs.

    `waits` are the numbers of its waits and the tasks that they are for.
    """

    lease_id: str
    has_ended: bool = False
    waits: tuple[tuple[int, str], ...] = ()


@frozen(kw_only=True)
class WorkerHello(NodeSpec):
    """A worker connected. It resumes a session if `session_id` names one, and holds these leases of it.

    `greeting` identifies the hello; the welcome that answers it carries the same number. If the session is unknown,
    `held` are the leases that can be adopted.
    """

    session_id: str
    held_lease_ids: tuple[str, ...]
    greeting: int = 0
    held: tuple[HeldLease, ...] = ()


@frozen
class WorkerDetached(SessionMessage):
    """A session's stream broke, or was silent for `silent_s` seconds."""

    silent_s: float = 0.0


@frozen
class WorkerHeartbeat(SessionMessage):
    """A worker holds these leases of the assignments with numbers up to `assignment_sequence`."""

    held_lease_ids: frozenset[str]
    assignment_sequence: int


@frozen
class WorkerLost:
    """A worker's process is known to have ended."""

    worker_id: str
    reason: str


@frozen
class AttemptReport(LeaseMessage):
    """A report about one attempt of a lease; `item` is its position in the batch."""

    item: int


@frozen
class AttemptStarted(AttemptReport):
    """An attempt started. `at` is an estimate in the server's monotonic time; None means now."""

    at: float | None = None


@frozen
class AttemptSucceeded(AttemptReport):
    """An attempt succeeded after `duration_s` seconds; see `TaskSucceeded` for `split`, `AttemptStarted` for `at`."""

    outputs: Outputs
    duration_s: float
    split: Split = field(default_factory=dict)
    at: float | None = None


@frozen
class AttemptFailed(AttemptReport):
    """An attempt failed after `duration_s` seconds; see `AttemptStarted` for `at`."""

    failure: Failure
    duration_s: float = 0.0
    at: float | None = None


@frozen
class AttemptSpawned(AttemptReport):
    """An attempt adds tasks to its run, or calls them. A `refusal` says why its request is invalid."""

    tasks: tuple[TaskSpec, ...]
    refusal: Failure | None = None
    is_called: bool = False


@frozen
class AttemptLogged(AttemptReport):
    """An attempt wrote to its standard output (`is_error` false) or standard error."""

    is_error: bool
    text: str
    is_truncated: bool


@frozen
class AttemptAccessedNetwork(AttemptReport):
    """An attempt connected to a server, or was refused a connection."""

    access: NetworkAccess


@frozen
class LeaseReturned(LeaseMessage):
    """A worker returns a lease unfinished, through no fault of its tasks. Without a report of a start, none began."""

    reason: str


@frozen
class ReportsRead(SessionMessage):
    """Every report of a session up to a number came before this one.

    The scheduler answers with `AcknowledgeReports` after all effects of those reports.
    """

    sequence: int


@frozen
class ArtifactsReported:
    """Reports that a worker sent before this one named these artifacts.

    The scheduler answers with `SettleArtifacts` after all effects of those reports.
    """

    artifacts: tuple[Artifact, ...]


# To workers.


@frozen
class AttemptInputs(AttemptMessage):
    """One member of a lease, and its inputs."""

    inputs: Mapping[str, Binding]


@frozen
class Assign(LeaseMessage):
    """Send a lease to a worker; `sequence` rises from 1 within a session.

    `trace_parents` names the span of each attempt, or nothing for one that is not traced; empty when none is.
    `network` are the servers that a sandbox may connect to.
    """

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
    trace_parents: tuple[str, ...] = ()
    network: tuple[str, ...] = ()
    environment: Environment = NO_ENVIRONMENT


@frozen
class StopLease(LeaseMessage):
    """End a lease, running or not."""


@frozen
class RevokeLease(LeaseMessage):
    """Take a lease back unless it has started."""


@frozen
class WelcomeWorker:
    """Answer a hello; `resumed` tells whether its session continues. The artifact store adds `drop_artifact_ids`.

    A session that is not resumed begins with the leases in `adopted_lease_ids`.
    """

    worker_id: str
    session_id: str
    resumed: bool
    drop_lease_ids: tuple[str, ...]
    greeting: int = 0
    drop_artifact_ids: tuple[str, ...] = ()
    adopted_lease_ids: tuple[str, ...] = ()


@frozen
class AcknowledgeReports(SessionMessage):
    """Acknowledge the reports of a session up to a number, once what follows from them is durable."""

    sequence: int


@frozen
class DrainWorker(SessionMessage):
    """Tell a worker that it gets no further leases, and how many seconds its present ones may still run."""

    deadline_s: float | None


@frozen
class ForgetSession(SessionMessage):
    """A session was lost: send nothing more to it, and ignore its messages."""


@frozen
class SendArtifact(SessionMessage):
    """Have a worker upload an artifact of its node, from a byte offset, as the transfer of this id."""

    transfer_id: str
    artifact_id: str
    offset: int


@frozen
class DropArtifact(SessionMessage):
    """Tell a worker that an artifact is no longer needed."""

    artifact_id: str


@frozen
class CloseSession(SessionMessage):
    """End a session's stream; `reason` is the name of a `CloseReason` without its prefix."""

    reason: str
    message: str


WorkerEvent = (
    WorkerHello
    | WorkerDetached
    | WorkerHeartbeat
    | WorkerLost
    | AttemptStarted
    | AttemptSucceeded
    | AttemptFailed
    | AttemptLogged
    | AttemptAccessedNetwork
    | AttemptSpawned
    | ReportsRead
    | ArtifactsReported
    | LeaseReturned
)
LeaseEffect = Assign | StopLease | RevokeLease
SessionEffect = DrainWorker | SendArtifact | DropArtifact | CloseSession
