"""Owns workflows and runs, on the main thread. Rule: a run changes only by what its machine decides."""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import uuid4

from lattice_server.core import dag
from lattice_server.core.dispatch import Effect as DispatchEffect
from lattice_server.core.errors import ConflictError, NotFoundError, UnavailableError
from lattice_server.core.messages import (
    CancelRequested,
    SchedulerEvent,
    TaskCancelled,
    TaskFailed,
    TaskLogged,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Artifact, Function, Payload, WorkflowSpec
from lattice_server.core.run import Effect, Run
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.sessions import Sessions
from lattice_server.engine.store import ArtifactStore
from lattice_server.engine.subscriptions import RunLog

log = logging.getLogger(__name__)

TASK_EVENTS = (
    TaskStarted,
    TaskSucceeded,
    TaskRetrying,
    TaskFailed,
    TaskCancelled,
    TaskSkipped,
    TaskReturned,
    TaskLogged,
)


@dataclass(slots=True)
class RunEntry:
    """A run, its log, and what a caller may ask about it. `fingerprint` tells whether a repeated id means the same;
    `artifacts` are those it keeps in the store, its inputs and its outputs."""

    run: Run
    fingerprint: str
    created_s: float
    labels: Mapping[str, str]
    log: RunLog = field(default_factory=RunLog)
    ended_s: float | None = None
    artifacts: list[Artifact] = field(default_factory=list)
    artifact_bytes: int = 0


@dataclass(slots=True)
class WorkflowEntry:
    """A stored workflow. `definition` is what a caller gets back, opaque here."""

    workflow_id: str
    spec: WorkflowSpec
    functions: dict[str, Function]
    definition: object
    fingerprint: str
    created_s: float
    artifacts: tuple[Artifact, ...] = ()
    revision: int = 1


class Orchestrator:
    """Starts, follows and cancels runs. Every method runs on the main thread's event loop."""

    def __init__(
        self,
        bus: MessageBus,
        sessions: Sessions,
        store: ArtifactStore,
        *,
        retained_runs: int,
        retained_artifact_bytes: int,
    ) -> None:
        self.runs: OrderedDict[str, RunEntry] = OrderedDict()
        self.workflows: OrderedDict[str, WorkflowEntry] = OrderedDict()
        self.is_stopping = False
        self._bus = bus
        self._sessions = sessions
        self._store = store
        self._retained_runs = retained_runs
        self._retained_artifact_bytes = retained_artifact_bytes
        self._ended: OrderedDict[str, RunEntry] = OrderedDict()
        self._ended_artifact_bytes = 0
        self._clock_offset_s = time.time() - time.monotonic()
        bus.subscribe(self.deliver)

    def start_run(
        self,
        run_id: str,
        spec: WorkflowSpec,
        *,
        parameters: Mapping[str, Payload],
        labels: Mapping[str, str],
        priority: int,
        fingerprint: str,
        workflow_id: str = "",
    ) -> tuple[RunEntry, bool]:
        """Start a run, or return the one that has this id and content; the flag tells whether it is new.

        Raises:
            ConflictError: the id was used with other content.
            InvalidError: the graph is not valid.
            UnavailableError: the server is stopping.
        """
        if self.is_stopping:
            raise UnavailableError("SHUTTING_DOWN", "the server is stopping", retry_after_s=1.0)
        existing = self.runs.get(run_id)
        if existing is not None:
            if existing.fingerprint != fingerprint:
                raise ConflictError("RUN_ID_CONFLICT", f"run {run_id!r} exists with other content")
            return existing, False
        graph = dag.build(spec, parameters)
        run = Run(run_id or f"run-{uuid4().hex}", spec, graph, workflow_id, priority)
        entry = RunEntry(run, fingerprint, time.time(), labels)
        self.runs[run.run_id] = entry
        given = [p.content for p in parameters.values() if isinstance(p.content, Artifact)]
        self._keep(entry, [*graph.artifacts, *given])
        self._perform(entry, run.start(parameters, time.monotonic()))
        return entry, True

    def run(self, run_id: str) -> RunEntry:
        """Return a run. Raises NotFoundError."""
        try:
            return self.runs[run_id]
        except KeyError:
            raise NotFoundError("RUN_NOT_FOUND", f"there is no run {run_id!r}", metadata={"run_id": run_id}) from None

    def cancel_run(self, run_id: str, reason: str) -> RunEntry:
        """Cancel a run; one that has ended stays as it is. Raises NotFoundError."""
        entry = self.run(run_id)
        self._perform(entry, entry.run.cancel(reason or "cancelled by the caller", time.monotonic()))
        return entry

    def cancel_task(self, run_id: str, task_id: str) -> RunEntry:
        """Cancel one task. Raises NotFoundError."""
        entry = self.run(run_id)
        if task_id not in entry.run.tasks:
            raise NotFoundError("TASK_NOT_FOUND", f"run {run_id!r} has no task {task_id!r}")
        effects = entry.run.cancel_task(task_id, "cancelled by the caller", time.monotonic())
        self._perform(entry, effects)
        return entry

    def create_workflow(
        self,
        workflow_id: str,
        spec: WorkflowSpec,
        functions: dict[str, Function],
        definition: object,
        fingerprint: str,
    ) -> tuple[WorkflowEntry, bool]:
        """Store a workflow, or return the one that has this id and content. Raises ConflictError, InvalidError."""
        existing = self.workflows.get(workflow_id)
        if existing is not None:
            if existing.fingerprint != fingerprint:
                raise ConflictError("WORKFLOW_ID_CONFLICT", f"workflow {workflow_id!r} exists with other content")
            return existing, False
        graph = dag.build(spec)
        named = workflow_id or f"workflow-{uuid4().hex}"
        entry = WorkflowEntry(named, spec, functions, definition, fingerprint, time.time(), graph.artifacts)
        self._store.hold(entry.artifacts)
        self.workflows[named] = entry
        return entry, True

    def change_workflow(
        self, entry: WorkflowEntry, spec: WorkflowSpec, functions: dict[str, Function], definition: object
    ) -> None:
        """Replace a stored workflow's definition. Raises InvalidError."""
        graph = dag.build(spec)
        self._store.hold(graph.artifacts)
        self._store.release(entry.artifacts)
        entry.spec, entry.functions, entry.artifacts = spec, functions, graph.artifacts
        entry.definition = definition
        entry.revision += 1

    def delete_workflow(self, workflow_id: str) -> None:
        """Forget a stored workflow. Raises NotFoundError."""
        self._store.release(self.workflow(workflow_id).artifacts)
        del self.workflows[workflow_id]

    def workflow(self, workflow_id: str) -> WorkflowEntry:
        """Return a stored workflow. Raises NotFoundError."""
        try:
            return self.workflows[workflow_id]
        except KeyError:
            raise NotFoundError("WORKFLOW_NOT_FOUND", f"there is no workflow {workflow_id!r}") from None

    def wall_time_s(self, monotonic_s: float) -> float:
        """Return the seconds since the epoch of a monotonic time."""
        return monotonic_s + self._clock_offset_s

    def deliver(self, effects: list[DispatchEffect]) -> None:
        """Take what the scheduler decided: facts about tasks go to their runs, the rest to workers."""
        now = time.monotonic()
        posts: list[SchedulerEvent] = []
        for effect in effects:
            if not isinstance(effect, TASK_EVENTS):
                self._sessions.perform(effect)
            elif entry := self.runs.get(effect.run_id):
                try:
                    self._perform(entry, entry.run.handle(effect, now), posts)
                except Exception:
                    # The last resort: a fact that breaks one run's invariants must not stop the others.
                    log.exception("run %s could not take %s", effect.run_id, type(effect).__name__)
        self._bus.post(posts)

    def _perform(self, entry: RunEntry, effects: list[Effect], posts: list[SchedulerEvent] | None = None) -> None:
        own: list[SchedulerEvent] = [] if posts is None else posts
        for effect in effects:
            match effect:
                case TaskReady() | CancelRequested():
                    own.append(effect)
                case _:
                    if isinstance(effect, TaskSucceeded):
                        contents = [payload.content for payload in effect.outputs.values()]
                        self._keep(entry, [content for content in contents if isinstance(content, Artifact)])
                    entry.log.append(effect, time.time())
        if posts is None:
            self._bus.post(own)
        if entry.run.is_terminal and entry.ended_s is None:
            entry.ended_s = time.time()
            self._ended[entry.run.run_id] = entry
            self._ended_artifact_bytes += entry.artifact_bytes
            self._trim()

    def _keep(self, entry: RunEntry, artifacts: list[Artifact]) -> None:
        if artifacts:
            self._store.hold(artifacts)
            entry.artifacts += artifacts
            entry.artifact_bytes += sum(artifact.size_bytes for artifact in artifacts)

    def _trim(self) -> None:
        """Forget the oldest runs over their limit, and the oldest artifacts over theirs, but for the newest run."""
        while len(self._ended) > self._retained_runs:
            run_id, oldest = self._ended.popitem(last=False)
            self._let_go(oldest)
            del self.runs[run_id]
        for entry in list(self._ended.values())[:-1]:
            if self._ended_artifact_bytes <= self._retained_artifact_bytes:
                break
            self._let_go(entry)

    def _let_go(self, entry: RunEntry) -> None:
        self._ended_artifact_bytes -= entry.artifact_bytes
        self._store.release(entry.artifacts)
        entry.artifacts, entry.artifact_bytes = [], 0


def fingerprint(*parts: bytes) -> str:
    """Return a digest of a request's content, to tell a repeated call from another one with the same id."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
