"""Owns the flags of `lattice start`, and turns errors about them into those of the command line."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lattice_server import pidfile, security
from lattice_server.config import ServerConfig
from lattice_server.core.frozen import frozen

MIB = 1024 * 1024
# Workers, and the Ray nodes that start some, inherit it.
GATEWAY_PORT = "LATTICE_GATEWAY_PORT"
# Parameters of `lattice start` that belong to the server only, and parameters of a machine that joins one.
OF_HEAD = frozenset({
    "host", "port", "executor", "node_ip", "ray_address", "ray_workers", "tokens_file", "secrets_file", "config_file",
    "metrics", "metrics_address", "traces", "journal", "journal_sync", "min_isolation",
    "task_output",
})  # fmt: skip
OF_WORKER = frozenset({"addr", "node_id", "drain_deadline"})


def check_role(context: click.Context, *, is_worker: bool) -> None:
    """Refuse options that the started program does not have. Raises click.UsageError.

    The environment may have settings of both.
    """
    foreign, given_to, role = (OF_HEAD, "--head", "--worker") if is_worker else (OF_WORKER, "--worker", "--head")
    for option in context.command.params:
        name = option.name or ""
        if name in foreign and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{option.opts[0]} belongs to {given_to}, and has no effect with {role}: leave it out"
            )


def check_effects(context: click.Context, config: ServerConfig) -> None:
    """Refuse options without an effect beside the other settings. Raises click.UsageError.

    The file of the configuration and the environment may have settings that another start uses.
    """
    idle = {
        "node_ip": config.executor != "ray" and "--executor ray",
        "ray_workers": not config.ray_address and "--ray-address",
        "metrics_address": config.metrics != "prometheus" and "--metrics prometheus",
        "journal_sync": config.journal == "memory" and "a journal, and this server has none",
    }
    for option in context.command.params:
        needed = idle.get(option.name or "")
        if needed and context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} has no effect without {needed}")


class FiniteRange(click.FloatRange):
    """A number in a range, and not NaN, which a range of click lets through, nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Raises click.BadParameter."""
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


@frozen
class Flags:
    """The flags of `lattice start`; None for a flag that was not given."""

    head: bool
    worker: bool
    addr: str | None
    node_id: str | None
    drain_deadline: float
    host: str
    port: int
    executor: str
    node_ip: str | None
    gateway_port: int | None
    ray_address: str | None
    ray_workers: int
    num_cpus: float | None
    num_gpus: int | None
    memory: int | None
    gpu_memory: int | None
    labels: tuple[str, ...]
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None
    token_file: Path | None
    tokens_file: Path | None
    secrets_file: Path | None
    insecure: bool
    config_file: Path | None
    metrics: str | None
    metrics_address: str | None
    traces: str | None
    verbose: bool
    journal: str | None
    journal_sync: str | None
    min_isolation: str | None
    log_level: str | None
    log_format: str | None
    task_output: str | None

    def logging(self, config: ServerConfig) -> ServerConfig:
        """Return a configuration with the flags of the log."""
        level = self.log_level or ("info" if self.verbose else config.log_level)
        return replace(
            config,
            log_level=level,
            log_format=self.log_format or config.log_format,
            task_output=self.task_output or config.task_output,
        )

    def gateways(self, config: ServerConfig) -> ServerConfig:
        """Return a configuration with the port of gateways, which workers that are started here find."""
        port = self.gateway_port or config.gateway_port
        if port:
            os.environ[GATEWAY_PORT] = str(port)
        return replace(config, gateway_port=port)

    def telemetry(self, config: ServerConfig) -> ServerConfig:
        """Return a configuration with the flags of metrics and traces. Raises click.UsageError."""
        metrics, traces = self.metrics or config.metrics, self.traces or config.traces
        address = self.metrics_address or config.metrics_address
        host = address.rpartition(":")[0].strip("[]")
        if metrics == "prometheus":
            # Programs beside this one may need the variable, so it counts only where it has an effect.
            host = host or os.environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "")
        if host and not security.is_loopback(host) and not self.insecure:
            text = f"metrics at {address or host} would show names of all tenants to everyone who reaches this address"
            raise click.UsageError(f"{text}: choose a loopback address, or give --insecure")
        return replace(config, metrics=metrics, metrics_address=address, traces=traces)

    @property
    def memory_bytes(self) -> int | None:
        """The memory to offer, in bytes."""
        return None if self.memory is None else self.memory * MIB

    @property
    def gpu_memory_bytes(self) -> int | None:
        """The memory of each GPU, in bytes."""
        return None if self.gpu_memory is None else self.gpu_memory * MIB


@contextmanager
def noting() -> Iterator[None]:
    """Show an unsafe folder of notes as an error of the command. Raises click.ClickException."""
    try:
        yield
    except pidfile.UnsafeError as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def secured() -> Iterator[None]:
    """Show a wrong token or certificate as an error of its flag. Raises click.UsageError."""
    try:
        yield
    except security.SecurityError as error:
        raise click.UsageError(str(error)) from None
