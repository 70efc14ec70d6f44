"""Owns runs, on the main thread. Rule: a run changes only by what its machine decides."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple, NotRequired, TypedDict, Unpack
from uuid import uuid4

from lattice_server.core import dag
from lattice_server.core.errors import ConflictError, LatticeError, NotFoundError, PreconditionError, UnavailableError
from lattice_server.core.messages import (
    CancelRequested,
    Explanation,
    NodesChanged,
    NodesDescribed,
    RunFinished,
    SchedulerEffect,
    SchedulerEvent,
    SettleArtifacts,
    TaskCancelled,
    TaskEvent,
    TaskExplained,
    TaskFailed,
    TaskLogged,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TaskSkipped,
    TasksSpawned,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Artifact, Failure, FailureKind, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.open_run import HolderEffect
from lattice_server.core.questions import AnswerQuestion, AskHolder, QuestionAsked, WithdrawQuestion
from lattice_server.core.records import TaskTable, tabulating
from lattice_server.core.reuse import Earlier, workflow_of
from lattice_server.core.run import Effect, Run
from lattice_server.core.steps import STEP_ITEMS, Steps, finish
from lattice_server.engine.admission import Admission
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.ended_runs import EndedRuns
from lattice_server.engine.inquiries import Inquiries
from lattice_server.engine.library import expect_revision
from lattice_server.engine.open_runs import TOLD, OpenRuns
from lattice_server.engine.run_entry import Retention, RunEntry
from lattice_server.engine.sessions import Sessions
from lattice_server.engine.slices import Slices
from lattice_server.engine.store import ArtifactStore

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
    TasksSpawned,
    QuestionAsked,
)
ToRun = TaskEvent | TaskReturned | TasksSpawned | QuestionAsked


class StartSettings(TypedDict):
    """How a run is run; see `Run` and `RunEntry`."""

    labels: Mapping[str, str]
    priority: int
    tenant: NotRequired[str]
    workflow_id: NotRequired[str]
    timeout_s: NotRequired[float | None]
    earlier: NotRequired[Earlier | None]
    is_open: NotRequired[bool]


class Prepared(NamedTuple):
    """A run that was checked and has not started."""

    spec: WorkflowSpec
    graph: dag.Dag
    table: TaskTable


class Orchestrator:
    """Starts, follows and cancels runs. Every method runs on the main thread's event loop."""

    def __init__(
        self,
        bus: MessageBus,
        sessions: Sessions,
        store: ArtifactStore,
        retention: Retention,
        admission: Admission,
        open_run_grace_s: float = 30.0,
        slices: Slices | None = None,
    ) -> None:
        self.runs: OrderedDict[str, RunEntry] = OrderedDict()
        self.is_stopping = False
        self._bus = bus
        self._sessions = sessions
        self._store = store
        self.inquiries = Inquiries(bus)
        self._admission = admission
        self._slices = slices or Slices()
        self._numbers = count(1)
        self._ended = EndedRuns(self.runs, store, retention)
        self.open_runs = OpenRuns(open_run_grace_s, self._change, sessions.perform)
        bus.subscribe(self.deliver)

    def start_run(
        self,
        run_id: str,
        spec: WorkflowSpec,
        *,
        parameters: Mapping[str, Payload],
        fingerprint: str,
        **settings: Unpack[StartSettings],
    ) -> tuple[RunEntry, bool]:
        """Start a run, or return the one that has this id and content; the flag tells whether it is new.

        Raises:
            ConflictError: the id was used with other content.
            NotFoundError: the run with this id and content has ended and is no longer kept.
            ExhaustedError: the server has as many open tasks as it may, or the run too many of its own.
            InvalidError: the graph is not valid.
            PreconditionError: no node could ever run one of its tasks.
            UnavailableError: the server is stopping.
        """
        if entry := self.known(run_id, fingerprint):
            return entry, False
        prepared = finish(self._preparing(run_id, spec, parameters))
        return self._begin(prepared, parameters, fingerprint, settings), True

    async def submit(
        self,
        run_id: str,
        spec: WorkflowSpec,
        *,
        parameters: Mapping[str, Payload],
        fingerprint: str,
        **settings: Unpack[StartSettings],
    ) -> tuple[RunEntry, bool]:
        """As `start_run`, in slices: others are served meanwhile."""
        if entry := self.known(run_id, fingerprint):
            return entry, False
        prepared = await self._slices.finish(self._preparing(run_id, spec, parameters))
        # The same request may have come twice.
        if entry := self.known(run_id, fingerprint):
            return entry, False
        return self._begin(prepared, parameters, fingerprint, settings), True

    def known(self, run_id: str, fingerprint: str) -> RunEntry | None:
        """Return the run that has this id and content, if there is one. Raises as `start_run`."""
        if self.is_stopping:
            raise UnavailableError("SHUTTING_DOWN", "the server is stopping", retry_after_s=1.0)
        existing = self.runs.get(run_id)
        if existing is not None:
            if existing.fingerprint != fingerprint:
                raise ConflictError("RUN_ID_CONFLICT", f"run {run_id!r} exists with other content")
            return existing
        if (known := self._ended.fingerprint_of(run_id)) is not None:
            if known != fingerprint:
                raise ConflictError("RUN_ID_CONFLICT", f"run {run_id!r} existed with other content")
            raise self._no_run(run_id)
        return None

    def _preparing(self, run_id: str, spec: WorkflowSpec, parameters: Mapping[str, Payload]) -> Steps[Prepared]:
        self._admission.check_room(len(spec.tasks))
        graph = yield from dag.building(spec, parameters)
        yield from self._admission.checking(spec.tasks)
        table = yield from tabulating(run_id or f"run-{uuid4().hex}", graph)
        return Prepared(spec, graph, table)

    def _begin(
        self, prepared: Prepared, parameters: Mapping[str, Payload], fingerprint: str, settings: StartSettings
    ) -> RunEntry:
        spec, graph, table = prepared
        self._admission.check_room(len(spec.tasks))
        timeout_s = settings.get("timeout_s")
        run = Run(
            table.run_id,
            spec,
            graph,
            settings.get("workflow_id", ""),
            settings["priority"],
            tenant=settings.get("tenant", ""),
            bounds=self._admission.bounds,
            earlier=settings.get("earlier"),
            table=table,
            slice_tasks=STEP_ITEMS,
            is_open=settings.get("is_open", False),
        )
        entry = RunEntry(
            run,
            next(self._numbers),
            fingerprint,
            time.time(),
            settings["labels"],
            sum(p.kept_bytes for p in parameters.values()),
        )
        self.runs[run.run_id] = entry
        given = [p.content for p in parameters.values() if isinstance(p.content, Artifact)]
        self._keep(entry, given)
        if timeout_s is not None:
            entry.timeout_s = timeout_s
            loop = asyncio.get_running_loop()
            entry.expiry = loop.call_later(timeout_s, self._expire, entry, timeout_s)
        if run.is_open:
            self.open_runs.open(entry)
        self._change(entry, lambda: run.start(parameters, time.monotonic()))
        return entry

    async def retry_run(self, run_id: str, new_run_id: str, fingerprint: str) -> tuple[RunEntry, bool]:
        """Start a run that takes over what another one finished, or return the one that has this id and content.

        Raises:
            NotFoundError: there is no such run.
            PreconditionError: it has not ended.
            ConflictError, ExhaustedError, InvalidError, UnavailableError: see `start_run`.
        """
        entry = self.run(run_id)
        old = entry.run
        if not old.is_terminal:
            text = f"run {run_id!r} is {old.state.value}; it can be retried when it has ended"
            raise PreconditionError("RUN_NOT_ENDED", text)
        return await self.submit(
            new_run_id,
            workflow_of(old.spec, old.tasks),
            parameters=old.parameters,
            labels=entry.labels,
            priority=old.priority,
            fingerprint=fingerprint,
            tenant=old.tenant,
            workflow_id=old.workflow_id,
            timeout_s=entry.timeout_s,
            earlier=Earlier(run_id, old.tasks, lambda artifact: self._store.held(artifact.artifact_id) is not None),
        )

    def add_tasks(self, run_id: str, tasks: Sequence[TaskSpec], expected_revision: int | None) -> RunEntry:
        """Add tasks to a run that has not ended.

        Raises:
            AbortedError: the run has another revision; None expects any.
            ExhaustedError, InvalidError, NotFoundError, PreconditionError: see `start_run` and `Run.append`.
        """
        entry = self.run(run_id)
        expect_revision(f"run {run_id!r}", entry.run.revision, expected_revision)
        self._admission.check_room(len(tasks))
        self._admission.check_possible(tasks)
        self._change(entry, lambda: entry.run.append(tasks, time.monotonic()))
        return entry

    def run(self, run_id: str) -> RunEntry:
        """Return a run. Raises NotFoundError."""
        try:
            return self.runs[run_id]
        except KeyError:
            raise self._no_run(run_id) from None

    def _no_run(self, run_id: str) -> NotFoundError:
        text = f"there is no run {run_id!r}"
        if self._ended.fingerprint_of(run_id) is not None:
            text = f"run {run_id!r} has ended, and its results are no longer kept; it is not run again by that id"
        return NotFoundError("RUN_NOT_FOUND", text, metadata={"run_id": run_id})

    def task(self, run_id: str, task_id: str) -> RunEntry:
        """Return the run of a task. Raises NotFoundError when there is no such run or task."""
        entry = self.run(run_id)
        if task_id not in entry.run.tasks:
            raise NotFoundError("TASK_NOT_FOUND", f"run {run_id!r} has no task {task_id!r}")
        return entry

    async def explain(self, run_id: str, task_id: str) -> Explanation:
        """Return why a task waits. Raises NotFoundError."""
        entry = self.task(run_id, task_id)
        if entry.run.tasks[task_id].is_with_scheduler:
            found = await self.inquiries.explain(run_id, task_id)
            if found is not None:
                return found
        return entry.run.explain(task_id, time.monotonic())

    def cancel_run(self, run_id: str, reason: str) -> RunEntry:
        """Cancel a run; one that has ended stays as it is. Raises NotFoundError."""
        entry = self.run(run_id)
        self._change(entry, lambda: entry.run.cancel(reason or "cancelled by the caller", time.monotonic()))
        return entry

    def cancel_task(self, run_id: str, task_id: str) -> RunEntry:
        """Cancel one task. Raises NotFoundError."""
        entry = self.task(run_id, task_id)
        self._change(entry, lambda: entry.run.cancel_task(task_id, "cancelled by the caller", time.monotonic()))
        return entry

    def deliver(self, effects: list[SchedulerEffect]) -> None:
        """Take what the scheduler decided: facts about tasks go to their runs, answers to who asked, the rest to
        workers."""
        now = time.monotonic()
        posts: list[SchedulerEvent] = []
        for effect in effects:
            if isinstance(effect, TASK_EVENTS):
                if entry := self.runs.get(effect.run_id):
                    self._tell_run(entry, effect, now, posts)
            elif isinstance(effect, TaskExplained | NodesDescribed):
                self.inquiries.answer(effect)
            elif isinstance(effect, NodesChanged):
                self._admission.know(effect.nodes)
            elif isinstance(effect, SettleArtifacts):
                self._store.settle(effect.artifacts)
            else:
                self._sessions.perform(effect)
        self._bus.post(posts)

    def _tell_run(self, entry: RunEntry, event: ToRun, now: float, posts: list[SchedulerEvent]) -> None:
        def decide() -> Sequence[Effect | HolderEffect]:
            if isinstance(event, TasksSpawned):
                return entry.run.spawn(event.task_id, event.tasks, now)
            if isinstance(event, QuestionAsked):
                return self.open_runs.ask(entry, event)
            return entry.run.handle(event, now)

        try:
            self._change(entry, decide, posts)
        except Exception:
            # The last resort: a fact that breaks one run's invariants must not stop the others.
            log.exception("run %s could not take %s", entry.run.run_id, type(event).__name__)

    def _expire(self, entry: RunEntry, limit_s: float) -> None:
        self._change(entry, lambda: entry.run.expire(limit_s, time.monotonic()))

    def _change(
        self,
        entry: RunEntry,
        decide: Callable[[], Sequence[Effect | HolderEffect]],
        posts: list[SchedulerEvent] | None = None,
    ) -> None:
        """Do what a run's machine decides; a machine that raises ends its run, or its readers would wait for ever.

        Raises LatticeError when the machine refuses, which changes nothing, and whatever else it raises.
        """
        try:
            self._perform(entry, decide(), posts)
        except LatticeError:
            raise
        except Exception:
            if not entry.log.is_complete:
                self._abandon(entry, posts)
            raise

    def _abandon(self, entry: RunEntry, posts: list[SchedulerEvent] | None) -> None:
        error_id = uuid4().hex
        log.exception("run %s ends by a bug, error id %s", entry.run.run_id, error_id)
        failure = Failure(FailureKind.INTERNAL, f"internal error {error_id}; the server's log has the details")
        self._perform(entry, entry.run.abandon(failure, time.monotonic()), posts)

    def _perform(
        self,
        entry: RunEntry,
        effects: Sequence[Effect | HolderEffect],
        posts: list[SchedulerEvent] | None = None,
    ) -> None:
        own: list[SchedulerEvent] = [] if posts is None else posts
        if entry.open_run is not None:
            effects = [*entry.open_run.withdraw(effects), *effects]
        for effect in effects:
            match effect:
                case TaskReady() | CancelRequested():
                    own.append(effect)
                case AskHolder() | WithdrawQuestion() | AnswerQuestion():
                    self.open_runs.perform(entry, effect)
                case _:
                    if isinstance(effect, TaskSucceeded):
                        self._keep(entry, list(_artifacts_of(effect)))
                    time_s = time.time()
                    entry.note_times(effect, time_s - time.monotonic())
                    entry.log.append(effect, time_s)
                    if entry.holder is not None and isinstance(effect, TOLD | RunFinished):
                        entry.holder.news.set()
        if posts is None:
            self._bus.post(own)
        if len(entry.run.dag.artifacts) > entry.graph_artifacts:
            self._keep(entry, entry.run.dag.artifacts[entry.graph_artifacts :])
            entry.graph_artifacts = len(entry.run.dag.artifacts)
        self._admission.count(entry.run.open_tasks - entry.open_tasks)
        entry.open_tasks = entry.run.open_tasks
        if entry.run.is_unsettled and not entry.is_going_on:
            entry.is_going_on = True
            self._slices.call(lambda: self._go_on(entry))
        if entry.run.is_terminal and entry.ended_s is None:
            for timer in (entry.expiry, entry.grace):
                if timer is not None:
                    timer.cancel()
            entry.ended_s = time.time()
            self._ended.add(entry)

    def _go_on(self, entry: RunEntry) -> None:
        """Have a run hand over more of its tasks."""
        entry.is_going_on = False
        self._change(entry, lambda: entry.run.go_on(time.monotonic()))

    def _keep(self, entry: RunEntry, artifacts: list[Artifact]) -> None:
        if artifacts:
            self._store.take(artifacts)
            entry.artifacts += artifacts
            entry.artifact_bytes += sum(artifact.size_bytes for artifact in artifacts)


def _artifacts_of(event: TaskSucceeded) -> Iterator[Artifact]:
    for payload in event.outputs.values():
        if isinstance(payload.content, Artifact):
            yield payload.content
    for items in event.split.values():
        for payload in items:
            if isinstance(payload.content, Artifact):
                yield payload.content
