"""The metrics of a real server with a real worker, as Prometheus reads them."""

import asyncio
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lattice.v1 import task_pb2

from lattice_client import AsyncLatticeClient, TaskFailedError
from lattice_server.telemetry import TelemetryError
from lattice_server.telemetry.metrics import address_of
from tests.server.apps import NoWorkers, build, serving
from tests.server.telemetry.workload import double, fail, fail_once, labelled, measured, on_a_loop, page_of, samples_of

METHODS = "lattice.v1.TaskService/GetTask", "lattice.v1.WorkflowService/RunWorkflow"


@pytest.mark.slow
@on_a_loop
async def test_metrics_count_runs_tasks_and_calls(tmp_path: Path) -> None:
    async with measured() as (app, client):
        chain = client.create_workflow("chain")
        first = chain.add_task(double, {"x": 1}, "first")
        chain.add_task(double, {"x": first.output}, "second")
        await (await client.run(chain)).result()
        assert await client.run_task(fail_once, {"folder": str(tmp_path)}) == {"result": "done"}
        with pytest.raises(TaskFailedError):
            await client.run_task(fail, {"x": 1})
        assert (await client.server_info()).metrics_url == app.metrics_url
        async with grpc.aio.insecure_channel(app.address) as channel:
            get = channel.unary_unary(
                f"/{METHODS[0]}",
                request_serializer=task_pb2.GetTaskRequest.SerializeToString,
                response_deserializer=task_pb2.GetTaskResponse.FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await get(task_pb2.GetTaskRequest(run_id="none", task_id="none"))
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/any.Name/AtAll")(b"")
            await asyncio.sleep(1.1)  # One sample of the lag.
            page = await page_of(app)
            async with asyncio.timeout(30):  # Until a heartbeat of the worker after its last attempt.
                while labelled(samples_of(page), "lattice_runners").get(("none", "busy")) != 0:
                    await asyncio.sleep(0.1)
                    page = await page_of(app)
    samples = samples_of(page)
    assert labelled(samples, "lattice_runs_started_total") == {("chain",): 1, ("fail_once",): 1, ("fail",): 1}
    # The labels are in the order of their names.
    assert labelled(samples, "lattice_runs_total") == {
        ("succeeded", "chain"): 1,
        ("succeeded", "fail_once"): 1,
        ("failed", "fail"): 1,
    }
    assert labelled(samples, "lattice_tasks_total") == {
        ("", "succeeded", "double"): 2,
        ("", "succeeded", "fail_once"): 1,
        ("user_error", "failed", "fail"): 1,
    }
    assert labelled(samples, "lattice_task_attempts_total") == {("none",): 5}
    assert labelled(samples, "lattice_task_retries_total") == {("user_error",): 1}
    assert labelled(samples, "lattice_task_duration_seconds_count") == {
        ("succeeded", "double"): 2,
        ("succeeded", "fail_once"): 1,
        ("failed", "fail_once"): 1,
        ("failed", "fail"): 1,
    }
    assert labelled(samples, "lattice_queue_wait_seconds_count") == {(): 5}
    assert labelled(samples, "lattice_dispatch_duration_seconds_count") == {(): 5}
    assert labelled(samples, "lattice_output_size_bytes_count") == {("inline",): 3}
    assert labelled(samples, "lattice_output_size_bytes_sum") == {("inline",): len("2") + len("4") + len('"done"')}
    assert labelled(samples, "rpc_server_call_duration_seconds_count")[METHODS[0], "NOT_FOUND"] == 1
    assert not any("any.Name" in str(labels) for _, labels in samples)
    assert labelled(samples, "lattice_server_errors_total") == {("RUN_NOT_FOUND",): 1}
    assert labelled(samples, "lattice_server_streams")[("lattice.v1.WorkerService/Connect",)] == 1
    assert labelled(samples, "rpc_server_call_duration_seconds_count")[METHODS[1], "OK"] == 1
    assert labelled(samples, "lattice_nodes") == {("ready",): 1, ("detached",): 0, ("draining",): 0}
    assert labelled(samples, "lattice_node_cpu_capacity") == {("local",): 2}
    # On a busy machine the worker may reconnect.
    assert labelled(samples, "lattice_worker_sessions_total")[("joined",)] == 1
    # One process for each CPU is idle, and each process that ran an attempt; at other levels one sealed process is.
    assert labelled(samples, "lattice_runners")["none", "busy"] == 0
    assert labelled(samples, "lattice_runners")["none", "idle"] >= 2
    assert labelled(samples, "lattice_runner_starts_total")[("none",)] >= 2
    assert labelled(samples, "lattice_tasks_active") == {("blocked",): 0, ("queued",): 0, ("running",): 0}
    assert labelled(samples, "lattice_run_events_total") == {(): 6 + 6 + 4}
    if (promtool := shutil.which("promtool")) is not None:
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=page, text=True, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.slow
@on_a_loop
async def test_queue_and_active_tasks_are_shown_while_no_node_is_there() -> None:
    async with serving(NoWorkers(), metrics="prometheus") as app, AsyncLatticeClient(app.address) as client:
        workflow = client.create_workflow("waiting")
        first = workflow.add_task(double, {"x": 1}, "first")
        workflow.add_task(double, {"x": first.output}, "second")
        workflow.add_task(double, {"x": 2}, "third")
        await client.run(workflow)
        await asyncio.sleep(0.05)
        samples = samples_of(await page_of(app))
    assert labelled(samples, "lattice_queue_size") == {(): 2}
    assert labelled(samples, "lattice_queue_oldest_age_seconds")[()] >= 0.05
    assert labelled(samples, "lattice_tasks_active") == {("blocked",): 1, ("queued",): 2, ("running",): 0}
    assert labelled(samples, "lattice_runs_active") == {("running",): 1, ("cancelling",): 0}
    assert labelled(samples, "lattice_nodes") == {("ready",): 0, ("detached",): 0, ("draining",): 0}


@pytest.mark.slow
@on_a_loop
async def test_health_watch_is_served_while_calls_are_counted() -> None:
    async with serving(NoWorkers(), metrics="prometheus") as app, grpc.aio.insecure_channel(app.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        samples = samples_of(await page_of(app))
        watch.cancel()
    assert labelled(samples, "lattice_server_streams") == {("grpc.health.v1.Health/Watch",): 1}


@pytest.mark.slow
@on_a_loop
async def test_server_without_metrics_counts_nothing() -> None:
    async with serving(NoWorkers()) as app:
        assert app.metrics_url == ""
        assert app._engine.orchestrator.observers == []
        assert app._engine.scheduler.on_pass is None


PROGRAM = """
import asyncio, sys
from lattice_server.app import App
from lattice_server.config import ServerConfig
from lattice_server.telemetry import TelemetryError

async def build(missing, setting, kind):
    sys.modules[missing] = None
    try:
        App(ServerConfig(executor="local", **{setting: kind}))
    except TelemetryError as error:
        print(error)

asyncio.run(build(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "setting", "kind"),
    [
        ("prometheus_client", "metrics", "prometheus"),
        ("opentelemetry.sdk.metrics.export", "metrics", "console"),
        ("opentelemetry.instrumentation.grpc", "traces", "console"),
    ],
)
def test_telemetry_is_refused_with_advice_when_a_package_is_missing(missing: str, setting: str, kind: str) -> None:
    # In a process of its own, because modules that were imported before would still have the package.
    command = [sys.executable, "-c", PROGRAM, missing, setting, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert f'{setting} need more packages: pip install "lattice-control-plane[telemetry]"' in done.stdout


@pytest.mark.slow
@on_a_loop
async def test_metrics_are_refused_when_their_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TelemetryError, match="choose another metrics_address"):
            await build(NoWorkers(), metrics="prometheus", metrics_address=address).start()


def test_address_of_metrics_is_the_setting_or_that_of_the_environment() -> None:
    environment = {"OTEL_EXPORTER_PROMETHEUS_HOST": "::1", "OTEL_EXPORTER_PROMETHEUS_PORT": "9464"}
    assert address_of("", {}) == ("127.0.0.1", 0)
    assert address_of("", environment) == ("::1", 9464)
    assert address_of("[::1]:80", {}) == ("::1", 80)
    for wrong in ("localhost", ":80", "a:b", "a:70000"):
        with pytest.raises(TelemetryError, match="must be host:port"):
            address_of(wrong, {})
