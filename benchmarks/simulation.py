"""Owns simulated time, the simulated workers, and the order in which the machines hear of things.

Rule: every decision is made by the machines of `lattice_server.core`, driven as the engine drives them: what arrives
while the scheduler sleeps is taken together, then placed once.
"""

import heapq
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from benchmarks.outcomes import EndedRun, Outcome, Policy
from benchmarks.workloads import Arrival, Workload
from lattice_server.core.messages import (
    Assign,
    AttemptSpawned,
    AttemptStarted,
    AttemptSucceeded,
    CancelRequested,
    LeaseReturned,
    NodesChanged,
    RevokeLease,
    RunFinished,
    SchedulerEffect,
    SchedulerEvent,
    TaskReady,
    TaskReturned,
    TasksSpawned,
    TaskStarted,
    TaskSucceeded,
    WelcomeWorker,
)
from lattice_server.core.model import Payload
from lattice_server.core.run import dag
from lattice_server.core.run.run import Effect, Run
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.core.states import RunState
from lattice_worker.session.slots import LeaseState, SlotTable

HOP_S = 0.0003  # From the scheduler to a worker, and back.
STARTS_AFTER_S = 0.010  # Workers do not report the start of attempts that end sooner.
BATCH_ITEM = 0.1  # One more item makes a batch longer by this share of its longest item.
VALUE = Payload("application/json", "1")


@dataclass(frozen=True, slots=True)
class _Ended:
    session_id: str
    lease_id: str


@dataclass(slots=True)
class _Wake:
    """The scheduler wakes and handles the events that have arrived by then."""

    events: list[SchedulerEvent] = field(default_factory=list)


