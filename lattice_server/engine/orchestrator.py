"""Owns runs, on the main thread. Rule: a run changes only by what its machine decides."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple, NotRequired, TypedDict, Unpack
from uuid import uuid4

from lattice_server.core.errors import (
    ConflictError,
    ExhaustedError,
    LatticeError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from lattice_server.core.messages import (
    AnswerQuestion,
    AskHolder,
    CancelRequested,
    Explanation,
    NodesChanged,
    NodesDescribed,
    QuestionAsked,
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
    WithdrawQuestion,
)
from lattice_server.core.model import Artifact, Failure, FailureKind, Function, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.open_run import HolderEffect
from lattice_server.core.run.reuse import Earlier, workflow_of
from lattice_server.core.run.run import Effect, Run
from lattice_server.core.run.task_table import TaskTable, tabulating
from lattice_server.core.steps import STEP_ITEMS, Steps, finish, stepwise
from lattice_server.core.tenancy import UNNAMED, Reach, Shelf, key_of
from lattice_server.engine import run_logging
from lattice_server.engine.admission import Admission
from lattice_server.engine.artifact_store import ArtifactStore
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.code_store import CodeStore
from lattice_server.engine.ended_runs import EndedRuns
from lattice_server.engine.open_runs import TOLD, OpenRuns
from lattice_server.engine.queries import Inquiries
from lattice_server.engine.run_entry import Retention, RunEntry
from lattice_server.engine.sessions import Sessions
from lattice_server.engine.slices import Slices
from lattice_server.engine.workflow_store import expect_revision

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
    request_id: NotRequired[str]
    reach: NotRequired[Reach]  # That of the caller, whose artifacts the run may name.


class Prepared(NamedTuple):
    """A run that was checked and has not started."""

    spec: WorkflowSpec
    graph: dag.Dag
    table: TaskTable
    functions: Mapping[str, Function]


class Orchestrator:
    """Starts, follows and cancels runs. Every method runs on the main thread's event loop."""

    def __init__(
        self,
        bus: MessageBus,
        sessions: Sessions,
        store: ArtifactStore,
        code: CodeStore,
        retention: Retention,
        admission: Admission,
        open_run_grace_s: float = 30.0,
        slices: Slices | None = None,
    ) -> None:
        self.runs: Shelf[RunEntry] = Shelf()
        self.is_stopping = False
        self._bus = bus
        self._sessions = sessions
        self._store = store
        self._code = code
        self.inquiries = Inquiries(bus)
        self._admission = admission
        self._slices = slices or Slices()
        self._numbers = count(1)
        self.ended = EndedRuns(self.runs, store, retention)
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
        """Start a run of a tenant, or return its run that has this id and content; the flag tells whether it is new.

        Raises:
            ConflictError: the tenant used the id with other content.
            NotFoundError: the run with this id and content has ended and is no longer kept, or there is no such
                artifact within reach.
            ExhaustedError: the server has as many open tasks as it may, the run too many of its own, or the tenant
                holds too much code.
            InvalidError: the graph is not valid.
            PreconditionError: no node could ever run one of its tasks.
            UnavailableError: the server is stopping.
        """
        if entry := self.known(run_id, fingerprint, settings.get("tenant", ""), settings.get("request_id", "")):
            return entry, False
        prepared = finish(self._preparing(run_id, spec, parameters, settings))
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
        if entry := self.known(run_id, fingerprint, settings.get("tenant", ""), settings.get("request_id", "")):
            return entry, False
        prepared = await self._slices.finish(self._preparing(run_id, spec, parameters, settings))
        # The same request may have come twice.
        if entry := self.known(run_id, fingerprint, settings.get("tenant", ""), settings.get("request_id", "")):
            return entry, False
        return self._begin(prepared, parameters, fingerprint, settings), True

    def known(self, run_id: str, fingerprint: str, tenant: str, request_id: str = "") -> RunEntry | None:
        """Return a tenant's run that has this id and content, if there is one. Raises as `start_run`.

        A call that repeats the `request_id` of the one that started the run has its content, whatever else it says.
        """
        if self.is_stopping:
            raise UnavailableError("SHUTTING_DOWN", "the server is stopping", retry_after_s=1.0)
        existing = self.runs.get(key_of(run_id, tenant))
        if existing is not None:
            if fingerprint != existing.fingerprint and not (request_id and request_id == existing.request_id):
                raise ConflictError("RUN_ID_CONFLICT", f"run {run_id!r} exists with other content")
            return existing
        own = Reach(tenant)
        if (known := self.ended.fingerprint_of(run_id, own)) is not None:
            if known != fingerprint and not request_id:
                raise ConflictError("RUN_ID_CONFLICT", f"run {run_id!r} existed with other content")
            raise self._no_run(run_id, own)
        return None

    def _preparing(
        self, run_id: str, spec: WorkflowSpec, parameters: Mapping[str, Payload], settings: StartSettings
    ) -> Steps[Prepared]:
        tenant = settings.get("tenant", "")
        self._admission.check_room(len(spec.tasks), tenant)
        graph = yield from dag.building(spec, parameters)
        if settings.get("earlier") is None:
            given = (p.content for p in parameters.values() if isinstance(p.content, Artifact))
            named = (artifact.artifact_id for artifact in (*graph.artifacts, *given))
            self._store.check(named, settings.get("reach", UNNAMED))
        yield from self._admission.checking(spec.tasks)
        table = yield from tabulating(key_of(run_id or f"run-{uuid4().hex}", tenant), graph)
        functions = yield from _functions_of(spec.tasks)
        return Prepared(spec, graph, table, functions)

    def _begin(
        self, prepared: Prepared, parameters: Mapping[str, Payload], fingerprint: str, settings: StartSettings
    ) -> RunEntry:
        spec, graph, table, functions = prepared
        tenant, uploader = settings.get("tenant", ""), settings.get("reach", UNNAMED).tenant
        self._admission.check_room(len(spec.tasks), tenant)
        timeout_s = settings.get("timeout_s")
        run = Run(
            table.run_id,
            spec,
            graph,
            settings.get("workflow_id", ""),
            settings["priority"],
            tenant=tenant,
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
            settings.get("request_id", ""),
        )
        self._hold_code(entry, functions)
        self.runs[table.run_id] = entry
        given = [p.content for p in parameters.values() if isinstance(p.content, Artifact)]
        self._keep(entry, given, uploader)
        if timeout_s is not None:
            entry.timeout_s = timeout_s
            loop = asyncio.get_running_loop()
            entry.expiry = loop.call_later(timeout_s, self._expire, entry, timeout_s)
        if run.is_open:
            self.open_runs.open(entry)
        self._change(entry, lambda: run.start(parameters, time.monotonic()), uploader=uploader)
        return entry

    async def retry_run(
        self, run_id: str, new_run_id: str, fingerprint: str, reach: Reach = UNNAMED
    ) -> tuple[RunEntry, bool]:
        """Start a run that takes over what another one finished, or return the one that has this id and content.

        Raises:
            NotFoundError: there is no such run.
            PreconditionError: it has not ended.
            ConflictError, ExhaustedError, InvalidError, UnavailableError: see `start_run`.
        """
        entry = self.run(run_id, reach)
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

    def add_tasks(
        self, run_id: str, tasks: Sequence[TaskSpec], expected_revision: int | None, reach: Reach = UNNAMED
    ) -> RunEntry:
        """Add tasks to a run that has not ended.

        Raises:
            AbortedError: the run has another revision; None expects any.
            ExhaustedError, InvalidError, NotFoundError, PreconditionError: see `start_run` and `Run.append`.
        """
        entry = self.run(run_id, reach)
        expect_revision(f"run {run_id!r}", entry.run.revision, expected_revision)
        self._store.check((artifact.artifact_id for artifact in dag.artifacts_in(tasks)), reach)
        self._admission.check_room(len(tasks), entry.run.tenant)
        self._admission.check_possible(tasks)
        self._hold_code(entry, finish(_functions_of(tasks)))
        self._change(entry, lambda: entry.run.append(tasks, time.monotonic()), uploader=reach.tenant)
        return entry

    def run(self, run_id: str, reach: Reach = UNNAMED) -> RunEntry:
        """Return a run within reach. Raises NotFoundError."""
        entry = self.runs.find(run_id, reach)
        if entry is None:
            raise self._no_run(run_id, reach)
        return entry

    def _no_run(self, run_id: str, reach: Reach) -> NotFoundError:
        metadata = {"run_id": run_id}
        if self.ended.fingerprint_of(run_id, reach) is None:
            return NotFoundError("RUN_NOT_FOUND", f"there is no run {run_id!r}", metadata=metadata)
        text = f"run {run_id!r} has ended, and its results are no longer kept; it is not run again by that id"
        return NotFoundError("RUN_EVICTED", text, metadata=metadata)

    def task(self, run_id: str, task_id: str, reach: Reach = UNNAMED) -> RunEntry:
        """Return the run of a task. Raises NotFoundError when there is no such run or task."""
        entry = self.run(run_id, reach)
        if task_id not in entry.run.tasks:
            raise NotFoundError("TASK_NOT_FOUND", f"run {run_id!r} has no task {task_id!r}")
        return entry

    async def explain(self, run_id: str, task_id: str, reach: Reach = UNNAMED) -> Explanation:
        """Return why a task waits. Raises NotFoundError."""
        entry = self.task(run_id, task_id, reach)
        if entry.run.tasks[task_id].is_with_scheduler:
            found = await self.inquiries.explain(entry.key, task_id)
            if found is not None:
                return found
        return entry.run.explain(task_id, time.monotonic())

    def cancel_run(self, run_id: str, reason: str, reach: Reach = UNNAMED) -> RunEntry:
        """Cancel a run; one that has ended stays as it is. Raises NotFoundError."""
        entry = self.run(run_id, reach)
        self._change(entry, lambda: entry.run.cancel(reason or "cancelled by the caller", time.monotonic()))
        return entry

    def cancel_task(self, run_id: str, task_id: str, reach: Reach = UNNAMED) -> RunEntry:
        """Cancel one task. Raises NotFoundError."""
        entry = self.task(run_id, task_id, reach)
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
                refusal = None
                try:
                    self._hold_code(entry, finish(_functions_of(event.tasks)))
                except ExhaustedError as error:
                    refusal = error
                return entry.run.spawn(event.task_id, event.tasks, now, refusal)
            if isinstance(event, QuestionAsked):
                return self.open_runs.ask(entry, event)
            return entry.run.handle(event, now)

        try:
            self._change(entry, decide, posts)
        except Exception:
            # The last resort: a fact that breaks one run's invariants must not stop the others.
            about = {"run_id": entry.run_id, "task_id": event.task_id}
            log.exception("the run could not take %s", type(event).__name__, extra=about)

    def _expire(self, entry: RunEntry, limit_s: float) -> None:
        self._change(entry, lambda: entry.run.expire(limit_s, time.monotonic()))

    def _change(
        self,
        entry: RunEntry,
        decide: Callable[[], Sequence[Effect | HolderEffect]],
        posts: list[SchedulerEvent] | None = None,
        *,
        uploader: str = "",
    ) -> None:
        """Do what a run's machine decides; a machine that raises ends its run, or its readers would wait for ever.

        `uploader` is the tenant of the caller who changes the graph, whose uploads it may name.

        Raises LatticeError when the machine refuses, which changes nothing, and whatever else it raises.
        """
        try:
            self._perform(entry, decide(), posts, uploader)
        except LatticeError:
            raise
        except Exception:
            if not entry.log.is_complete:
                self._abandon(entry, posts)
            raise

    def _abandon(self, entry: RunEntry, posts: list[SchedulerEvent] | None) -> None:
        error_id = uuid4().hex
        log.exception("the run ends by a bug", extra={"run_id": entry.run_id, "error_id": error_id})
        failure = Failure(FailureKind.INTERNAL, f"internal error {error_id}; the server's log has the details")
        self._perform(entry, entry.run.abandon(failure, time.monotonic()), posts)

    def _perform(
        self,
        entry: RunEntry,
        effects: Sequence[Effect | HolderEffect],
        posts: list[SchedulerEvent] | None = None,
        uploader: str = "",
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
                        self._keep(entry, list(_artifacts_of(effect)), entry.run.tenant)
                    time_s = time.time()
                    entry.note_times(effect, time_s - time.monotonic())
                    entry.log.append(effect, time_s)
                    if entry.holder is not None and isinstance(effect, TOLD | RunFinished):
                        entry.holder.news.set()
                    run_logging.note(entry, effect)
        if posts is None:
            self._bus.post(own)
        if len(entry.run.dag.artifacts) > entry.graph_artifacts:
            self._keep(entry, entry.run.dag.artifacts[entry.graph_artifacts :], uploader)
            entry.graph_artifacts = len(entry.run.dag.artifacts)
        self._admission.count(entry.run.open_tasks - entry.open_tasks, entry.run.tenant)
        entry.open_tasks = entry.run.open_tasks
        if entry.run.is_unsettled and not entry.is_going_on:
            entry.is_going_on = True
            self._slices.call(lambda: self._go_on(entry))
        if entry.run.is_terminal and entry.ended_s is None:
            for timer in (entry.expiry, entry.grace):
                if timer is not None:
                    timer.cancel()
            entry.ended_s = time.time()
            self._code.release(entry.run.tenant, entry.functions.values())
            self._store.uploads.release(entry.uploads)
            entry.uploads = []
            self.ended.add(entry)

    def _go_on(self, entry: RunEntry) -> None:
        """Have a run hand over more of its tasks."""
        entry.is_going_on = False
        self._change(entry, lambda: entry.run.go_on(time.monotonic()))

    def _keep(self, entry: RunEntry, artifacts: list[Artifact], uploader: str) -> None:
        if artifacts:
            entry.uploads += self._store.take(artifacts, entry.run.tenant, uploader)
            entry.artifacts += artifacts

    def _hold_code(self, entry: RunEntry, functions: Mapping[str, Function]) -> None:
        """Have a run that goes on hold code. Raises ExhaustedError."""
        if entry.ended_s is None:
            new = {digest: function for digest, function in functions.items() if digest not in entry.functions}
            self._code.hold(entry.run.tenant, new.values())
            entry.functions |= new


def _functions_of(tasks: Iterable[TaskSpec]) -> Steps[dict[str, Function]]:
    """Return the functions that tasks call, by digest."""
    found: dict[str, Function] = {}
    for task, is_step in stepwise(tasks, 1000):
        found[task.function.digest] = task.function
        if is_step:
            yield
    return found


def _artifacts_of(event: TaskSucceeded) -> Iterator[Artifact]:
    for payload in event.outputs.values():
        if isinstance(payload.content, Artifact):
            yield payload.content
    for items in event.split.values():
        for payload in items:
            if isinstance(payload.content, Artifact):
                yield payload.content
