"""Random histories of one run: facts from a scheduler that may be late, callers who append and cancel
meanwhile, and of an open run the stream that holds it."""

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lattice_server.core import messages
from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import (
    AnswerQuestion,
    AskHolder,
    CancelRequested,
    QuestionAsked,
    RunFinished,
    RunStarted,
    TaskCancelled,
    TaskFailed,
    TaskReady,
    TasksAdded,
    TaskSkipped,
    TasksSpawned,
    TaskSucceeded,
    WithdrawQuestion,
)
from lattice_server.core.model import BindingList, Failure, FailureKind, Payload
from lattice_server.core.run import dag
from lattice_server.core.run.limits import Bounds
from lattice_server.core.run.open_run import OpenRun
from lattice_server.core.run.run import Run
from lattice_server.core.states import RunState
from tests.server.core.worlds import items_of, outputs_of, random_task, random_workflow

ASKED = Payload("application/json", "1")
BROKEN = Failure(FailureKind.USER_ERROR, "broken")
ENDS = TaskSucceeded | TaskFailed | TaskCancelled | TaskSkipped


@dataclass
class Held:
    """A task as a scheduler knows it."""

    ready: TaskReady
    after: str
    attempt: int = 0
    questions: int = 0
    is_running: bool = False
    ending: Failure | None = None


