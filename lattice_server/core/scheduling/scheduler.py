"""Owns the decisions about tasks that are ready: where and when their attempts run, retries, lost workers.

Rule: only the scheduler's thread calls the machine; its state changes by events and by the passing of time alone.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import assert_never

from lattice_server.core.messages import (
    AcknowledgeReports,
    ArtifactsReported,
    AttemptAccessedNetwork,
    AttemptAsked,
    AttemptAwaits,
    AttemptFailed,
    AttemptLogged,
    AttemptProgressed,
    AttemptSpawned,
    AttemptStarted,
    AttemptStreamed,
    AttemptSucceeded,
    CallEnded,
    CancelRequested,
    DrainRequested,
    ExplainRequested,
    LeaseReturned,
    NodesDescribed,
    NodesRequested,
    QuestionAsked,
    ReportsRead,
    RunsRestored,
    SchedulerEffect,
    SchedulerEvent,
    ServiceChanged,
    SettleArtifacts,
    TaskAccessedNetwork,
    TaskAwaits,
    TaskExplained,
    TaskLogged,
    TaskProgressed,
    TaskReady,
    TasksSpawned,
    TaskStreamed,
    WorkerDetached,
    WorkerHeartbeat,
    WorkerHello,
    WorkerLost,
)
from lattice_server.core.scheduling.attempts import Attempts
from lattice_server.core.scheduling.earlier_leases import EarlierLeases
from lattice_server.core.scheduling.explain import explain
from lattice_server.core.scheduling.lease_reports import LeaseReports
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.live_tasks import LiveTasks
from lattice_server.core.scheduling.needs import Needs
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.node_sessions import NodeSessions
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.waits import Waits
from lattice_server.core.scheduling.work import Task
from lattice_server.core.trust import stamped

Told = AttemptLogged | AttemptAccessedNetwork | AttemptStreamed | AttemptProgressed
PassedOn = Told | AttemptSpawned | AttemptAsked
PlacesNothing = Told | WorkerHeartbeat


class Scheduler:
    """The machine of the scheduler: events go in, effects come out."""

    def __init__(
        self,
        epoch: str,
        session_ttl_s: float = 30.0,
        limits: Mapping[str, int] | None = None,
        *,
        is_restoring: bool = False,
    ) -> None:
        """Make a machine without nodes and tasks.

        Args:
            epoch: identifies this life of the server in the ids of leases and sessions.
            session_ttl_s: after how many seconds a detached session expires.
            limits: the most calls at once, by concurrency key.
            is_restoring: whether `RunsRestored` will come, before which no worker can claim an earlier lease.
        """
        numbers = count(1)
        self._effects: list[SchedulerEffect] = []
        emit = self._effects.append
        self._registry = NodeRegistry(session_ttl_s)
        self._placer = Placer(self._registry, numbers, epoch, emit, limits or {})
        self._reports = LeaseReports(self._registry, self._placer, emit)
        self._needs = Needs(self._registry, emit)
        earlier = EarlierLeases(self._registry, self._placer, not is_restoring)
        self._tasks = LiveTasks(self._registry, self._placer, self._needs, numbers, emit, earlier)
        self._attempts = Attempts(self._registry, self._placer, self._reports, self._tasks, numbers, emit)
        self._waits = Waits(self._registry, self._placer, self._tasks.by_key, emit, self._attempts.end_early)
        self._placer.on_release = self._waits.forget
        parts = (self._registry, self._placer, self._reports, self._attempts, self._tasks)
        self._sessions = NodeSessions(*parts, numbers, epoch, emit)

    @property
    def tasks(self) -> Mapping[tuple[str, str], Task]:
        """The tasks by the ids of their run and of themselves."""
        return self._tasks.by_key

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The connected nodes by id."""
        return self._registry.nodes

    @property
    def leases(self) -> Mapping[str, Lease]:
        """The leases that workers have, by id."""
        return self._placer.table.leases

    def handle(self, event: SchedulerEvent, now: float) -> list[SchedulerEffect]:
        """Take one event, then place as many tasks as possible."""
        return self.handle_all((event,), now)

    def handle_all(self, events: Sequence[SchedulerEvent], now: float) -> list[SchedulerEffect]:
        """Take events in order, then place as many tasks as possible, once for all of them."""
        for event in events:
            self.take(event, now)
        return self.tick(now)

    def tick(self, now: float) -> list[SchedulerEffect]:
        """Handle every deadline that has passed, and place as many tasks as possible."""
        self._sessions.tick(now)
        self._attempts.end_overdue(now)
        self._tasks.queue_retries(now)
        self._tasks.queue_unclaimed(now)
        self._placer.pipeline.revoke_overdue(now)
        self._waits.resume()
        self._placer.place_queued(now)
        self._waits.refuse_stuck(now)
        self._needs.report()
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        due = (self._placer.next_deadline(), self._registry.next_deadline(), self._tasks.next_deadline())
        return min((at for at in due if at is not None), default=None)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        self._registry.check()
        self._placer.check(self._tasks.earlier.permits())
        self._tasks.earlier.check()
        self._tasks.check(self.leases)
        self._waits.check()

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Take one event; its effects come with the next `tick`."""
        if not isinstance(event, PlacesNothing):
            self._waits.note_change()
        match event:
            case AttemptSucceeded():
                self._attempts.succeed(event, now)
            case TaskReady():
                self._tasks.admit(event, now)
            case AttemptStarted():
                self._reports.started(event, event.at, now)
            case AttemptFailed():
                self._attempts.fail(event, now)
            case (
                AttemptLogged()
                | AttemptAccessedNetwork()
                | AttemptSpawned()
                | AttemptAsked()
                | AttemptStreamed()
                | AttemptProgressed()
            ):
                if found := self._reports.started(event, None, now):
                    self._pass_on(event, found[1], now)
            case AttemptAwaits():
                if found := self._reports.started(event, None, now):
                    self._waits.begin(found[0], event, found[1].ready.run_id, now)
                    lease_id, number = event.lease_id, event.number
                    awaits = TaskAwaits(*found[1].named, lease_id, number, event.called_id, event.signal)
                    self._effects.append(awaits)
            case CallEnded():
                self._waits.end(event)
            case LeaseReturned():
                self._attempts.take_returned(event, now)
            case CancelRequested():
                for task_id in event.task_ids:
                    if task := self.tasks.get((event.run_id, task_id)):
                        self._attempts.end_early(task, event.failure, now)
            case ArtifactsReported():
                self._effects.append(SettleArtifacts(event.artifacts))
            case ReportsRead():
                self._effects.append(AcknowledgeReports(event.session_id, event.sequence))
            case WorkerHello():
                for wait in self._sessions.greet(event, now):
                    self.take(wait, now)
            case WorkerDetached():
                self._sessions.detach(event, now)
            case WorkerHeartbeat():
                self._sessions.compare(event, now)
            case WorkerLost():
                self._sessions.take_lost(event, now)
            case DrainRequested():
                self._sessions.drain(event, now)
            case RunsRestored():
                self._tasks.earlier.open(now)
            case ServiceChanged():
                self._tasks.change_service(event, now)
            case NodesRequested() | ExplainRequested():
                self._answer(event, now)
            case _:
                assert_never(event)

    def _pass_on(self, event: PassedOn, task: Task, now: float) -> None:
        """Pass a report of a running attempt on to its run."""
        match event:
            case AttemptLogged():
                self._effects.append(TaskLogged(*task.named, event.is_error, event.text, event.is_truncated))
            case AttemptAccessedNetwork():
                self._effects.append(TaskAccessedNetwork(*task.named, event.access))
            case AttemptSpawned(refusal=None):
                self._effects.append(TasksSpawned(*task.key, event.tasks, event.is_called))
            case AttemptStreamed(refusal=None):
                chunks = tuple(stamped(chunk, task.shape.isolation) for chunk in event.chunks)
                self._effects.append(TaskStreamed(*task.named, chunks))
            case AttemptProgressed():
                self._effects.append(TaskProgressed(*task.named, event.done, event.total))
            case AttemptSpawned() | AttemptStreamed():
                assert event.refusal is not None
                self._attempts.end_early(task, event.refusal, now)
            case AttemptAsked():
                where = (event.session_id, event.lease_id, event.number)
                payload = stamped(event.payload, task.shape.isolation)
                self._effects.append(QuestionAsked(*task.named, *where, event.name, payload))
            case _:
                assert_never(event)

    def _answer(self, query: NodesRequested | ExplainRequested, now: float) -> None:
        match query:
            case NodesRequested():
                nodes = tuple(node.view() for node in self.nodes.values())
                running = sum(node.attempts for node in nodes)
                queued, oldest_s = self._placer.queue.load(now)
                waiting = len(self.tasks) - running
                load = (waiting, running, queued, oldest_s, len(self.leases))
                self._effects.append(NodesDescribed(query.request_id, nodes, *load))
            case ExplainRequested():
                task = self.tasks.get((query.run_id, query.task_id))
                parts = (self._placer, self._registry, self._waits, self._needs, self._tasks.earlier)
                explained = explain(task, *parts, now) if task else None
                self._effects.append(TaskExplained(query.request_id, explained))
            case _:
                assert_never(query)
