"""The flags of metrics and traces, over the configuration of a file and of the environment."""

from typing import Any

import click
import pytest
from click.testing import CliRunner

from lattice_server import cli
from lattice_server.config import ServerConfig
from lattice_server.configfile import ConfigError, read_config
from lattice_server.flags import Flags


def flags(**given: Any) -> Flags:
    """Return flags, of which only some were given."""
    return Flags(**{name: given.get(name) for name in Flags.__dataclass_fields__})


def test_flags_take_precedence_over_the_file_and_the_environment() -> None:
    base = read_config('metrics = "otlp"\ntraces = "console"', {"LATTICE_METRICS_ADDRESS": "127.0.0.1:1"})
    assert (base.metrics, base.traces, base.metrics_address) == ("otlp", "console", "127.0.0.1:1")
    config = flags(metrics="prometheus").telemetry(base)
    assert (config.metrics, config.traces, config.metrics_address) == ("prometheus", "console", "127.0.0.1:1")
    assert flags(metrics_address="[::1]:2").telemetry(base).metrics_address == "[::1]:2"
    assert flags().telemetry(ServerConfig()).metrics == "none"


@pytest.mark.parametrize("text", ['metrics = "statsd"', 'traces = "prometheus"'])
def test_configuration_is_refused_when_it_names_an_unknown_exporter(text: str) -> None:
    with pytest.raises(ConfigError, match="must be one of none,"):
        read_config(text)


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464", "10.0.0.1:9464", "example.org:9464"])
def test_address_beyond_this_machine_is_refused_unless_insecure(address: str) -> None:
    with pytest.raises(click.UsageError, match="--insecure"):
        flags(metrics_address=address).telemetry(ServerConfig())
    with pytest.raises(click.UsageError, match="--insecure"):
        flags().telemetry(ServerConfig(metrics_address=address))
    assert flags(metrics_address=address, insecure=True).telemetry(ServerConfig()).metrics_address == address


def test_host_of_the_environment_is_refused_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", "0.0.0.0")
    with pytest.raises(click.UsageError, match=r"metrics at 0\.0\.0\.0"):
        flags(metrics="prometheus").telemetry(ServerConfig())


@pytest.mark.parametrize("metrics", [None, "none", "otlp", "otlp-http", "console"])
def test_host_of_the_environment_is_ignored_by_other_metrics(
    monkeypatch: pytest.MonkeyPatch, metrics: str | None
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", "0.0.0.0")
    config = flags(metrics=metrics).telemetry(ServerConfig())
    assert (config.metrics, config.metrics_address) == (metrics or "none", "")


def test_start_names_the_exporters_when_the_flag_is_wrong() -> None:
    done = CliRunner().invoke(cli.start, ["--head", "--metrics", "statsd"])
    assert done.exit_code == 2
    assert "'prometheus', 'otlp', 'otlp-http', 'console'" in done.output
