"""Serves metrics to Prometheus. Rule: a name is that of OpenTelemetry's own translation: dots become underscores, the
unit is appended, and counters end in `_total`."""

import threading
from collections.abc import Callable, Iterable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lattice_server.telemetry import TelemetryError
from lattice_server.telemetry.catalogue import INSTRUMENTS, Instrument, Kind
from lattice_server.telemetry.meters import Distribution, Reading

UNITS = {"s": "seconds", "By": "bytes"}


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


class PrometheusServer:
    """The HTTP server that Prometheus scrapes; it runs on threads of its own."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
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
        return PrometheusServer(*start_http_server(port, host, registry))
    except OSError as error:
        text = f"metrics cannot be served at {host}:{port}: {error.strerror or error}"
        raise TelemetryError(f"{text}; choose another metrics_address, with port 0 for any") from None