class RunHistories(RuleBasedStateMachine):
    """One run, and between it and a scheduler two queues that are emptied at any pace."""

    @initialize(
        seed=st.integers(0, 1 << 32), size=st.integers(0, 9), slice_tasks=st.sampled_from([None, None, 1, 2, 3])
    )
    def begin(self, seed: int, size: int, slice_tasks: int | None) -> None:
        self.rng = Random(seed)
        self.spec = spec = random_workflow(self.rng, size)
        self.slice_tasks = slice_tasks
        is_open = bool(seed % 2)
        bounds = Bounds(60, 6, 2)
        self.run = Run("r", spec, dag.build(spec, ()), bounds=bounds, is_open=is_open, slice_tasks=slice_tasks)
        self.caller = OpenRun(self.run, 5.0, 0.0, max_questions=3) if is_open else None
        # Questions that the caller has received, and the ids of answered ones.
        self.asked: dict[str, QuestionAsked] = {}
        self.answered: set[str] = set()
        self.to_scheduler: deque[TaskReady | CancelRequested] = deque()
        self.to_run: deque[Any] = deque()
        self.held: dict[str, Held] = {}
        self.facts: list[Any] = []
        self.ended: set[str] = set()
        self.told: set[str] = set()
        self.now = 0.0
        self.perform(self.run.start({}, 0.0))

    def perform(self, effects: list[Any]) -> None:
        if self.caller is not None:
            effects = [*self.caller.withdraw(effects), *effects]
        for effect in effects:
            if isinstance(effect, AskHolder | WithdrawQuestion | AnswerQuestion):
                self.tell_caller(effect)
                continue
            if isinstance(effect, TaskReady | CancelRequested):
                self.to_scheduler.append(effect)
                continue
            assert not self.facts or not isinstance(self.facts[-1], RunFinished), "something happened after the end"
            self.facts.append(effect)
            if isinstance(effect, ENDS):
                assert effect.task_id not in self.ended, "a task ended twice"
                self.ended.add(effect.task_id)
            if isinstance(effect, TaskReady):
                assert self.run.state is RunState.RUNNING
        self.now += 1

    def tell_caller(self, effect: Any) -> None:
        match effect:
            case AskHolder():
                name = effect.question.question_id
                assert name not in self.answered, "an answered question is asked"
                self.asked[name] = effect.question
            case WithdrawQuestion():
                self.asked.pop(effect.question_id, None)
            case AnswerQuestion():
                name = f"{effect.lease_id}/{effect.number}"
                assert name not in self.answered, "a question is answered twice"
                self.answered.add(name)
                self.asked.pop(name, None)

    def told_tasks(self, is_running: bool) -> list[str]:
        return [name for name, held in self.held.items() if not held.after and held.is_running is is_running]

    # The queues.

    @precondition(lambda self: self.to_scheduler)
    @rule(many=st.integers(1, 4))
    def scheduler_takes(self, many: int) -> None:
        for _ in range(min(many, len(self.to_scheduler))):
            effect = self.to_scheduler.popleft()
            if isinstance(effect, CancelRequested):
                for task_id in effect.task_ids:
                    self.cancel_held(task_id, effect.failure)
            elif effect.after and (effect.after not in self.held or self.held[effect.after].ending):
                self.to_run.append(messages.TaskReturned("r", effect.spec.task_id))
            else:
                assert effect.spec.task_id not in self.held, "a task was handed over twice"
                assert effect.after or all(map(is_value, effect.inputs.values())), "an input is missing"
                self.held[effect.spec.task_id] = Held(effect, effect.after, effect.history.attempts)

    @precondition(lambda self: self.to_run)
    @rule(many=st.integers(1, 4))
    def run_takes(self, many: int) -> None:
        for _ in range(min(many, len(self.to_run))):
            event = self.to_run.popleft()
            if isinstance(event, TasksSpawned):
                self.perform(self.run.spawn(event.task_id, event.tasks, self.now))
            elif isinstance(event, QuestionAsked):
                self.perform([] if self.caller is None else list(self.caller.ask(event)))
            else:
                self.perform(self.run.handle(event, self.now))
            self.run.check()

    @precondition(lambda self: self.run.is_unsettled)
    @rule()
    def run_goes_on(self) -> None:
        self.perform(self.run.proceed(self.now))

    # The scheduler.

    def cancel_held(self, task_id: str, failure: Failure) -> None:
        held = self.held.get(task_id)
        if held is None or held.ending:
            return
        held.ending = failure
        if not held.is_running:
            self.end(task_id, failure)

    def end(self, task_id: str, failure: Failure) -> None:
        held = self.held.pop(task_id)
        kind = TaskCancelled if failure.kind is FailureKind.CANCELLED else TaskFailed
        self.to_run.append(kind("r", task_id, held.attempt, failure))
        gone = [task_id]
        while gone:
            source = gone.pop()
            for follower in [name for name, other in self.held.items() if other.after == source]:
                del self.held[follower]
                gone.append(follower)

    @precondition(lambda self: self.told_tasks(False))
    @rule(data=st.data())
    def starts(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(self.told_tasks(False)))
        held = self.held[task_id]
        held.is_running, held.attempt = True, held.attempt + 1
        self.to_run.append(messages.TaskStarted("r", task_id, held.attempt, "n", "ip", ()))

    @precondition(lambda self: self.told_tasks(True))
    @rule(data=st.data(), what=st.sampled_from(["succeed", "succeed", "fail", "retry", "log", "spawn", "ask"]))
    def goes_on(self, data: st.DataObject, what: str) -> None:
        self.go_on(data.draw(st.sampled_from(self.told_tasks(True))), what)

    def go_on(self, task_id: str, what: str) -> None:
        held = self.held[task_id]
        named = ("r", task_id, held.attempt)
        is_refused = held.ending is not None and held.ending.kind is not FailureKind.CANCELLED
        match what:
            case "log":
                self.to_run.append(messages.TaskLogged(*named, False, "text", False))
            case "ask":
                # A worker numbers the questions of an attempt, and its session drops repeated reports.
                held.questions += 1
                self.to_run.append(QuestionAsked(*named, "s", f"{task_id}/{held.attempt}", held.questions, "q", ASKED))
            case "spawn":
                known = [record.spec for record in self.run.tasks.values()]
                tasks = tuple(random_task(self.rng, f"{task_id}/{number}", known) for number in range(2))
                self.to_run.append(TasksSpawned("r", task_id, tasks))
            case "succeed" if not is_refused:
                outputs = outputs_of(task_id, {})
                split = {name: items_of(outputs[name]) for name in held.ready.split_outputs}
                self.to_run.append(TaskSucceeded(*named, outputs, split))
                del self.held[task_id]
                for other in self.held.values():
                    other.after = "" if other.after == task_id else other.after
            case "retry" if held.ending is None:
                held.is_running = False
                self.to_run.append(messages.TaskRetrying(*named, BROKEN, 0.0))
            case _:
                self.end(task_id, held.ending or BROKEN)

    # Callers.

    @rule(what=st.sampled_from(["append"] * 6 + ["cancel task"] * 3 + ["cancel", "expire", "abandon"]))
    def caller(self, what: str) -> None:
        match what:
            case "cancel":
                self.perform(self.run.cancel("enough", self.now))
            case "expire":
                self.perform(self.run.expire(1.0, self.now))
            case "abandon" if not self.run.is_terminal:
                self.perform(self.run.abandon(Failure(FailureKind.INTERNAL, "a bug"), self.now))
                assert self.run.is_terminal, "it waits for nobody"
            case "cancel task" if self.run.tasks:
                task_id = self.rng.choice(list(self.run.tasks))
                self.perform(self.run.cancel_task(task_id, "enough", self.now))
            case "append":
                known = [record.spec for record in self.run.tasks.values()]
                added = []
                for number in range(self.rng.randint(1, 3)):
                    added.append(random_task(self.rng, f"a{len(self.run.tasks) + number}", known + added))
                with suppress(LatticeError):
                    self.perform(self.run.append(self.rng.sample(added, len(added)), self.now))

    @precondition(lambda self: self.caller is not None)
    @rule(what=st.sampled_from(["hold", "hold", "leave", "tick", "answer", "answer", "again", "close"]))
    def holder(self, what: str) -> None:
        assert self.caller is not None
        match what:
            case "hold":
                self.perform(list(self.caller.hold()))
            case "leave":
                self.caller.leave(self.now)
            case "tick":
                self.now = max(self.now, self.caller.next_deadline() or 0.0)
                self.perform(list(self.caller.tick(self.now)))
            case "close":
                self.perform(self.run.close(self.now))
            case "answer" if self.asked:
                answer = self.caller.answer(self.rng.choice(list(self.asked)), ASKED)
                assert answer is not None, "a question that was not withdrawn takes no answer"
                self.perform([answer])
            case "again" if self.answered:
                assert self.caller.answer(self.rng.choice(sorted(self.answered)), ASKED) is None

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "run"):
            return
        self.run.check()
        if self.caller is not None:
            self.caller.check()
        assert isinstance(self.facts[0], RunStarted)
        assert self.run.is_terminal == isinstance(self.facts[-1], RunFinished)
        added = sum(len(fact.task_ids) for fact in self.facts if isinstance(fact, TasksAdded))
        assert self.facts[0].task_count + added == len(self.run.tasks)
        for task_id in self.run.tasks:
            assert self.run.explain(task_id, self.now).reasons

    def teardown(self) -> None:
        """When everything is delivered and every attempt succeeds, the run ends."""
        if not hasattr(self, "run"):
            return
        self.perform(self.run.close(self.now))
        for _ in range(1000):
            if not (self.to_scheduler or self.to_run or self.held or self.run.is_unsettled):
                break
            if self.run.is_unsettled:
                self.run_goes_on()
            self.scheduler_takes(100)
            for task_id in self.told_tasks(False):
                self.held[task_id].is_running, self.held[task_id].attempt = True, self.held[task_id].attempt + 1
                self.to_run.append(messages.TaskStarted("r", task_id, self.held[task_id].attempt, "n", "ip", ()))
            for task_id in self.told_tasks(True):
                self.go_on(task_id, "succeed")
            self.run_takes(1000)
            self.holds()
        assert self.run.is_terminal, "it never ends"
        assert self.ended == set(self.run.tasks)


def is_value(binding: Any) -> bool:
    """Whether a binding has no references left."""
    items = binding.items if isinstance(binding, BindingList) else (binding,)
    return all(isinstance(item, Payload) for item in items)
