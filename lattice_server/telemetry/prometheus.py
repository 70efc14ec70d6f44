"""Serves metrics to Prometheus. Rule: a name is that of OpenTelemetry's own translation: dots become underscores, the
unit is appended, and counters end in `_total`."""

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lattice_server.telemetry import TelemetryError
from lattice_server.telemetry.catalogue import INSTRUMENTS, Instrument, Kind
from lattice_server.telemetry.meters import Distribution, Reading

log = logging.getLogger(__name__)

UNITS = {"s": "seconds", "By": "bytes"}
# Anyone on this machine may connect: so many requests at once, and so long for each part of one.
MAX_REQUESTS, REQUEST_S = 64, 2.0


def prometheus_name(instrument: Instrument) -> str:
    """Return the name of a metric in Prometheus, without the suffixes of its samples."""
    unit = UNITS.get(instrument.unit, "")
    name = instrument.name.replace(".", "_")
    return f"{name}_{unit}" if unit else name


def sample_name(instrument: Instrument) -> str:
    """Return the name by which a query refers to a metric; `_bucket`, `_sum` or `_count` follow for a histogram."""
    return prometheus_name(instrument) + ("_total" if instrument.kind is Kind.COUNTER else "")


class _Readings(Collector):
    """Reads all metrics at each scrape."""

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for reading in self._read():
            yield _family(reading)

    def describe(self) -> Iterator[Metric]:
        """Return the metrics without numbers: registration reads none."""
        return (_family(Reading(instrument, {})) for instrument in INSTRUMENTS)


def _family(reading: Reading) -> Metric:
    instrument = reading.instrument
    named = (prometheus_name(instrument), instrument.description)
    labels = [label.replace(".", "_") for label in instrument.labels]
    match instrument.kind:
        case Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(*named, labels=labels)
            for values, found in reading.values.items():
                if isinstance(found, Distribution):
                    histogram.add_metric(values, _buckets(instrument, found), found.total)
            return histogram
        case Kind.COUNTER:
            return _filled(CounterMetricFamily(*named, labels=labels), reading)
        case Kind.UP_DOWN | Kind.GAUGE:
            return _filled(GaugeMetricFamily(*named, labels=labels), reading)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, reading: Reading) -> Metric:
    for labels, value in reading.values.items():
        if not isinstance(value, Distribution):
            family.add_metric(labels, value)
    return family


def _buckets(instrument: Instrument, found: Distribution) -> list[tuple[str, float]]:
    """Return the cumulative counts by upper bound."""
    buckets, sum_so_far = [], 0
    for bound, count in zip((*map(str, instrument.bounds), "+Inf"), found.counts, strict=True):
        sum_so_far += count
        buckets.append((bound, float(sum_so_far)))
    return buckets


class _Handler(WSGIRequestHandler):
    """Reads one request."""

    timeout = REQUEST_S

    def log_message(self, format: str, *_: Any) -> None:
        """Write no line for a request."""


class _HttpServer(ThreadingMixIn, WSGIServer):
    """Answers up to `MAX_REQUESTS` at once; further connections wait to be accepted."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, family: int, address: Any, page: Any) -> None:
        self.address_family = family
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        # So that many scrapes take no more of the interpreter than one after the other.
        self._writing = threading.Lock()
        self._page = page
        super().__init__(address, _Handler)
        self.set_app(self._answer)

    def _answer(self, environment: Any, start_response: Any) -> Any:
        with self._writing:
            return self._page(environment, start_response)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a request on a thread of its own."""
        self._free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a caller that left, or sent nothing."""
        log.debug("a request for metrics failed", exc_info=True)


class PrometheusServer:
    """The HTTP server that Prometheus scrapes; it runs on threads of its own."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="lattice-metrics", daemon=True)
        self._thread.start()
        host, port = server.server_address[:2]
        text = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        self.url = f"http://[{text}]:{port}/metrics" if ":" in text else f"http://{text}:{port}/metrics"

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(host: str, port: int, read: Callable[[], Iterable[Reading]]) -> PrometheusServer:
    """Serve the metrics that `read` returns, on a thread of the HTTP server. Raises TelemetryError."""
    registry = CollectorRegistry()
    registry.register(_Readings(read))
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return PrometheusServer(_HttpServer(family, address, make_wsgi_app(registry)))
    except (OSError, UnicodeError) as error:  # The latter is about names that are no host names.
        text = f"metrics cannot be served at {host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise TelemetryError(f"{text}; choose another metrics_address, with port 0 for any") from None
