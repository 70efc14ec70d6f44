"""Telemetry with real receivers over real processes: Prometheus, and one trace over two nodes."""

import asyncio
import json
import math
import shutil
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from opentelemetry import trace

from lattice_client import AsyncLatticeClient, context, task
from tests.commands import START
from tests.server.apps import NoWorkers, serving
from tests.server.telemetry.load import SETTINGS, load, until
from tests.server.telemetry.receiver import attributes_of, receiving
from tests.server.telemetry.test_deploy import panel_queries
from tests.server.telemetry.workload import measured, on_a_loop

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
WAIT_S = 60.0


@asynccontextmanager
async def running(*command: str) -> AsyncIterator[None]:
    """Run a program while the block runs. Its end does not block the event loop, by which workers say goodbye."""
    process = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


def queried(port: int, query: str) -> list[float] | None:
    """Return the values of a query of Prometheus; None while it does not serve yet."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/api/v1/query?query={quote(query)}", timeout=10) as response:
            return [float(found["value"][1]) for found in json.load(response)["data"]["result"]]
    except URLError:
        return None


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="scripts/install_missing.sh prometheus")
@on_a_loop
async def test_each_query_of_the_dashboard_returns_data_after_a_scripted_load(tmp_path: Path, unused_port: int) -> None:
    async with measured(journal=str(tmp_path / "journal"), **SETTINGS) as (app, client):
        target = app.metrics_url.removeprefix("http://").removesuffix("/metrics")
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "lattice", "static_configs": [{"targets": [target]}]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        async with running("prometheus", *flags, f"--web.listen-address=127.0.0.1:{unused_port}"):

            async def has(query: str) -> bool:
                found = await asyncio.to_thread(queried, unused_port, query.replace("$__rate_interval", "5m"))
                return any(math.isfinite(value) for value in found or ())

            await until(lambda: has("up == 1"))
            # Twice: a series begins with its first value, of which it has no rate.
            for name in ("first", "second"):
                (folder := tmp_path / name).mkdir()
                await load(client, folder, lambda: until(lambda: has("lattice_calls_waiting > 0")))
            missing, ends_at = list(panel_queries()), time.monotonic() + WAIT_S
            while (missing := [query for query in missing if not await has(query)]) and time.monotonic() < ends_at:
                await asyncio.sleep(0.5)
            assert missing == []
            assert queried(unused_port, 'lattice_runs_total{workflow="chain",outcome="succeeded"}') == [2]


@task(node_selector={"at": "left"})
def begin(folder: str) -> str:
    """Make a span on one node."""
    with context.tracer().start_as_current_span("on the left"):
        return folder


@task(node_selector={"at": "left"}, isolation="subprocess")
def seal(folder: str) -> str:
    """Make a span in a sandbox, and try to name another trace."""
    other = trace.SpanContext(1, 1, is_remote=True, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))
    below = trace.set_span_in_context(trace.NonRecordingSpan(other))
    with context.tracer().start_as_current_span("on the inside", below, links=[trace.Link(other)]):
        return folder


@task(node_selector={"at": "right"}, retries=1, retry_backoff=0.0)
def finish(folder: str) -> str:
    """Make a span on the other node, and fail the first time."""
    with context.tracer().start_as_current_span("on the right"):
        marker = Path(folder) / "failed"
        if not marker.exists():
            marker.touch()
            raise ValueError("the first time")
        return "done"


@on_a_loop
async def test_run_over_two_nodes_with_a_retry_is_one_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with receiving() as receiver:
        receiver.name_to(monkeypatch)
        async with (
            serving(NoWorkers(), traces="otlp", session_ttl_s=30.0) as app,
            AsyncLatticeClient(app.address) as client,
        ):
            worker = (*START, "--worker", "--addr", app.address, "--num-cpus", "1")
            async with (
                running(*worker, "--node-id", "left", "--label", "at=left"),
                running(*worker, "--node-id", "right", "--label", "at=right"),
            ):
                async with asyncio.timeout(WAIT_S):
                    while len(await client.nodes()) < 2:
                        await asyncio.sleep(0.1)
                workflow = client.create_workflow("over two nodes")
                first = workflow.add_task(begin, {"folder": str(tmp_path)})
                sealed = workflow.add_task(seal, {"folder": first.output})
                workflow.add_task(finish, {"folder": sealed.output})
                run = await client.run(workflow)
                await run.result()
        spans = receiver.spans()
    top = next(span for span in spans if span.name == "invoke_workflow over two nodes")
    ours = [span for span in spans if span.trace_id == top.trace_id]
    by_id = {span.span_id: span for span in ours}
    attempts = {
        (span.name, attributes_of(span)["lattice.attempt"]): span for span in ours if span.name.startswith("attempt")
    }
    assert {(*key, attributes_of(span)["lattice.node.id"]) for key, span in attempts.items()} == {
        ("attempt begin", 1, "left"),
        ("attempt seal", 1, "left"),
        ("attempt finish", 1, "right"),
        ("attempt finish", 2, "right"),
    }
    failed, kept = attempts["attempt finish", 1], attempts["attempt finish", 2]
    assert attributes_of(failed)["error.type"] == "user_error"
    assert [link.span_id for link in kept.links] == [failed.span_id]
    own = [(span.name, by_id[span.parent_span_id]) for span in ours if span.name.startswith("on the")]
    assert attributes_of(attempts["attempt seal", 1])["lattice.isolation"] == "subprocess"
    assert sorted((name, parent.name, attributes_of(parent)["lattice.attempt"]) for name, parent in own) == [
        ("on the inside", "attempt seal", 1),
        ("on the left", "attempt begin", 1),
        ("on the right", "attempt finish", 1),
        ("on the right", "attempt finish", 2),
    ]
    # Every span but the caller's call has its parent in the trace.
    orphans = [span.name for span in ours if span.parent_span_id not in by_id]
    assert orphans == ["/lattice.v1.WorkflowService/RunWorkflow"]
