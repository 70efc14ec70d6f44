"""Spans that workers report: their limits, and that they stay inside the trace of their attempt."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from lattice.v1 import worker_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lattice_server.core import messages
from lattice_server.core.messages import Assign, AttemptInputs
from lattice_server.core.model import Failure, FailureKind, Function, Isolation, Resources, TaskSpec
from lattice_server.core.states import RunState
from lattice_server.engine.workers.spans import ReportedSpan
from lattice_server.rpc.convert.spans import MAX_ITEMS, MAX_NAME, MAX_SPANS, MAX_TEXT, spans_from_proto
from lattice_server.telemetry.otel import Spans
from lattice_server.telemetry.run_tracer import RunTracer

FUNCTION = Function("d", False, SimpleNamespace(display_name="work"))
WORKER = ("session", "lease")


def reported(span_id: int, parent_id: int = 0, **changes: Any) -> ReportedSpan:
    """Return a span of a task."""
    plain: dict[str, Any] = {"name": f"s{span_id}", "kind": 1, "start_ns": 10, "end_ns": 20, "attributes": {}}
    plain |= {"events": (), "is_failed": False, "message": ""}
    return ReportedSpan(span_id, parent_id, **plain | changes)


class Scene:
    """A tracer with one run of one task, and the spans that it exported."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._spans = Spans(self._exporter, Resource.get_empty())
        self.tracer = RunTracer(self._spans)
        record = SimpleNamespace(spec=TaskSpec("t", FUNCTION))
        run = SimpleNamespace(tasks={"t": record}, workflow_id="", tenant="", spec=SimpleNamespace(display_name="w"))
        self.entry: Any = SimpleNamespace(key="r", run_id="r", run=run, created_s=1.0, trace_id="")
        self.note(messages.RunStarted("w", 1))

    def note(self, fact: Any) -> None:
        """Tell a fact of the run."""
        self.tracer.note(self.entry, fact)

    def assign(self, attempt: int = 1, lease_id: str = "lease", run_id: str = "r") -> str:
        """Send a lease; return the span that it names."""
        lease = Assign(
            session_id="session",
            lease_id=lease_id,
            sequence=1,
            slot=1,
            tenant="",
            function=FUNCTION,
            attempts=(AttemptInputs(run_id, "t", attempt, {}),),
            is_batched=False,
            outputs=(),
            split_outputs=(),
            isolation=Isolation.NONE,
            resources=Resources(),
            gpu_indices=(),
            timeout_s=None,
        )
        sent = self.tracer.perform(lease)
        assert isinstance(sent, Assign)
        return sent.trace_parents[0] if sent.trace_parents else ""

    def exported(self) -> dict[str, ReadableSpan]:
        """Return the spans by name."""
        assert self._spans.provider.force_flush()
        return {span.name: span for span in self._exporter.get_finished_spans()}

    def stop(self) -> None:
        """End the thread that exports spans."""
        asyncio.run(self._spans.stop())


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A scene whose thread ends with the test."""
    made = Scene()
    yield made
    made.stop()


def parent_of(span: ReadableSpan) -> int:
    """Return the id of the parent of a span."""
    assert span.parent is not None
    return span.parent.span_id


def test_spans_stay_below_their_attempt_when_they_name_foreign_parents(scene: Scene) -> None:
    parent = scene.assign()
    _, trace_id, attempt_id, _ = parent.split("-")
    run_id = int(scene.entry.trace_id[:16], 16)
    found = [reported(1, 2), reported(2), reported(3, run_id), reported(4, 4), reported(5, 999)]
    scene.tracer.take_spans(*WORKER, 0, found)
    # The id of the attempt itself, which the task knows.
    scene.tracer.take_spans(*WORKER, 0, [reported(int(attempt_id, 16), name="forged")])
    scene.note(messages.TaskSucceeded("r", "t", 1, {}))
    scene.note(messages.RunFinished(RunState.SUCCEEDED, None))
    spans = scene.exported()
    assert spans.keys() == {"s1", "s2", "s3", "s4", "s5", "attempt work", "invoke_workflow w"}
    assert {span.context.trace_id for span in spans.values()} == {int(trace_id, 16)}
    assert parent_of(spans["s1"]) == 2
    assert {parent_of(spans[name]) for name in ("s2", "s3", "s4", "s5")} == {int(attempt_id, 16)}
    scene.tracer.check([])


@pytest.mark.parametrize(
    "where", [("other", "lease", 0), ("session", "other", 0), ("session", "lease", 1), ("session", "lease", -1)]
)
def test_spans_are_ignored_when_the_session_does_not_have_the_attempt(
    scene: Scene, where: tuple[str, str, int]
) -> None:
    scene.assign()
    scene.tracer.take_spans(*where, [reported(1)])
    assert scene.exported() == {}


def test_spans_are_ignored_when_their_attempt_has_ended(scene: Scene) -> None:
    scene.assign()
    scene.note(messages.TaskSucceeded("r", "t", 1, {}))
    scene.tracer.take_spans(*WORKER, 0, [reported(1)])
    assert scene.exported().keys() == {"attempt work"}


def test_spans_are_ignored_when_their_attempt_has_too_many(scene: Scene) -> None:
    scene.assign()
    for start in range(0, 1000, 100):
        scene.tracer.take_spans(*WORKER, 0, [reported(start + number + 1) for number in range(100)])
    assert len(scene.exported()) == MAX_SPANS


def test_lease_names_the_same_span_when_it_is_sent_again(scene: Scene) -> None:
    assert scene.assign() == scene.assign()
    assert scene.assign(lease_id="another") != scene.assign()


def test_lease_names_no_span_when_its_run_is_not_traced(scene: Scene) -> None:
    assert scene.assign(run_id="other") == ""
    scene.note(messages.RunFinished(RunState.SUCCEEDED, None))
    assert scene.assign() == ""


def test_retry_links_to_the_attempt_that_failed(scene: Scene) -> None:
    first = scene.assign()
    scene.note(messages.TaskRetrying("r", "t", 1, Failure(FailureKind.WORKER_LOST, "gone"), 0.0))
    scene.assign(2, "lease-2")
    failed = scene.tracer
    scene.note(messages.TaskSucceeded("r", "t", 2, {}))
    scene.note(messages.RunFinished(RunState.SUCCEEDED, None))
    failed.check([])
    spans = scene.exported()
    # Of the two attempts, which have one name, the later one is left.
    (link,) = spans["attempt work"].links
    assert f"{link.context.span_id:016x}" == first.split("-")[2]


def test_attempts_end_with_their_run_when_they_are_still_out(scene: Scene) -> None:
    scene.assign()
    scene.note(messages.RunFinished(RunState.CANCELLED, None))
    spans = scene.exported()
    assert spans.keys() == {"attempt work", "invoke_workflow w"}
    assert spans["attempt work"].attributes["error.type"] == "cancelled"
    scene.tracer.check([])


def test_reported_spans_are_cut_to_the_limits() -> None:
    traced = worker_pb2.AttemptTraced()
    for number in range(MAX_SPANS + 5):
        span = traced.spans.add(span_id=(number + 1).to_bytes(8), name="n" * 1000, kind=77, message="m" * 10_000)
        span.start_time.FromNanoseconds(2_000)
        span.end_time.FromNanoseconds(1_000)
        if not number:
            for key in range(MAX_ITEMS + 5):
                span.attributes[f"{key}" * 300].text = "t" * 10_000
                span.events.add(name="e" * 1000)
    found = spans_from_proto(traced, 500)
    assert len(found) == MAX_SPANS
    first = found[0]
    assert (len(first.name), len(first.message), first.kind) == (MAX_NAME, MAX_TEXT, 1)
    assert (first.start_ns, first.end_ns) == (1_500, 1_500)
    assert len(first.attributes) <= MAX_ITEMS
    assert all(len(key) <= MAX_NAME and len(str(value)) <= MAX_TEXT for key, value in first.attributes.items())
    assert len(first.events) == MAX_ITEMS


@pytest.mark.parametrize("span_id", [b"", b"short", bytes(8), b"nine byte"])
def test_reported_span_is_left_out_when_its_id_is_malformed(span_id: bytes) -> None:
    traced = worker_pb2.AttemptTraced(spans=[worker_pb2.Span(span_id=span_id)])
    assert spans_from_proto(traced, 0) == []
