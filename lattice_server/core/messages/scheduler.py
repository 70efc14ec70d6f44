"""Owns the unions of all events that the scheduler takes, and of all effects it returns."""

from lattice_server.core.frozen import frozen
from lattice_server.core.messages.calls import AttemptAwaits, CallEnded, TaskAwaits
from lattice_server.core.messages.queries import Answer, ExplainRequested, NodesRequested
from lattice_server.core.messages.questions import AnswerQuestion, AttemptAsked, QuestionAsked
from lattice_server.core.messages.services import ServiceChanged, ServiceNeeded
from lattice_server.core.messages.streams import AttemptProgressed, AttemptStreamed, TaskProgressed, TaskStreamed
from lattice_server.core.messages.tasks import CancelRequested, TaskEvent, TaskReady, TaskReturned, TasksSpawned
from lattice_server.core.messages.workers import (
    AcknowledgeReports,
    ForgetSession,
    LeaseEffect,
    SessionEffect,
    WelcomeWorker,
    WorkerEvent,
)
from lattice_server.core.model import Artifact, NodeSpec


@frozen
class DrainRequested:
    """A node must get no further leases; its tasks that still run after `deadline_s` seconds are requeued."""

    node_id: str
    deadline_s: float | None = None


@frozen
class RunsRestored:
    """All tasks of the runs that a restart continues were sent; from now on workers say hello."""


@frozen
class NodesChanged:
    """These nodes are connected or may come back."""

    nodes: tuple[NodeSpec, ...]


@frozen
class SettleArtifacts:
    """All effects of the reports that named these artifacts are out: drop the artifacts that no run keeps by now."""

    artifacts: tuple[Artifact, ...]


SchedulerEvent = (
    TaskReady
    | CancelRequested
    | ExplainRequested
    | NodesRequested
    | DrainRequested
    | RunsRestored
    | WorkerEvent
    | AttemptAsked
    | AttemptStreamed
    | AttemptAwaits
    | CallEnded
    | AttemptProgressed
    | ServiceChanged
)
ToSession = LeaseEffect | SessionEffect | AnswerQuestion
WorkerEffect = WelcomeWorker | ForgetSession | ToSession
ToRun = TaskEvent | TaskReturned | TasksSpawned | QuestionAsked | TaskAwaits  # To the machine of a run.
PastRuns = (
    TaskStreamed
    | TaskProgressed
    | WorkerEffect
    | Answer
    | NodesChanged
    | SettleArtifacts
    | ServiceNeeded
    | AcknowledgeReports
)
SchedulerEffect = ToRun | PastRuns
