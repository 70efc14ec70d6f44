"""Collectors that refuse or never answer, malformed variables of OpenTelemetry, and scrapers that misbehave."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from lattice_client import AsyncLatticeClient
from lattice_server.telemetry import TelemetryError, exporters, prometheus
from lattice_server.telemetry.prometheus import serve
from tests.server.apps import NoWorkers, build, serving
from tests.server.telemetry.workload import double, labelled, measured, on_a_loop, page_of, samples_of


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a collector that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["otlp", "otlp-http"])
@on_a_loop
async def test_server_works_and_stops_when_its_collector_never_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, silent: str, kind: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", silent)
    # A call over HTTP lasts until its timeout: nothing outside can end it.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2" if kind == "otlp-http" else "600")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setattr(exporters, "LAST_EXPORT_S", 0.3)
    async with measured(metrics=kind, traces=kind) as (_, client):
        for number in range(20):
            assert await client.run_task(double, {"x": number}) == {"result": 2 * number}
    assert [record.message for record in caplog.records if record.name == exporters.__name__].count(
        "the collector has not answered for 0 s: the last export is given up"
    ) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["otlp", "otlp-http"])
@on_a_loop
async def test_server_works_and_stops_when_its_collector_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(exporters, "LAST_EXPORT_S", 0.3)
    async with measured(metrics=kind, traces=kind) as (_, client):
        assert await client.run_task(double, {"x": 1}) == {"result": 2}
    assert "the last export is given up" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        *(("OTEL_METRIC_EXPORT_INTERVAL", value, "above 0, not") for value in ("a minute", "0", "-1", "nan", "inf")),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli", 'check the variables OTEL_.*"brotli"'),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "check the variables OTEL_.*soon"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:canary@127.0.0.1:1", "^OTEL_EXPORTER_OTLP_ENDPOINT cannot have a"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "https://me:canary@collector", "cannot have a password for gRPC: set"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "check the variables OTEL_.*max_queue_size"),
    ],
)
@on_a_loop
async def test_server_is_refused_when_a_variable_of_opentelemetry_is_malformed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TelemetryError, match=text) as caught:
        build(NoWorkers(), metrics="otlp", traces="otlp")
    assert "canary" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["otlp", "otlp-http"])
@on_a_loop
async def test_malformed_headers_are_logged_without_their_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization Bearer canary")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(exporters, "LAST_EXPORT_S", 0.1)
    async with serving(NoWorkers(), metrics=kind, traces=kind):
        pass
    assert "Header format invalid" in caplog.text
    assert "canary" not in caplog.text


@on_a_loop
async def test_port_of_the_environment_is_ignored_by_other_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", "no port")
    async with serving(NoWorkers(), metrics="console"):
        pass
    with pytest.raises(TelemetryError, match="must be host:port"):
        build(NoWorkers(), metrics="prometheus")


PROPAGATORS = """
import asyncio
from lattice_server.app import App
from lattice_server.config import ServerConfig
from lattice_server.telemetry import TelemetryError

async def build():
    try:
        App(ServerConfig(executor="local", traces="console"))
    except TelemetryError as error:
        print(error)

asyncio.run(build())
"""


@pytest.mark.slow
def test_server_is_refused_when_opentelemetry_cannot_be_imported_with_its_variables() -> None:
    # It reads this variable when it is imported.
    command = [sys.executable, "-c", PROPAGATORS]
    environment = {"OTEL_PROPAGATORS": "pigeon", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment)
    assert "traces cannot be exported; check the variables OTEL_*: Propagator pigeon not found" in done.stdout


@pytest.mark.parametrize("host", ["a..b", "no host", "x" * 70])
def test_metrics_are_refused_when_their_host_is_no_name(host: str) -> None:
    with pytest.raises(TelemetryError, match="choose another metrics_address"):
        serve(host, 0, list)


HOSTILE = [
    'quo"te',
    "back\\slash",
    "two\nlines",
    "\x1b[2J",
    "e\u0301\u202e\U0001f600",
    "_OTHER",
    "x" * 3000,
    '{a="b"} 1',
]


@pytest.mark.slow
@on_a_loop
async def test_labels_are_few_and_readable_when_names_are_hostile() -> None:
    async with serving(NoWorkers(), metrics="prometheus") as app, AsyncLatticeClient(app.address) as client:
        for name in [*HOSTILE, *(f"n{number}" for number in range(250))]:
            workflow = client.create_workflow(name)
            workflow.add_task(double, {"x": 1})
            await client.run(workflow)
        found = labelled(samples_of(await page_of(app)), "lattice_runs_started_total")
    kept = {name[:100] for name in HOSTILE} | {f"n{number}" for number in range(250)}
    assert len(found) <= 201
    assert {name for (name,) in found} <= kept | {"_OTHER"}
    assert {(name[:100],) for name in HOSTILE} <= found.keys()
    assert sum(found.values()) == len(HOSTILE) + 250


@pytest.mark.slow
@on_a_loop
async def test_each_of_many_scrapes_at_once_is_answered() -> None:
    async with serving(NoWorkers(), metrics="prometheus") as app:
        port = int(app.metrics_url.split(":")[2].split("/")[0])

        async def scrape() -> bytes:
            # The kernel may drop connections that wait to be accepted, and this loop may be too late with a request.
            for _ in range(20):
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
                    page = await reader.read()
                    writer.close()
                except OSError:
                    continue
                if page:
                    return page
            return b""

        # Many more than the server answers at once and lets wait.
        pages = await asyncio.gather(*(scrape() for _ in range(400)))
        assert [page for page in pages if b" 200 OK" not in page[:40] or b"lattice_nodes" not in page] == []


def test_scraper_is_answered_beside_callers_that_send_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "MAX_REQUESTS", 4)
    monkeypatch.setattr(prometheus._Handler, "timeout", 0.1)
    counted: list[int] = [0]
    answer = prometheus._HttpServer.finish_request

    def count(self: Any, *given: Any) -> None:
        counted.append(counted[-1] + 1)
        try:
            answer(self, *given)
        finally:
            counted.append(counted[-1] - 1)

    monkeypatch.setattr(prometheus._HttpServer, "finish_request", count)
    with ExitStack() as stack:
        server = serve("127.0.0.1", 0, list)
        stack.callback(server.stop)
        port = int(server.url.split(":")[2].split("/")[0])
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        with urlopen(server.url, timeout=60) as response:
            assert response.status == 200
    assert max(counted) <= 4


def test_server_of_metrics_prints_nothing_when_callers_break_off(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prometheus._Handler, "timeout", 0.1)
    server = serve("127.0.0.1", 0, list)
    port = int(server.url.split(":")[2].split("/")[0])
    for sent in (b"", b"GET", b"\x16\x03\x01\xff\xff", b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 1000):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
    with pytest.raises(HTTPError, match="414"), urlopen(server.url.replace("metrics", "x" * 70_000), timeout=60):
        pass
    server.stop()
    assert capfd.readouterr() == ("", "")
