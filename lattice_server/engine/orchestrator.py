"""Owns the commands on runs, and the delivery of the scheduler's effects, on the main thread.

Rule: a run changes only by the decisions of its machine.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Unpack, cast

from lattice_server.core.errors import PreconditionError, UnavailableError
from lattice_server.core.messages import (
    AcknowledgeReports,
    AnswerQuestion,
    Explanation,
    NodesChanged,
    NodesDescribed,
    PastRuns,
    RunsRestored,
    SchedulerEffect,
    SchedulerEvent,
    ServiceNeeded,
    SettleArtifacts,
    TaskExplained,
    TaskProgressed,
    TaskStreamed,
    ToRun,
    WorkerEffect,
)
from lattice_server.core.model import NodeSpec, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.steps import finish
from lattice_server.core.tenancy import UNNAMED, Reach
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.commands.additions import RunAdditions
from lattice_server.engine.commands.driver import RunDriver
from lattice_server.engine.commands.events import RunEvents
from lattice_server.engine.commands.open_runs import OpenRuns
from lattice_server.engine.commands.retries import retry_of
from lattice_server.engine.commands.signals import RunSignals
from lattice_server.engine.commands.starter import RunStarter, StartSettings
from lattice_server.engine.commands.tethers import Tethers
from lattice_server.engine.queries import SchedulerQueries
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.restoring.run_maker import RunMaker
from lattice_server.engine.restoring.run_restorer import RunRestorer
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.chunk_store import ChunkStore
from lattice_server.engine.runs.ended_runs import Retention
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.references import RunStores
from lattice_server.engine.runs.registry import RunRegistry
from lattice_server.engine.runs.secrets import NO_SECRETS
from lattice_server.engine.slices import Slices
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.engine.workers.sessions import Sessions

log = logging.getLogger(__name__)


class Orchestrator:
    """Starts, changes and cancels runs. Every method runs on the main thread's event loop."""

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
        journal: RunJournal | None = None,
        chunks: ChunkStore | None = None,
    ) -> None:
        registry = RunRegistry(store, retention)
        self.runs, self.ended = registry.runs, registry.ended
        self.run, self.task = registry.run, registry.task
        self.is_stopping = False
        self.queries = SchedulerQueries(bus)
        self._registry = registry
        self._bus = bus
        self._sessions = sessions
        self._store = store
        self._admission = admission
        self._slices = slices or Slices()
        self.chunks = chunks or ChunkStore()
        self.ended.on_drop = self.chunks.drop
        stores = RunStores(store, code, admission)
        self._driver = RunDriver(bus, stores, registry.ended, self._slices, sessions.perform, self.chunks, journal)
        self.open_runs = OpenRuns(open_run_grace_s, self._driver)
        self.tethers = Tethers(self._driver)
        self.signals = RunSignals(self._driver, admission)
        self.observers = self._driver.observers
        self.requirements = self._driver.requirements
        self.on_nodes: Callable[[tuple[NodeSpec, ...]], object] = lambda nodes: None
        self.on_needed: Callable[[ServiceNeeded], object] = lambda needed: None
        callers = (self.open_runs, self.tethers)
        self._starter = RunStarter(registry.runs, store, stores, admission, self._driver, *callers, journal)
        self._additions = RunAdditions(store, stores, admission, self._driver, self._slices, journal)
        self.events = RunEvents(self._driver, self._additions, self.signals)
        self.journal = journal
        self.restorer: RunRestorer | None = None
        if journal is not None:
            parts = (stores, RunMaker(admission, journal), self._driver, self._starter, journal, self._slices)
            self.restorer = RunRestorer(registry.runs, registry.ended, *parts)
            self.restorer.on_restored = partial(bus.post, [RunsRestored()])
            registry.ended.on_read = journal.note_read
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
            NotFoundError: the run with this id and content was evicted, or an artifact is not within reach.
            ExhaustedError: the server has as many open tasks as it may, the run too many of its own, or the tenant has
                too much code or memory in live runs.
            InvalidError: the graph is not valid.
            PreconditionError: no node could ever run one of its tasks.
            UnavailableError: the server is stopping.
        """
        if entry := self.known(run_id, fingerprint, *_named_by(settings)):
            return entry, False
        prepared = finish(self._starter.preparing(run_id, spec, parameters, settings))
        return self._starter.start(prepared, fingerprint, settings), True

    async def submit(
        self,
        run_id: str,
        spec: WorkflowSpec,
        *,
        parameters: Mapping[str, Payload],
        fingerprint: str,
        **settings: Unpack[StartSettings],
    ) -> tuple[RunEntry, bool]:
        """Start a run as `start_run` does, in slices: other calls are served in between."""
        if entry := self.known(run_id, fingerprint, *_named_by(settings)):
            return entry, False
        prepared = await self._slices.finish(self._starter.preparing(run_id, spec, parameters, settings))
        # Another call with the same request may have started the run in between.
        if entry := self.known(run_id, fingerprint, *_named_by(settings)):
            return entry, False
        return self._starter.start(prepared, fingerprint, settings), True

    def known(
        self, run_id: str, fingerprint: str, tenant: str, request_id: str = "", secrets: Mapping[str, str] = NO_SECRETS
    ) -> RunEntry | None:
        """Return a tenant's run that has this id and content, if there is one; see `RunRegistry.known`.

        Raises UnavailableError when the server is stopping.
        """
        if self.is_stopping:
            raise UnavailableError("SHUTTING_DOWN", "the server is stopping", retry_after_s=1.0)
        return self._registry.known(run_id, fingerprint, tenant, request_id, secrets)

    async def retry_run(
        self,
        run_id: str,
        new_run_id: str,
        fingerprint: str,
        reach: Reach = UNNAMED,
        secrets: Mapping[str, str] = NO_SECRETS,
    ) -> tuple[RunEntry, bool]:
        """Start a run that reuses the finished tasks of another one, or return the run that has this id and content.

        Raises:
            NotFoundError: there is no such run.
            PreconditionError: it has not ended.
            ConflictError, ExhaustedError, InvalidError, UnavailableError: see `start_run`.
        """
        entry = self.run(run_id, reach)
        spec, parameters, settings = retry_of(entry, run_id, self._store, self.requirements, secrets)
        return await self.submit(new_run_id, spec, parameters=parameters, fingerprint=fingerprint, **settings)

    async def add_tasks(
        self,
        run_id: str,
        tasks: Sequence[TaskSpec],
        expected_revision: int | None,
        reach: Reach = UNNAMED,
        secrets: Mapping[str, str] = NO_SECRETS,
    ) -> RunEntry:
        """Add tasks to a run that has not ended, in slices.

        Raises:
            AbortedError: the run has another revision; None expects any.
            ExhaustedError, InvalidError, NotFoundError, PreconditionError: see `start_run` and `Run.append`.
        """
        entry = self.run(run_id, reach)
        await self._additions.add(entry, tasks, expected_revision, reach, secrets)
        return entry

    @property
    def active_runs(self) -> int:
        """How many runs have not ended, those included that are still to be restored."""
        waiting = 0 if self.restorer is None else len(self.restorer.waiting)
        return waiting + sum(not entry.run.is_terminal for entry in self.runs.values())

    async def restored(self) -> None:
        """Wait until all live runs of the journal are restored. Raises UnavailableError when the server stops."""
        if self.restorer is not None:
            await self.restorer.restored()

    async def explain(self, run_id: str, task_id: str, reach: Reach = UNNAMED) -> Explanation:
        """Return why a task waits. Raises NotFoundError."""
        entry = self.task(run_id, task_id, reach)
        if entry.run.tasks[task_id].is_with_scheduler:
            found = await self.queries.explain(entry.key, task_id)
            if found is not None:
                return found
        return entry.run.explain(task_id, time.monotonic())

    def cancel_run(self, run_id: str, reason: str, reach: Reach = UNNAMED) -> RunEntry:
        """Cancel a run; one that has ended stays as it is. Raises NotFoundError."""
        entry = self.run(run_id, reach)
        with self._driver.change(entry) as perform:
            perform(entry.run.cancel(reason or "cancelled by the caller", time.monotonic()))
        return entry

    def delete_run(self, run_id: str, reach: Reach = UNNAMED) -> None:
        """Delete a run that has ended. Raises NotFoundError, and PreconditionError when it has not ended."""
        is_recorded = self.restorer is not None and self.restorer.delete(run_id, reach)
        if is_recorded and self.runs.find(run_id, reach) is None:
            return
        entry = self.run(run_id, reach)
        if not entry.run.is_terminal:
            raise PreconditionError("RUN_NOT_ENDED", f"run {run_id!r} is {entry.run.state.value}; cancel it first")
        self.ended.drop(entry)

    def cancel_task(self, run_id: str, task_id: str, reach: Reach = UNNAMED) -> RunEntry:
        """Cancel one task. Raises NotFoundError."""
        entry = self.task(run_id, task_id, reach)
        with self._driver.change(entry) as perform:
            perform(entry.run.cancel_task(task_id, "cancelled by the caller", time.monotonic()))
        return entry

    def answer(self, answer: AnswerQuestion) -> None:
        """Send a worker the answer to a question that the server answers itself."""
        self._sessions.perform(answer)

    def deliver(self, effects: list[SchedulerEffect]) -> None:
        """Route the scheduler's effects: facts to runs, answers to queries, everything else to workers."""
        now = time.monotonic()
        posts: list[SchedulerEvent] = []
        # The events of one run that come together are handled together.
        for run_id, group in groupby(effects, _told_run):
            if not run_id:
                for effect in group:
                    self._route(cast(PastRuns, effect))
            elif entry := self.runs.get(run_id):
                self.events.tell(entry, cast(Iterator[ToRun], group), now, posts)
        self._bus.post(posts)

    def _route(self, effect: PastRuns) -> None:
        """Route an effect that is no event of a run's machine."""
        match effect:
            case TaskStreamed() | TaskProgressed():
                # Past the run's machine: chunks change no state, and there may be thousands a second.
                if entry := self.runs.get(effect.run_id):
                    self.chunks.take(entry, effect)
            case TaskExplained() | NodesDescribed():
                self.queries.answer(effect)
            case NodesChanged():
                self._admission.know(effect.nodes)
                self.on_nodes(effect.nodes)
            case ServiceNeeded():
                self.on_needed(effect)
            case SettleArtifacts():
                self._store.settle(effect.artifacts)
            case AcknowledgeReports():
                self._acknowledge(effect)
            case _:
                observed: WorkerEffect = effect
                for observer in self.observers:
                    observed = observer.perform(observed)
                self._sessions.perform(observed)

    def _acknowledge(self, effect: AcknowledgeReports) -> None:
        acknowledge = partial(self._sessions.acknowledge, effect.session_id, effect.sequence)
        if self.journal is None:
            acknowledge()
        else:
            self.journal.when_durable(acknowledge)


def _told_run(effect: SchedulerEffect) -> str:
    """Return the run whose machine an effect is an event of; nothing for other effects."""
    return effect.run_id if isinstance(effect, ToRun) else ""


def _named_by(settings: StartSettings) -> tuple[str, str, Mapping[str, str]]:
    """Return the tenant, the request id and the secrets of a call."""
    return settings.get("tenant", ""), settings.get("request_id", ""), settings.get("secrets", NO_SECRETS)
