"""Metrics and traces as a receiver of OTLP gets them from a server with a worker."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import TracerProvider

from lattice_client import (
    AsyncLatticeClient,
    AsyncLatticeWorkflow,
    LatticeClient,
    NotFoundError,
    TaskFailedError,
    context,
    secret,
    task,
)
from lattice_server.telemetry.catalogue import INSTRUMENTS, Kind
from tests.commands import START
from tests.server.apps import NoWorkers, serving
from tests.server.telemetry.receiver import Receiver, attributes_of, receiving, receiving_http
from tests.server.telemetry.workload import double, fail_once, measured, on_a_loop

SERVER, CLIENT = trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Span.SPAN_KIND_CLIENT


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "receiving_kind"), [("otlp", receiving), ("otlp-http", receiving_http)])
@on_a_loop
async def test_receiver_gets_metrics_with_the_types_and_units_of_the_catalogue(
    monkeypatch: pytest.MonkeyPatch, kind: str, receiving_kind: Callable[[], AbstractAsyncContextManager[Receiver]]
) -> None:
    async with receiving_kind() as receiver:
        receiver.name_to(monkeypatch)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        async with measured(metrics=kind, traces=kind) as (app, client):
            assert await client.run_task(double, {"x": 2}) == {"result": 4}
            assert app.metrics_url == ""
        found = receiver.metrics()
    known = {instrument.name: instrument for instrument in INSTRUMENTS}
    assert (
        {"lattice.runs", "lattice.task.duration", "lattice.nodes", "process.cpu.time"} <= found.keys() <= known.keys()
    )
    for name, metric in found.items():
        instrument = known[name]
        assert (metric.unit, metric.description) == (instrument.unit, instrument.description)
        match metric.WhichOneof("data"):
            case "histogram":
                assert instrument.kind is Kind.HISTOGRAM
                assert metric.histogram.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
                assert tuple(metric.histogram.data_points[0].explicit_bounds) == instrument.bounds
            case "sum":
                assert metric.sum.is_monotonic == (instrument.kind is Kind.COUNTER)
                assert metric.sum.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
            case kind:
                assert (kind, instrument.kind) == ("gauge", Kind.GAUGE)
    (point,) = found["lattice.task.duration"].histogram.data_points
    assert attributes_of(point) == {"task": "double", "outcome": "succeeded"}
    assert (point.count, sum(point.bucket_counts)) == (1, 1)
    resource = attributes_of(receiver.resource_metrics[-1].resource)
    assert resource["service.name"] == "lattice-server"
    assert resource["deployment.environment"] == "test"
    run = next(span for span in receiver.spans() if span.name == "invoke_workflow double")
    assert {span.name for span in receiver.spans() if span.trace_id == run.trace_id} >= {"attempt double"}


@pytest.mark.slow
def test_console_has_metrics_and_spans_as_json() -> None:
    kinds = ["--metrics", "console", "--traces", "console"]
    command = [*START, "--head", "--port", "0", "--executor", "local", "--num-cpus", "1", *kinds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = re.search(r"127\.0\.0\.1:\d+", server.stdout.readline())
            assert address is not None
            with LatticeClient(address.group()) as client:
                assert client.run_task(double, {"x": 2}) == {"result": 4}
        finally:
            server.terminate()
        printed, found, position = server.stdout.read(), [], 0
    while (start := printed.find("{\n", position)) >= 0:
        value, position = json.JSONDecoder(parse_constant=pytest.fail).raw_decode(printed, start)
        found.append(value)
    (exported,) = [value for value in found if "resource_metrics" in value]
    metrics = {metric["name"]: metric for metric in exported["resource_metrics"][0]["scope_metrics"][0]["metrics"]}
    (point,) = metrics["lattice.task.duration"]["data"]["data_points"]
    assert (point["count"], point["attributes"]) == (1, {"task": "double", "outcome": "succeeded"})
    assert "invoke_workflow double" in {value.get("name") for value in found}


@pytest.mark.slow
@on_a_loop
async def test_run_is_one_trace_of_its_run_waits_and_attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with serving(traces="otlp", session_ttl_s=30.0) as app, AsyncLatticeClient(app.address) as client:
            workflow = client.create_workflow("chain")
            first = workflow.add_task(double, {"x": 1}, "first")
            second = workflow.add_task(fail_once, {"folder": str(tmp_path)}, "second")
            workflow.add_edge(first, second)
            run = await client.run(workflow)
            await run.result()
            app._tracing.runs.check([])
        spans = receiver.spans()
    run_span = next(span for span in spans if span.name == "invoke_workflow chain")
    call = next(span for span in spans if span.name.endswith("/RunWorkflow"))
    assert run_span.parent_span_id == call.span_id
    assert attributes_of(run_span)["lattice.run.id"] == run.run_id
    assert attributes_of(run_span)["lattice.run.outcome"] == "succeeded"
    below = [span for span in spans if span.parent_span_id == run_span.span_id]
    assert {span.trace_id for span in (*below, run_span, call)} == {call.trace_id}
    found = {(span.name, attributes_of(span)["lattice.attempt"]): span for span in below}
    assert found.keys() == {
        ("queue double", 1),
        ("attempt double", 1),
        ("queue fail_once", 1),
        ("attempt fail_once", 1),
        ("queue fail_once", 2),
        ("attempt fail_once", 2),
    }
    lost, kept = found["attempt fail_once", 1], found["attempt fail_once", 2]
    assert (lost.status.code, attributes_of(lost)["error.type"]) == (trace_pb2.Status.STATUS_CODE_ERROR, "user_error")
    assert kept.status.code != trace_pb2.Status.STATUS_CODE_ERROR
    assert [link.span_id for link in kept.links] == [lost.span_id]
    assert attributes_of(kept) == {
        "lattice.run.id": run.run_id,
        "lattice.task.id": second.task_id,
        "lattice.attempt": 2,
        "lattice.isolation": "none",
        "lattice.node.id": "local",
    }
    for span in below:
        assert run_span.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= run_span.end_time_unix_nano


@pytest.mark.slow
@on_a_loop
async def test_health_watch_is_served_when_calls_are_traced_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with (
            serving(NoWorkers(), traces="otlp", metrics="prometheus") as app,
            grpc.aio.insecure_channel(app.address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()


@pytest.mark.slow
@on_a_loop
async def test_run_is_not_traced_when_its_caller_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with serving(traces="otlp") as app, AsyncLatticeClient(app.address) as client:
            await client.run_task(double, {"x": 2})
        assert receiver.spans() == []


@task
def traced(x: int) -> int:
    """Make spans, one in another, and one in a thread."""
    tracer = context.tracer()
    with tracer.start_as_current_span("outer") as span:
        span.set_attribute("x", x)
        with tracer.start_as_current_span("inner"):
            thread = threading.Thread(target=lambda: tracer.start_span("threaded").end())
            thread.start()
            thread.join()
        try:
            with tracer.start_as_current_span("failing"):
                raise ValueError("found nothing")
        except ValueError:
            pass
    return x


@task
async def traced_async(x: int) -> int:
    """Make a span over a wait."""
    with context.tracer().start_as_current_span(f"async {x}"):
        await asyncio.sleep(0.01)
    return x


@pytest.mark.slow
@on_a_loop
async def test_spans_of_tasks_are_in_the_trace_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider()
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with serving(traces="otlp", session_ttl_s=30.0) as app, AsyncLatticeClient(app.address) as client:
            with provider.get_tracer("caller").start_as_current_span("caller") as caller:
                workflow = client.create_workflow("spans")
                workflow.add_task(traced, {"x": 7}, "a")
                waiting = [workflow.add_task(traced_async, {"x": number}, f"b{number}") for number in range(3)]
                await (await client.run(workflow)).result()
                own = caller.get_span_context()
            assert await client.run_task(traced, {"x": 8}) == {"result": 8}
        spans = receiver.spans()
    ids = {span.span_id for span in spans}
    assert len(ids) == len(spans)
    ours = [span for span in spans if span.trace_id == own.trace_id.to_bytes(16)]
    named = {span.name: span for span in ours}
    call = named["lattice.v1.WorkflowService/RunWorkflow".replace("lattice", "/lattice", 1)]
    assert call.parent_span_id == own.span_id.to_bytes(8)
    attempt = named["attempt traced"]
    outer, inner, failing = named["outer"], named["inner"], named["failing"]
    assert outer.parent_span_id == attempt.span_id
    assert {inner.parent_span_id, failing.parent_span_id} == {outer.span_id}
    assert named["threaded"].parent_span_id == inner.span_id
    assert attributes_of(outer) == {"x": 7}
    assert failing.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    (event,) = failing.events
    assert attributes_of(event)["exception.message"] == "found nothing"
    attempts = {attributes_of(span)["lattice.task.id"]: span for span in ours if span.name == "attempt traced_async"}
    parents = {span.span_id: task_id for task_id, span in attempts.items()}
    assert {span.name: parents[span.parent_span_id] for span in ours if span.name.startswith("async")} == {
        f"async {number}": added.task_id for number, added in enumerate(waiting)
    }
    # The second run has a trace of its own, from the same process.
    others = {span.name for span in spans if span.trace_id != own.trace_id.to_bytes(16)}
    assert {"attempt traced", "outer", "inner", "threaded", "failing"} <= others


@task(isolation="subprocess")
def forge(x: int) -> int:
    """Send frames of spans of its own, and make a span the proper way."""
    from lattice_worker.runner.invocation.output import current

    output = current.get()
    assert output is not None
    span = {"id": "00" * 7 + "2a", "parent": "00" * 7 + "01", "name": "forged", "kind": 1, "start": 1, "end": 2}
    span |= {"attributes": {"trace_id": "ff" * 16}, "events": [], "failed": False, "message": ""}
    for _ in range(3):
        output._channel.send({"kind": "spans", "id": output.header["id"], "spans": [span], "dropped": 0})
    with context.tracer().start_as_current_span("proper"):
        return x


@pytest.mark.slow
@on_a_loop
async def test_sandbox_cannot_write_into_other_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with serving(traces="otlp", session_ttl_s=30.0) as app, AsyncLatticeClient(app.address) as client:
            assert await client.run_task(forge, {"x": 1}) == {"result": 1}
        spans = receiver.spans()
    run = next(span for span in spans if span.name == "invoke_workflow forge")
    attempt = next(span for span in spans if span.name == "attempt forge")
    # One frame is taken; the second and the third, and the proper one after them, are not.
    (forged,) = [span for span in spans if span.name in {"forged", "proper"}]
    assert (forged.name, forged.trace_id, forged.parent_span_id) == ("forged", run.trace_id, attempt.span_id)


@pytest.mark.slow
@on_a_loop
async def test_refused_run_is_a_span_with_its_status_when_its_caller_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = TracerProvider().get_tracer("caller")
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with serving(NoWorkers(), traces="otlp") as app, AsyncLatticeClient(app.address) as client:
            missing = client.get_workflow("nothing")
            for _ in range(2):  # The second run would go over the stream.
                await client.run(_of_one_task(client))
            with tracer.start_as_current_span("caller") as caller, pytest.raises(NotFoundError):
                await client.run(missing)
            with pytest.raises(NotFoundError):
                await client.run(missing)
            own = caller.get_span_context()
        spans = receiver.spans()
    not_found = grpc.StatusCode.NOT_FOUND.value[0]
    (refused,) = [span for span in spans if attributes_of(span).get("rpc.grpc.status_code") == not_found]
    assert (refused.name, refused.kind) == ("/lattice.v1.WorkflowService/RunWorkflow", SERVER)
    assert (refused.trace_id, refused.parent_span_id) == (own.trace_id.to_bytes(16), own.span_id.to_bytes(8))


def _of_one_task(client: AsyncLatticeClient) -> AsyncLatticeWorkflow:
    workflow = client.create_workflow()
    workflow.add_task(double, {"x": 1})
    return workflow


@task(env={"KEY": secret("CANARY")})
def tell(x: int) -> int:
    """Write a secret into spans, also where they are cut."""
    key = os.environ["KEY"]
    tracer = context.tracer()
    with tracer.start_as_current_span(f"{'x' * 240} {key}") as span:
        span.set_attribute(key, f"{'x' * 4080} {key}")
        span.add_event(key, {"quoted": repr(key)})
    with tracer.start_as_current_span("failing"):
        raise ValueError(key)


@pytest.mark.slow
@on_a_loop
async def test_secret_of_a_task_is_in_no_span_and_no_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-4711-of-the-spans"
    monkeypatch.setenv("CANARY", canary)
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with measured(traces="otlp", metrics="otlp") as (_, client):
            with pytest.raises(TaskFailedError):
                await client.run_task(tell, {"x": 1})
        exported = f"{receiver.resource_spans}{receiver.resource_metrics}"
    assert {"failing", "attempt tell"} <= {span.name for span in receiver.spans()}
    assert canary[:8] not in exported
    assert exported.count("***") >= 6


@pytest.mark.slow
@on_a_loop
async def test_blocking_client_and_open_runs_name_the_span_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = TracerProvider().get_tracer("caller")

    def call_blocking(address: str) -> int:
        with LatticeClient(address) as client, tracer.start_as_current_span("blocking") as span:
            assert client.run_task(double, {"x": 1}) == {"result": 2}
            return span.get_span_context().trace_id

    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with serving(traces="otlp", session_ttl_s=30.0) as app, AsyncLatticeClient(app.address) as client:
            blocking = await asyncio.to_thread(call_blocking, app.address)
            with tracer.start_as_current_span("open") as span:
                async with client.open_run("held") as run:
                    await run.add(double, {"x": 2})
                opened = span.get_span_context()
        runs = {span.name: span for span in receiver.spans() if span.name.startswith("invoke_workflow")}
    assert runs["invoke_workflow double"].trace_id == blocking.to_bytes(16)
    # No span for a call that lasts as long as the run: the run is right below the caller's span.
    held = runs["invoke_workflow held"]
    assert (held.trace_id, held.parent_span_id) == (opened.trace_id.to_bytes(16), opened.span_id.to_bytes(8))


@pytest.mark.slow
@on_a_loop
async def test_calls_of_a_program_that_instruments_grpc_are_spans_of_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with serving(traces="otlp", session_ttl_s=30.0) as app:
            await app.ready()
            command = (sys.executable, "-m", "tests.server.telemetry.instrumented", app.address)
            program = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
            _, printed = await program.communicate()
            assert program.returncode == 0, printed.decode()
        spans = receiver.spans()
    by_id = {span.span_id: span for span in spans}
    execute = "/lattice.v1.WorkflowService/RunWorkflow"
    for program_name, workflow in (("blocks", "blocking"), ("suspends", "suspending")):
        run = next(span for span in spans if span.name == f"invoke_workflow {workflow}")
        served = by_id[run.parent_span_id]
        sent = by_id[served.parent_span_id]
        assert [(span.name, span.kind) for span in (served, sent)] == [(execute, SERVER), (execute, CLIENT)]
        assert by_id[sent.parent_span_id].name == program_name
        assert attributes_of(sent) == {
            "rpc.system": "grpc",
            "rpc.service": "lattice.v1.WorkflowService",
            "rpc.method": "RunWorkflow",
            "rpc.grpc.status_code": 0,
        }
        # One span of each call, none of streams.
        assert sum(span.kind == CLIENT and span.name == execute for span in spans) == 2
    refused = [span for span in spans if span.kind == CLIENT and span.status.code == trace_pb2.Status.STATUS_CODE_ERROR]
    assert [(span.name, attributes_of(span)["rpc.grpc.status_code"]) for span in refused] == [
        ("/lattice.v1.WorkflowService/GetRun", grpc.StatusCode.NOT_FOUND.value[0])
    ]
    names = {span.name.rpartition("/")[2] for span in spans if span.kind == CLIENT}
    assert not names & {"WatchRun", "WatchChunks", "OpenRun"}
