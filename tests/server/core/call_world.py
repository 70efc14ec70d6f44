"""A run whose tasks call others, with one scheduler and workers that do the next thing in any order."""

from collections import deque
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

from lattice_server.core import messages
from lattice_server.core.messages import (
    AnswerQuestion,
    Assign,
    AttemptAwaits,
    AttemptFailed,
    AttemptSpawned,
    AttemptSucceeded,
    CallOutputs,
    CancelRequested,
    LeaseReturned,
    RevokeLease,
    StopLease,
    TaskAwaits,
    TaskReady,
    TasksSpawned,
    WelcomeWorker,
)
from lattice_server.core.model import Failure, FailureKind, FailurePolicy, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.run import Run
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine.runs import calls

CANCELLED = Failure(FailureKind.CANCELLED, "cancelled")
DONE = {"out": Payload("application/json", "1")}


@dataclass
class Program:
    """The behaviour of a task: it calls tasks, all at once or one after the other, and succeeds.

    One that `catches` succeeds when a call fails too; any other fails with it. One that `fails` fails after its calls.
    """

    spec: TaskSpec
    calls: "list[Program]" = field(default_factory=list)
    at_once: bool = True
    catches: bool = False
    fails: bool = False


@dataclass
class Running:
    """A lease that its worker runs."""

    assign: Assign
    program: Program
    left: "list[Program]"
    numbers: int = 0
    waiting: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


class World:
    """The run, the scheduler and the workers."""

    def __init__(self, seed: int, nodes: list[Any], programs: list[Program], limits: dict[str, int] | None = None):
        self.machine = Scheduler("e", 5.0, limits)
        self.choose = Random(seed)
        self.now = 0.0
        self.running: dict[str, Running] = {}
        self.failures: list[Failure] = []
        self.most_parked = 0
        self._programs: dict[str, Program] = {}
        self._events: deque[Any] = deque(nodes)
        for program in programs:
            self._programs[program.spec.task_id] = program
        spec = WorkflowSpec(tuple(p.spec for p in programs), failure_policy=FailurePolicy.FINISH_INDEPENDENT)
        self.run = Run("r", spec, dag.build(spec, ()))
        self.entry: Any = SimpleNamespace(run=self.run, calls={})
        self._perform(self.run.start({}, 0.0))

    def play(self, stop_after: int | None = None) -> None:
        """Take steps until none is left; with `stop_after` cancel the run after so many steps."""
        for step in range(100_000):
            if step == stop_after:
                self._perform(self.run.cancel("enough", self.now))
            if not self._step():
                return
        raise AssertionError("it does not end")

    def _step(self) -> bool:
        self.now += 0.001
        first = {one.assign.slot: one for one in reversed(self.running.values())}
        ready = [one for one in first.values() if not one.waiting]
        if self._events and (not ready or self.choose.random() < 0.7):
            events = [self._events.popleft() for _ in range(self.choose.randint(1, len(self._events)))]
            self._deliver(self.machine.handle_all(events, self.now))
        elif ready:
            self._act(self.choose.choice(ready))
        else:
            due = self.machine.next_deadline()
            if due is None:
                return False
            self.now = max(self.now, due)
            self._deliver(self.machine.tick(self.now))
        self.machine.check()
        self.run.check()
        parked = [one for one in self.running.values() if one.waiting]
        self.most_parked = max(self.most_parked, len(parked))
        return True

    def _act(self, lease: Running) -> None:
        where = (lease.assign.session_id, lease.assign.lease_id, 0)
        if lease.failures and not lease.program.catches:
            self._end(lease, AttemptFailed(*where, Failure(FailureKind.USER_ERROR, "a call failed")))
        elif lease.left:
            now, lease.left = (lease.left, []) if lease.program.at_once else (lease.left[:1], lease.left[1:])
            for program in now:
                lease.numbers += 1
                lease.waiting.add(lease.numbers)
                self._programs[program.spec.task_id] = program
                self._events.append(AttemptSpawned(*where, (program.spec,), is_called=True))
                self._events.append(AttemptAwaits(*where, lease.numbers, program.spec.task_id))
        elif lease.program.fails:
            self._end(lease, AttemptFailed(*where, Failure(FailureKind.USER_ERROR, "it fails")))
        else:
            self._end(lease, AttemptSucceeded(*where, DONE, 0.001))

    def _end(self, lease: Running, event: Any) -> None:
        del self.running[lease.assign.lease_id]
        self._events.append(event)

    def _deliver(self, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case Assign():
                    (attempt,) = effect.attempts
                    program = self._programs[attempt.task_id]
                    # Leases of a slot run one after the other; one that is behind another is not begun here.
                    self.running[effect.lease_id] = Running(effect, program, list(program.calls))
                case AnswerQuestion():
                    self._answer(effect)
                case StopLease() | RevokeLease():
                    lease = self.running.get(effect.lease_id)
                    if lease is not None and isinstance(effect, StopLease):
                        self._end(lease, AttemptFailed(effect.session_id, effect.lease_id, 0, CANCELLED))
                    elif lease is not None and not lease.numbers:
                        self._end(lease, LeaseReturned(effect.session_id, effect.lease_id, ""))
                case TaskAwaits():
                    self._events.extend(calls.begin(self.entry, effect))
                case TasksSpawned():
                    self._perform(self.run.spawn(effect.task_id, effect.tasks, self.now, is_called=effect.is_called))
                case WelcomeWorker() | messages.NodesChanged():
                    pass
                case _:
                    self._perform(self.run.handle(effect, self.now))

    def _answer(self, effect: AnswerQuestion) -> None:
        lease = self.running.get(effect.lease_id)
        if lease is None:
            return
        lease.waiting.remove(effect.number)
        if not isinstance(effect.answer, CallOutputs):
            assert isinstance(effect.answer, Failure), effect
            lease.failures.append(effect.answer)
            self.failures.append(effect.answer)

    def _perform(self, effects: Any) -> None:
        for effect in effects:
            if isinstance(effect, TaskReady | CancelRequested):
                self._events.append(effect)
            else:
                self._events.extend(calls.ended(self.entry, effect))
