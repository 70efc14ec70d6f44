"""A whole cluster on a virtual clock: runs, the scheduler's machine, workers, and what travels between them."""

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from lattice_server.core.messages import (
    AcknowledgeReports,
    Assign,
    CancelRequested,
    CloseSession,
    DrainWorker,
    ForgetSession,
    NodesChanged,
    RevokeLease,
    StopLease,
    TaskReady,
    TasksSpawned,
    WelcomeWorker,
    WorkerDetached,
    WorkerHello,
    WorkerLost,
)
from lattice_server.core.model import Payload, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.limits import Bounds
from lattice_server.core.run.run import Run
from lattice_server.core.scheduling.scheduler import Scheduler
from tests.server.core.checked_scheduler import CheckedScheduler
from tests.server.core.restoring import made_again
from tests.server.core.watcher import Watcher
from tests.server.core.workers import Behaviour, Worker

MOST_STEPS = 200_000


class Cluster:
    """The whole cluster, driven step by step. Messages arrive in order, `latency_s` later.

    With `is_checked` every invariant is asserted after every step, and the scheduler compared with a thorough one.
    """

    def __init__(
        self,
        behave: Behaviour,
        *,
        limits: Mapping[str, int] | None = None,
        latency_s: float = 0.0,
        is_checked: bool = True,
        session_ttl_s: float = 5.0,
    ) -> None:
        self.now = 0.0
        self._limits = limits
        self._session_ttl_s = session_ttl_s
        self._is_checked = is_checked
        self._life = 0
        self._begin_life()
        self.runs: dict[str, Run] = {}
        self.facts: dict[str, list[tuple[float, Any]]] = {}
        self.workers: dict[str, Worker] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        self._behave = behave
        self._latency_s = latency_s
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._to_scheduler: deque[Any] = deque()
        self._is_expected = False

    def _begin_life(self) -> None:
        self._life += 1
        kind = CheckedScheduler if self._is_checked else Scheduler
        self.machine = kind(f"e{self._life}", self._session_ttl_s, self._limits)
        self.watcher = Watcher(self.machine, self._limits)

    # Calls of tests.

    def restart(self) -> None:
        """Let the server be killed and started again: only facts of runs survive. Workers have to dial again."""
        self._to_scheduler.clear()
        self._is_expected = False
        self._begin_life()
        for worker in self.workers.values():
            worker.disconnect()
        for run_id, old in self.runs.items():
            run, restoration = made_again(old, self.facts[run_id], **self._settings[run_id])
            self.runs[run_id] = run
            self.perform(run, run.resume(restoration, self.now))

    def join(self, hello: WorkerHello) -> Worker:
        """Start a worker."""
        worker = Worker(hello, self._post, self.after, self._behave)
        self.workers[hello.node_id] = worker
        self._greet(worker)
        return worker

    def kill(self, node_id: str) -> None:
        """Let a worker's process die."""
        worker = self.workers.pop(node_id)
        worker.is_gone = True
        self._post(WorkerLost(worker.hello.worker_id, "killed"))

    def detach(self, node_id: str) -> None:
        """Break a worker's stream."""
        worker = self.workers[node_id]
        if worker.is_connected:
            worker.disconnect()
            self._post(WorkerDetached(worker.session_id))

    def resume(self, node_id: str) -> None:
        """Let a worker dial again."""
        worker = self.workers[node_id]
        if not worker.is_connected:
            self._greet(worker)

    def _greet(self, worker: Worker) -> None:
        worker.greeting = next(self._numbers)
        held = tuple(worker.held())
        named = {"session_id": worker.session_id, "held_lease_ids": held, "held": worker.held_leases()}
        self._post(replace(worker.hello, greeting=worker.greeting, **named))

    def start(self, run_id: str, spec: WorkflowSpec, *, bounds: Bounds | None = None, **settings: Any) -> Run:
        """Start a run."""
        settings["bounds"] = bounds or Bounds()
        run = Run(run_id, spec, dag.build(spec, ()), **settings)
        self.runs[run_id], self.facts[run_id], self._settings[run_id] = run, [], settings
        self.perform(run, run.start({}, self.now))
        return run

    def perform(self, run: Run, effects: Sequence[Any]) -> None:
        """Carry out the effects of a run's machine."""
        for effect in effects:
            if isinstance(effect, TaskReady | CancelRequested):
                self._post(effect)
            else:
                self.facts[run.run_id].append((self.now, effect))
        if self._is_checked:
            run.check()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call back later."""
        heapq.heappush(self._calls, (self.now + seconds, next(self._numbers), call))

    def go_on(self, until: Callable[[], bool] = lambda: False, *, most_s: float = float("inf")) -> None:
        """Let things happen until nothing more does, until a condition holds, or until a time."""
        for _ in range(MOST_STEPS):
            if until() or not self.step(most_s):
                return
        raise AssertionError("it does not end")

    def step(self, most_s: float = float("inf")) -> bool:
        """Let the next thing happen; return whether there was one."""
        due = self.machine.next_deadline()
        at = self._calls[0][0] if self._calls else None
        if due is not None and (at is None or due < at):
            if due > most_s:
                return False
            self.now = max(self.now, due)
            self._schedule()
            return True
        if at is None or at > most_s:
            return False
        self.now = max(self.now, at)
        heapq.heappop(self._calls)[2]()
        return True

    # Messages.

    def _post(self, event: Any) -> None:
        self._to_scheduler.append(event)
        if not self._is_expected:
            self._is_expected = True
            self._after_in_life(self._schedule)

    def _after_in_life(self, call: Callable[[], None]) -> None:
        """Call back after the latency, unless the server is killed before."""
        life = self._life
        self.after(self._latency_s, lambda: call() if self._life == life else None)

    def _schedule(self) -> None:
        self._is_expected = False
        events = list(self._to_scheduler)
        self._to_scheduler.clear()
        for event in events:
            if isinstance(event, TaskReady):
                # One that was handed back is handed over again.
                self.watcher.gone.discard((event.run_id, event.spec.task_id))
                self.watcher.submit(event)
        effects = self.machine.handle_all(events, self.now)
        if self._is_checked:
            self.watcher.take(effects)
            self.watcher.check(self.now)
        if effects:
            self._after_in_life(lambda: self._deliver(effects))

    def _deliver(self, effects: Sequence[Any]) -> None:
        for effect in effects:
            match effect:
                case Assign() | StopLease() | RevokeLease() | WelcomeWorker() | AcknowledgeReports():
                    self._tell_worker(effect)
                case CloseSession():
                    for node_id, worker in list(self.workers.items()):
                        if worker.session_id == effect.session_id:
                            worker.is_gone = True
                            del self.workers[node_id]
                case NodesChanged() | DrainWorker() | ForgetSession():
                    pass
                case TasksSpawned():
                    run = self.runs[effect.run_id]
                    self.perform(run, run.spawn(effect.task_id, effect.tasks, self.now))
                case _:
                    run = self.runs[effect.run_id]
                    self.perform(run, run.handle(effect, self.now))

    def _tell_worker(self, effect: Assign | StopLease | RevokeLease | WelcomeWorker | AcknowledgeReports) -> None:
        for worker in list(self.workers.values()):
            if isinstance(effect, WelcomeWorker):
                if worker.greeting == effect.greeting:
                    worker.take(effect)
            elif worker.session_id == effect.session_id and worker.is_connected:
                worker.take(effect)


def value(text: str) -> Payload:
    """Return a value as JSON text."""
    return Payload("application/json", text)
