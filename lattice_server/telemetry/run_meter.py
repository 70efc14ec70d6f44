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
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Counter, Histogram, Names, Reading

MAX_KEPT = 100
SESSION_EFFECTS = (WelcomeWorker, ForgetSession, CloseSession)


class RunMeter:
    """An observer of the orchestrator.

    The names and times of common facts are kept, and counted for many facts at once. Between two facts other code fills
    the processor's caches, and code that is not in them takes ten times as long. No value of a run is kept.
    """

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
        self._kept: list[tuple[Any, ...]] = []  # A method that counts, and its arguments.
        self._by_type: dict[type[Fact], Callable[[RunEntry, Any], tuple[Any, ...] | None]] = {
            RunStarted: self._kept_of_run_start,
            RunFinished: self._kept_of_run_end,
            TaskStarted: self._kept_of_start,
            TaskSucceeded: self._kept_of_success,
            TaskRetrying: self._note_retry,
            **dict.fromkeys((TaskFailed, TaskCancelled, TaskSkipped), self._note_unsuccessful),
        }

    def note(self, entry: RunEntry, fact: Fact) -> None:
        """Count a fact of a run now, or keep its names and times to count them later."""
        self._events += 1
        note = self._by_type.get(type(fact))
        if note is not None and (kept := note(entry, fact)) is not None:
            self._kept.append(kept)
            if len(self._kept) >= MAX_KEPT:
                self._count_kept()

    def _count_kept(self) -> None:
        for count, *numbers in self._kept:
            count(*numbers)
        self._kept.clear()

    def _kept_of_run_start(self, entry: RunEntry, _: RunStarted) -> tuple[Any, ...]:
        return self._count_run_start, entry.run.spec.display_name

    def _count_run_start(self, name: str) -> None:
        self._started.add(self._workflows.bounded(name))

    def _kept_of_run_end(self, entry: RunEntry, fact: RunFinished) -> tuple[Any, ...]:
        return self._count_run_end, entry.run.spec.display_name, fact.state.value, time.time() - entry.created_s

    def _count_run_end(self, name: str, outcome: str, duration_s: float) -> None:
        workflow = self._workflows.bounded(name)
        self._ended.add(workflow, outcome)
        self._run_duration.record(duration_s, workflow, outcome)

    def _kept_of_success(self, entry: RunEntry, fact: TaskSucceeded) -> tuple[Any, ...]:
        record = entry.run.tasks[fact.task_id]
        spec = record.spec
        if record.is_called:
            self._note_call(record, "succeeded")
        if record.items is not None or record.is_reused:
            return self._count_end, spec.function, "succeeded"
        sizes = [
            (content.size_bytes, "artifact") if isinstance(content, Artifact) else (len(content), "inline")
            for content in [payload.content for payload in fact.outputs.values()]
        ]
        return self._count_success, spec.function, spec.isolation, fact.duration_s, sizes

    def _count_success(
        self, function: Function, isolation: Isolation, duration_s: float, sizes: list[tuple[int, str]]
    ) -> None:
        self._count_end(function, "succeeded")
        self._task_duration.record(duration_s, self._name_of(function), "succeeded")
        for size_bytes, kind in sizes:
            self._output_size.record(size_bytes, kind)
        if isolation is not Isolation.NONE:
            self._sandboxed.add(isolation.value, "")

    def _count_end(self, function: Function, outcome: str, kind: str = "") -> None:
        self._task_ends.add(self._name_of(function), outcome, kind)

    def _kept_of_start(self, entry: RunEntry, fact: TaskStarted) -> tuple[Any, ...]:
        isolation = entry.run.tasks[fact.task_id].spec.isolation
        return self._count_start, isolation, fact.queued_at, fact.sent_at, fact.at

    def _count_start(
        self, isolation: Isolation, queued_at: float | None, sent_at: float | None, at: float | None
    ) -> None:
        self._attempts.add(isolation.value)
        if sent_at is not None and queued_at is not None:
            self._wait.record(sent_at - queued_at)
            if at is not None:
                self._dispatch.record(at - sent_at)

    def _note_retry(self, entry: RunEntry, fact: TaskRetrying) -> None:
        self._retries.add(fact.failure.kind.value)
        self._note_failed_attempt(entry.run.tasks[fact.task_id], fact.failure)

    def perform(self, effect: WorkerEffect) -> WorkerEffect:
        """Count an effect that goes to a worker."""
        if isinstance(effect, SESSION_EFFECTS):
            match effect:
                case WelcomeWorker():
                    self._sessions.add("resumed" if effect.resumed else "joined")
                case ForgetSession():
                    self._sessions.add("lost")
                case CloseSession():
                    self._sessions.add(effect.reason.lower())
        return effect

    def read(self) -> list[Reading]:
        """Return all numbers."""
        self._count_kept()
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

    def _note_unsuccessful(self, entry: RunEntry, fact: TaskFailed | TaskCancelled | TaskSkipped) -> None:
        record = entry.run.tasks[fact.task_id]
        outcome = {TaskFailed: "failed", TaskCancelled: "cancelled", TaskSkipped: "skipped"}[type(fact)]
        failure: Failure | None = fact.failure
        kind = "" if failure is None else failure.kind.value
        self._count_end(record.spec.function, outcome, kind)
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