class Simulation:
    """One workload under one policy."""

    def __init__(self, workload: Workload, policy: Policy) -> None:
        self._workload = workload
        self._policy = policy
        self._scheduler = Scheduler("simulation")
        self._due: list[tuple[float, int, Arrival | _Ended | _Wake]] = []
        self._numbers = count()
        self._wakes: dict[float, _Wake] = {}
        self._sessions: dict[str, SlotTable[Assign]] = {}
        self._running: dict[tuple[str, str], tuple[Assign, float]] = {}
        self._runs: dict[str, tuple[Run, Arrival]] = {}
        self._ended: list[EndedRun] = []
        self._tasks = 0
        self._cpu_s = self._gpu_s = 0.0
        self._scheduler_s = self._orchestrator_s = 0.0

    def run(self, *, is_checked: bool = False) -> Outcome:
        """Run the simulation and return its outcome.

        Args:
            is_checked: assert the scheduler's invariants now and then; slow.

        Raises:
            RuntimeError: a run did not end, or did not succeed.
        """
        now = 0.0
        self._wake(now, self._workload.nodes)
        for arrival in self._workload.arrivals:
            self._add(arrival.at_s, arrival)
        while self._due:
            now, _, what = heapq.heappop(self._due)
            match what:
                case Arrival():
                    self._wake(now, self._start(what, now))
                case _Ended():
                    self._end(what, now)
                case _Wake():
                    del self._wakes[now]
                    self._schedule(what.events, now)
                    if is_checked and next(self._numbers) % 50 == 0:
                        self._scheduler.check()
        if len(self._ended) != len(self._workload.arrivals):
            raise RuntimeError(f"{len(self._runs)} runs never ended")
        makespan_s = now - self._workload.arrivals[0].at_s
        total = [node.capacity for node in self._workload.nodes]
        return Outcome(
            tuple(self._ended),
            self._tasks,
            makespan_s,
            self._cpu_s / makespan_s / sum(capacity.cpu for capacity in total),
            self._gpu_s / makespan_s / sum(len(capacity.gpus) for capacity in total),
            self._scheduler_s,
            self._orchestrator_s,
        )

    def _add(self, at: float, what: Arrival | _Ended | _Wake) -> None:
        heapq.heappush(self._due, (at, next(self._numbers), what))

    def _wake(self, at: float, events: Iterable[SchedulerEvent]) -> None:
        """Let events reach the scheduler when it next wakes after `at`."""
        round_s = self._workload.setting.round_s
        at = math.ceil(at / round_s - 1e-6) * round_s
        wake = self._wakes.get(at)
        if wake is None:
            wake = self._wakes[at] = _Wake()
            self._add(at, wake)
        wake.events.extend(events)

    # The engine.

    def _schedule(self, events: list[SchedulerEvent], now: float) -> None:
        is_first = True
        while events or is_first:
            is_first = False
            before = time.thread_time()
            effects = self._scheduler.handle_all(events, now)
            deadline = self._scheduler.next_deadline()
            self._scheduler_s += time.thread_time() - before
            events = self._deliver(effects, now)
        if deadline is not None:
            self._wake(max(deadline, now + self._workload.setting.round_s), ())

    def _deliver(self, effects: list[SchedulerEffect], now: float) -> list[SchedulerEvent]:
        posts: list[SchedulerEvent] = []
        for effect in effects:
            match effect:
                case TaskStarted() | TaskSucceeded() | TaskReturned() | TasksSpawned():
                    run, _ = self._runs[effect.run_id]
                    before = time.thread_time()
                    if isinstance(effect, TasksSpawned):
                        told = run.spawn(effect.task_id, effect.tasks, now)
                    else:
                        told = run.handle(effect, now)
                    self._orchestrator_s += time.thread_time() - before
                    posts += self._perform(run, told, now)
                case Assign():
                    self._assign(effect, now + HOP_S)
                case RevokeLease():
                    self._give_back(effect, now + HOP_S)
                case WelcomeWorker():
                    self._sessions[effect.session_id] = SlotTable()
                case NodesChanged():
                    pass
                case _:
                    raise RuntimeError(f"nothing was to go wrong, and yet: {effect}")
        return posts

    def _start(self, arrival: Arrival, now: float) -> list[SchedulerEvent]:
        tenant = arrival.caller if self._policy.is_fair else ""
        before = time.thread_time()
        graph = dag.build(arrival.spec, ())
        run = Run(arrival.run_id, arrival.spec, graph, tenant=tenant, ranking=self._policy.order(graph))
        told = run.start({}, now)
        self._orchestrator_s += time.thread_time() - before
        self._runs[arrival.run_id] = run, arrival
        return self._perform(run, told, now)

    def _perform(self, run: Run, effects: list[Effect], now: float) -> list[SchedulerEvent]:
        posts: list[SchedulerEvent] = []
        for effect in effects:
            match effect:
                case TaskReady() | CancelRequested():
                    posts.append(effect)
                case RunFinished():
                    if effect.state is not RunState.SUCCEEDED:
                        raise RuntimeError(f"run {run.run_id} has {effect.state.value}: {effect.failure}")
                    _, arrival = self._runs.pop(run.run_id)
                    self._ended.append(
                        EndedRun(arrival.caller, arrival.kind, now - arrival.at_s, arrival.critical_path_s)
                    )
                case _:
                    pass
        return posts

    # The workers.

    def _assign(self, assign: Assign, at: float) -> None:
        started = self._sessions[assign.session_id].add(assign.lease_id, assign.slot, assign)
        if started is not None:
            self._begin(started, at)

    def _begin(self, work: Assign, at: float) -> None:
        longest_s = max(self._runs[a.run_id][1].durations[a.task_id] for a in work.attempts)
        duration_s = longest_s * (1.0 + BATCH_ITEM * (len(work.attempts) - 1))
        self._cpu_s += work.resources.cpu * duration_s
        self._gpu_s += work.resources.gpu * duration_s
        self._running[work.session_id, work.lease_id] = work, duration_s
        self._add(at + duration_s, _Ended(work.session_id, work.lease_id))
        if duration_s > STARTS_AFTER_S:
            starts = [AttemptStarted(work.session_id, work.lease_id, item) for item in range(len(work.attempts))]
            self._wake(at + STARTS_AFTER_S + HOP_S, starts)

    def _end(self, ended: _Ended, now: float) -> None:
        work, duration_s = self._running.pop((ended.session_id, ended.lease_id))
        told: list[SchedulerEvent] = []
        for item, attempt in enumerate(work.attempts):
            _, arrival = self._runs[attempt.run_id]
            if added := arrival.growth.get(attempt.task_id):
                told.append(AttemptSpawned(ended.session_id, ended.lease_id, item, added))
            split = {name: [VALUE] * arrival.lengths[attempt.task_id] for name in work.split_outputs}
            outputs = dict.fromkeys(work.outputs, VALUE)
            told.append(AttemptSucceeded(ended.session_id, ended.lease_id, item, outputs, duration_s, split))
        self._tasks += len(work.attempts)
        self._wake(now + HOP_S, told)
        following = self._sessions[ended.session_id].end(ended.lease_id)
        if following is not None:
            self._begin(following[1], now)

    def _give_back(self, revoke: RevokeLease, at: float) -> None:
        slots = self._sessions[revoke.session_id]
        if slots.state(revoke.lease_id) is LeaseState.WAITING:
            slots.end(revoke.lease_id)
            self._wake(at + HOP_S, [LeaseReturned(revoke.session_id, revoke.lease_id, "revoked")])
