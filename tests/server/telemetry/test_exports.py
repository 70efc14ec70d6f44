"""What exporters of OpenTelemetry get: JSON on the console, and messages of OTLP."""

import io
import json

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, MetricsData
from opentelemetry.sdk.resources import Resource

from lattice_server.telemetry.catalogue import Instrument, Kind
from lattice_server.telemetry.meters import Histogram
from lattice_server.telemetry.otel import metrics_data

MEASURED = Instrument("lattice.y", Kind.HISTOGRAM, "s", ("a",), "Y.", (0.1, 1.0))


@pytest.fixture
def data() -> MetricsData:
    """The data of a histogram with one value."""
    histogram = Histogram(MEASURED)
    histogram.record(0.5, "p")
    return metrics_data([histogram.read()], Resource({}), 1, 2)


def test_console_prints_json_without_infinite_numbers(data: MetricsData) -> None:
    printed = io.StringIO()
    ConsoleMetricExporter(printed).export(data)
    exported = json.loads(printed.getvalue(), parse_constant=pytest.fail)
    (metric,) = exported["resource_metrics"][0]["scope_metrics"][0]["metrics"]
    (point,) = metric["data"]["data_points"]
    assert (point["count"], point["sum"], point["bucket_counts"]) == (1, 0.5, [0, 1, 0])
    assert (point["min"], point["max"]) == (None, None)


def test_point_of_a_histogram_has_neither_least_nor_greatest_value_in_otlp(data: MetricsData) -> None:
    (metric,) = encode_metrics(data).resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.histogram.data_points
    assert (point.count, point.sum) == (1, 0.5)
    assert not point.HasField("min")
    assert not point.HasField("max")
