"""Writes one trace for each run: the run, the waits of its tasks, their attempts, and the spans that attempts report.

Rule: a span is written by the facts of its run. A run whose caller's trace is not sampled costs one lookup a fact.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lattice_server.core.messages import (
    Assign,
    Fact,
    RunFinished,
    RunStarted,
    TaskCancelled,
    TaskFailed,
    TaskRetrying,
    TaskStarted,
    TaskSucceeded,
    WorkerEffect,
)
from lattice_server.core.model import Failure
from lattice_server.core.states import RunState
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.workers.spans import ReportedSpan
from lattice_server.telemetry.otel import Span, Spans
from lattice_server.telemetry.run_meter import function_name

# More spans of one attempt are ignored, also over several reports.
MAX_SPANS = 512


@dataclass(slots=True, eq=False)
class _Attempt:
    """A traced attempt that a worker has. `taken` counts the spans that it reported."""

    span: Span
    number: int
    lease: tuple[str, str]
    taken: int = 0


@dataclass(slots=True, eq=False)
class _Trace:
    """The trace of a run that has not ended. `failed` are the spans of the last failed attempts, by task."""

    entry: RunEntry
    span: Span
    attempts: dict[str, _Attempt] = field(default_factory=dict)
    failed: dict[str, Span] = field(default_factory=dict)


class RunTracer:
    """An observer of the orchestrator, and the sink of the spans that workers report."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._runs: dict[str, _Trace] = {}
        self._leases: dict[tuple[str, str], list[_Attempt | None]] = {}

    def note(self, entry: RunEntry, fact: Fact) -> None:
        """Take a fact of a run."""
        if isinstance(fact, RunStarted):
            self._begin(entry)
        elif (trace := self._runs.get(entry.key)) is not None:
            match fact:
                case TaskStarted():
                    self._note_start(trace, fact)
                case TaskSucceeded():
                    self._end_attempt(trace, fact.task_id, fact.attempt, None, fact.at)
                case TaskRetrying() | TaskCancelled():
                    self._end_attempt(trace, fact.task_id, fact.attempt, fact.failure, None)
                case TaskFailed():
                    self._end_attempt(trace, fact.task_id, fact.attempt, fact.failure, fact.at)
                case RunFinished():
                    self._end(trace, fact)
                case _:
                    pass

    def perform(self, effect: WorkerEffect) -> WorkerEffect:
        """Begin the spans of the attempts of a lease, and name them in the lease."""
        if not isinstance(effect, Assign) or not self._runs:
            return effect
        lease = (effect.session_id, effect.lease_id)
        attempts = [self._attempt(effect, lease, item) for item in range(len(effect.attempts))]
        if not any(attempts):
            return effect
        self._leases[lease] = attempts
        parents = ("" if attempt is None else self._spans.traceparent(attempt.span) for attempt in attempts)
        return replace(effect, trace_parents=tuple(parents))

    def take_spans(self, session_id: str, lease_id: str, item: int, spans: Sequence[ReportedSpan]) -> None:
        """Write the spans of an attempt into the trace of its run; see `SpanSink`."""
        attempts = self._leases.get((session_id, lease_id), ())
        attempt = attempts[item] if 0 <= item < len(attempts) else None
        if attempt is None:
            return
        spans = spans[: MAX_SPANS - attempt.taken]
        attempt.taken += len(spans)
        # An attempt may not hang its spans below those of another one, nor take the id of a span of the server.
        own = {span.span_id for span in spans}
        for span in spans:
            parent_id = span.parent_id if span.parent_id in own and span.parent_id != span.span_id else None
            self._spans.write(attempt.span, span, parent_id)

    def _begin(self, entry: RunEntry) -> None:
        run = entry.run
        attributes = {
            "gen_ai.operation.name": "invoke_workflow",
            "lattice.run.id": entry.run_id,
            "lattice.workflow.id": run.workflow_id,
            "lattice.tenant": run.tenant,
        }
        name = f"invoke_workflow {run.spec.display_name}".rstrip()
        span = self._spans.begin(name, int(entry.created_s * 1e9), attributes)
        if span is not None:
            self._runs[entry.key] = _Trace(entry, span)
            entry.trace_id = self._spans.traceparent(span).split("-")[1]

    def _attempt(self, effect: Assign, lease: tuple[str, str], item: int) -> _Attempt | None:
        """Return a member of a lease with its span; a lease that is sent again has the same spans."""
        member = effect.attempts[item]
        trace = self._runs.get(member.run_id)
        if trace is None:
            return None
        known = trace.attempts.get(member.task_id)
        if known is not None and (known.number, known.lease) == (member.attempt, lease):
            return known
        if known is not None:  # Its lease was returned before it started, so that it never was an attempt.
            self._forget(known)
        attributes: dict[str, str | int] = {
            **self._named(trace, member.task_id),
            "lattice.attempt": member.attempt,
            "lattice.isolation": effect.isolation.value,
        }
        name = f"attempt {self._task_name(trace, member.task_id)}"
        link = trace.failed.get(member.task_id)
        span = self._spans.child(trace.span, name, time.time_ns(), attributes, link, is_remote_work=True)
        made = trace.attempts[member.task_id] = _Attempt(span, member.attempt, lease)
        return made

    def _note_start(self, trace: _Trace, fact: TaskStarted) -> None:
        attempt = trace.attempts.get(fact.task_id)
        if attempt is None or attempt.number != fact.attempt:
            return
        ahead_s = time.time() - time.monotonic()
        if fact.queued_at is not None and fact.sent_at is not None:
            name = f"queue {self._task_name(trace, fact.task_id)}"
            attributes: dict[str, str | int] = {**self._named(trace, fact.task_id), "lattice.attempt": fact.attempt}
            begun = self._spans.child(trace.span, name, _ns(fact.queued_at + ahead_s), attributes)
            self._spans.end(begun, _ns(fact.sent_at + ahead_s))
        self._spans.note(attempt.span, {"lattice.node.id": fact.node_id})
        if fact.at is not None:
            self._spans.event(attempt.span, "started", _ns(fact.at + ahead_s))

    def _end_attempt(self, trace: _Trace, task_id: str, number: int, failure: Failure | None, at: float | None) -> None:
        attempt = trace.attempts.get(task_id)
        if attempt is None or attempt.number != number:
            return
        del trace.attempts[task_id]
        self._forget(attempt)
        end_ns = time.time_ns() if at is None else _ns(at + time.time() - time.monotonic())
        # Messages of users' errors are theirs: the spans that they report may have them.
        self._spans.end(attempt.span, end_ns, "" if failure is None else failure.kind.value)
        if failure is None:
            trace.failed.pop(task_id, None)
        else:
            trace.failed[task_id] = attempt.span

    def _end(self, trace: _Trace, fact: RunFinished) -> None:
        del self._runs[trace.entry.key]
        for attempt in list(trace.attempts.values()):
            self._forget(attempt)
            self._spans.end(attempt.span, time.time_ns(), "cancelled")
        self._spans.note(trace.span, {"lattice.run.outcome": fact.state.value})
        is_failed = fact.state is not RunState.SUCCEEDED
        kind = fact.failure.kind.value if fact.failure is not None else fact.state.value
        self._spans.end(trace.span, time.time_ns(), kind if is_failed else "")

    def _forget(self, attempt: _Attempt) -> None:
        attempts = self._leases.get(attempt.lease)
        if attempts is not None:
            attempts[attempts.index(attempt)] = None
            if not any(attempts):
                del self._leases[attempt.lease]

    def _named(self, trace: _Trace, task_id: str) -> dict[str, str]:
        return {"lattice.run.id": trace.entry.run_id, "lattice.task.id": task_id}

    def _task_name(self, trace: _Trace, task_id: str) -> str:
        """Return the name of a task's function: names of spans are few, and ids are attributes."""
        record = trace.entry.run.tasks.get(task_id)
        return "" if record is None else function_name(record.spec.function)

    def check(self, runs: Iterable[str]) -> None:
        """Assert that only live runs have traces, and only their attempts leases; for tests."""
        assert self._runs.keys() <= set(runs)
        held = {id(attempt) for trace in self._runs.values() for attempt in trace.attempts.values()}
        leased = (found for attempts in self._leases.values() for found in attempts if found is not None)
        assert {id(found) for found in leased} <= held


def _ns(time_s: float) -> int:
    return int(time_s * 1e9)
