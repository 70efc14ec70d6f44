"""Counts runs, tasks and sessions by the facts of runs and the effects of the scheduler, on the main thread."""

import time
from collections.abc import Callable
from typing import Any

from lattice_server.core.messages import (
    CloseSession,
    Fact,
    ForgetSession,
    RunFinished,
    RunStarted,
    TaskCancelled,
    TaskFailed,
    TaskRetrying,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
    WelcomeWorker,
    WorkerEffect,
)
from lattice_server.core.model import Artifact, Failure, Function, Isolation
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.engine.run_entry import RunEntry
from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Counter, Histogram, Names, Reading


class RunMeter:
    """An observer of the orchestrator."""

    def __init__(self) -> None:
        self._workflows, self._tasks = Names(), Names()
        self._started, self._ended = Counter(catalogue.RUNS_STARTED), Counter(catalogue.RUNS)
        self._run_duration = Histogram(catalogue.RUN_DURATION)
        self._events = 0
        self._task_ends = Counter(catalogue.TASKS)
        self._attempts, self._retries = Counter(catalogue.TASK_ATTEMPTS), Counter(catalogue.TASK_RETRIES)
        self._task_duration = Histogram(catalogue.TASK_DURATION)
        self._output_size = Histogram(catalogue.OUTPUT_SIZE)
        self._wait, self._dispatch = Histogram(catalogue.QUEUE_WAIT), Histogram(catalogue.DISPATCH)
        self._sessions = Counter(catalogue.SESSIONS)
        self._calls = Counter(catalogue.TASK_CALLS)
        self._call_duration = Histogram(catalogue.TASK_CALL_DURATION)
        self._sandboxed = Counter(catalogue.SANDBOX_ATTEMPTS)
        self._by_type: dict[type[Fact], Callable[[RunEntry, Any], None]] = {
            RunStarted: self._note_run_start,
            RunFinished: self._note_run_end,
            TaskStarted: self._note_start,
            TaskSucceeded: self._note_success,
            TaskRetrying: self._note_retry,
            **dict.fromkeys((TaskFailed, TaskCancelled, TaskSkipped), self._note_unsuccessful),
        }

    def note(self, entry: RunEntry, fact: Fact) -> None:
        """Count a fact of a run."""
        self._events += 1
        if (count := self._by_type.get(type(fact))) is not None:
            count(entry, fact)

    def _note_run_start(self, entry: RunEntry, _: RunStarted) -> None:
        self._started.add(self._workflows.bounded(entry.run.spec.display_name))

    def _note_run_end(self, entry: RunEntry, fact: RunFinished) -> None:
        workflow, outcome = self._workflows.bounded(entry.run.spec.display_name), fact.state.value
        self._ended.add(workflow, outcome)
        self._run_duration.record(time.time() - entry.created_s, workflow, outcome)

    def _note_success(self, entry: RunEntry, fact: TaskSucceeded) -> None:
        record = entry.run.tasks[fact.task_id]
        spec = record.spec
        task = self._name_of(spec.function)
        self._task_ends.add(task, "succeeded", "")
        if record.items is None and not record.is_reused:
            self._task_duration.record(fact.duration_s, task, "succeeded")
            self._note_outputs(fact)
            if spec.isolation is not Isolation.NONE:
                self._sandboxed.add(spec.isolation.value, "")
        if record.is_called:
            self._note_call(record, "succeeded")

    def _note_retry(self, entry: RunEntry, fact: TaskRetrying) -> None:
        self._retries.add(fact.failure.kind.value)
        self._note_failed_attempt(entry.run.tasks[fact.task_id], fact.failure)

    def perform(self, effect: WorkerEffect) -> WorkerEffect:
        """Count an effect that goes to a worker."""
        match effect:
            case WelcomeWorker():
                self._sessions.add("resumed" if effect.resumed else "joined")
            case ForgetSession():
                self._sessions.add("lost")
            case CloseSession():
                self._sessions.add(effect.reason.lower())
            case _:
                pass
        return effect

    def read(self) -> list[Reading]:
        """Return all numbers."""
        counted = (
            self._started,
            self._ended,
            self._run_duration,
            self._task_ends,
            self._attempts,
            self._retries,
            self._task_duration,
            self._output_size,
            self._wait,
            self._dispatch,
            self._sessions,
            self._calls,
            self._call_duration,
            self._sandboxed,
        )
        return [Reading(catalogue.RUN_EVENTS, {(): self._events}), *(meter.read() for meter in counted)]

    def _note_start(self, entry: RunEntry, fact: TaskStarted) -> None:
        self._attempts.add(entry.run.tasks[fact.task_id].spec.isolation.value)
        if fact.sent_at is not None and fact.queued_at is not None:
            self._wait.record(fact.sent_at - fact.queued_at)
            if fact.at is not None:
                self._dispatch.record(fact.at - fact.sent_at)

    def _note_outputs(self, fact: TaskSucceeded) -> None:
        for payload in fact.outputs.values():
            content = payload.content
            if isinstance(content, Artifact):
                self._output_size.record(content.size_bytes, "artifact")
            else:
                self._output_size.record(len(content), "inline")

    def _note_unsuccessful(self, entry: RunEntry, fact: TaskFailed | TaskCancelled | TaskSkipped) -> None:
        record = entry.run.tasks[fact.task_id]
        outcome = {TaskFailed: "failed", TaskCancelled: "cancelled", TaskSkipped: "skipped"}[type(fact)]
        failure: Failure | None = fact.failure
        kind = "" if failure is None else failure.kind.value
        self._task_ends.add(self._name_of(record.spec.function), outcome, kind)
        if isinstance(fact, TaskFailed):
            self._note_failed_attempt(record, fact.failure)
        if record.is_called:
            self._note_call(record, outcome)

    def _note_call(self, record: TaskRecord, outcome: str) -> None:
        self._calls.add(outcome)
        if record.queued_at is not None and record.ended_at is not None:
            self._call_duration.record(record.ended_at - record.queued_at)

    def _note_failed_attempt(self, record: TaskRecord, failure: Failure) -> None:
        """Count the time of an attempt that failed, if it had started."""
        if record.started_at is not None and record.items is None:
            ended_at = time.monotonic() if record.ended_at is None else record.ended_at
            self._task_duration.record(ended_at - record.started_at, self._name_of(record.spec.function), "failed")
        if record.spec.isolation is not Isolation.NONE:
            self._sandboxed.add(record.spec.isolation.value, failure.kind.value)

    def _name_of(self, function: Function) -> str:
        """Return the value of the label `task`: the name of the function, since ids of tasks have no bound."""
        return self._tasks.bounded(function_name(function))


def function_name(function: Function) -> str:
    """Return the name of a function, as its caller gave it."""
    definition: Any = function.definition
    return getattr(definition, "display_name", "") or function.entrypoint
