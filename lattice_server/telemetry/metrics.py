"""Builds, starts and stops the metrics of one server. Rule: a server without metrics counts nothing."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lattice_server import background
from lattice_server.config import ServerConfig
from lattice_server.telemetry import TelemetryError
from lattice_server.telemetry.exporters import exporter
from lattice_server.telemetry.journal_meter import JournalMeter
from lattice_server.telemetry.meters import Reading
from lattice_server.telemetry.prometheus import PrometheusServer, serve
from lattice_server.telemetry.rpc_meter import RpcMeter
from lattice_server.telemetry.run_meter import RunMeter
from lattice_server.telemetry.scheduler_meter import SchedulerMeter
from lattice_server.telemetry.service_meter import ServiceMeter
from lattice_server.telemetry.state import State
from lattice_server.telemetry.worker_meter import WorkerMeter

if TYPE_CHECKING:
    from lattice_server.telemetry.otel import MetricExport

# A server that is too busy to answer for so long is itself the finding: the scrape fails.
READ_S = 10.0


class Metrics:
    """The metrics of one server, exported as `kind` says: `prometheus`, `otlp`, `otlp-http` or `console`.

    Attributes:
        url: where Prometheus reads them; empty for the other kinds.
    """

    def __init__(self, config: ServerConfig, state: State, version: str, epoch: str) -> None:
        self.runs, self.calls, self.scheduler = RunMeter(), RpcMeter(), SchedulerMeter()
        self.journal, self.services, self.workers = JournalMeter(), ServiceMeter(), WorkerMeter()
        self.url = ""
        self._address = "", 0
        self._state = state
        self._prometheus: PrometheusServer | None = None
        self._export: MetricExport | None = None
        if config.metrics == "prometheus":
            self._address = address_of(config.metrics_address, os.environ)
        else:
            # It takes a third of a second to import.
            from lattice_server.telemetry import otel

            resource = otel.resource_of(version, epoch)
            self._export = otel.MetricExport(exporter("metrics", config.metrics), resource, self.read)
        # The server serves runs without metrics too.
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to export. Raises TelemetryError."""
        loop = asyncio.get_running_loop()

        def read_from_thread() -> Sequence[Reading]:
            return asyncio.run_coroutine_threadsafe(self.read(), loop).result(READ_S)

        if self._export is None:
            self._prometheus = serve(*self._address, read_from_thread)
            self.url = self._prometheus.url
        else:
            self._background.append(background.start(self._export.run(), background.only_log))
        self._background.append(background.start(self._state.watch_lag(), background.only_log))

    async def read(self) -> Sequence[Reading]:
        """Return all numbers at one moment, on the main thread."""
        meters = (self.runs, self.calls, self.scheduler, self.journal, self.services, self.workers)
        counted = [reading for meter in meters for reading in meter.read()]
        return [*counted, *await self._state.read()]

    async def stop(self) -> None:
        """Export a last time and end. The scheduler has to run until then."""
        for task in self._background:
            task.cancel()
        if self._export is not None:
            await self._export.stop()
        if self._prometheus is not None:
            # A scrape that is being answered waits for this loop.
            await asyncio.to_thread(self._prometheus.stop)


def address_of(given: str, environment: Mapping[str, str]) -> tuple[str, int]:
    """Return where Prometheus reads the metrics: by default a free port of the loopback interface.

    Raises TelemetryError when the given address is not `host:port`.
    """
    host = environment.get("OTEL_EXPORTER_PROMETHEUS_HOST") or "127.0.0.1"
    address = given or f"{host}:{environment.get('OTEL_EXPORTER_PROMETHEUS_PORT') or 0}"
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise TelemetryError(f"metrics_address must be host:port, not {address!r}")
    return host.strip("[]"), int(port)
