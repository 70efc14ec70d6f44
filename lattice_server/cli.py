"""The commands `lattice start` and `lattice stop`. Rule: flags become one `ServerConfig`, or those of a worker."""

import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import click
import psutil
import uvloop

from lattice_server import MAY_SERVE, logs, pidfile, security
from lattice_server.config import ServerConfig
from lattice_server.configfile import ConfigError, read_config
from lattice_server.executors.processes import token_flags
from lattice_server.tokens import read_tokens

log = logging.getLogger(__name__)

MIB = 1024 * 1024
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
CONFIG_HELP = "A TOML file with limits, batching rules and bounds; see docs/scheduling.md."


@click.command()
@click.option("--head", is_flag=True, help="Start the server.")
@click.option("--worker", is_flag=True, help="Have this machine join a server.")
@click.option("--addr", metavar="HOST:PORT", envvar="LATTICE_TARGET", help="The server to join.")
@click.option("--node-id", help="The node this machine is to be; by default its host name and some digits.")
@click.option(
    "--drain-deadline",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="How many seconds what runs on a worker that is stopped may still take before it is moved.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=50051, show_default=True, help="Port to listen on; 0 picks one.")
@click.option("--executor", type=click.Choice(["ray", "local"]), default="ray", show_default=True)
@click.option("--node-ip", metavar="ADDRESS", help="Where Ray listens, instead of where the server does.")
@click.option("--ray-address", metavar="HOST:PORT", help="Place workers in this Ray cluster instead of starting Ray.")
@click.option(
    "--ray-workers",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="With --ray-address: how many workers, each with --num-cpus and --num-gpus.",
)
@click.option("--num-cpus", type=click.FloatRange(0, 2**20), help="CPUs to offer instead of those this machine has.")
@click.option("--num-gpus", type=click.IntRange(0, 1024), help="GPUs to offer instead of those this machine has.")
@click.option(
    "--memory", type=click.IntRange(1, 2**40), metavar="MIB", help="Memory to offer instead of all this machine has."
)
@click.option(
    "--gpu-memory",
    type=click.IntRange(0, 2**40),
    metavar="MIB",
    help="Memory of each GPU, where it cannot be measured.",
)
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label of this node; may be repeated.")
@click.option("--tls-cert", type=FILE, help="Serve TLS with this certificate chain, in PEM.")
@click.option("--tls-key", type=FILE, help="The certificate's key, in PEM.")
@click.option("--tls-ca", type=FILE, help="Callers need certificates signed by this one; for a worker: the server.")
@click.option("--token-file", type=FILE, help="The token callers must show, or LATTICE_TOKEN; a worker shows it.")
@click.option(
    "--tokens-file", type=FILE, envvar="LATTICE_TOKENS_FILE", help="Who may do what, by token; see docs/security.md."
)
@click.option("--insecure", is_flag=True, help="Serve, or join, beyond this machine without TLS or a token.")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=CONFIG_HELP)
@click.option("--verbose", is_flag=True, help="As --log-level info.")
@click.option("--log-level", type=click.Choice(logs.LEVELS), envvar="LATTICE_LOG_LEVEL", help="Log from this level on.")
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    envvar="LATTICE_LOG_FORMAT",
    help="Log lines as text, or as one JSON object each.",
)
def start(**given: Any) -> None:
    """Start a Lattice server on this machine, or have the machine join one, until Ctrl-C or `lattice stop`."""
    flags = Flags(**given)
    if flags.head == flags.worker:
        raise click.UsageError("say --head to start the server, or --worker to join one")
    if wrong := [label for label in flags.labels if "=" not in label]:
        raise click.UsageError(f"a label is NAME=VALUE, not {wrong[0]!r}")
    if flags.worker:
        _become_worker(flags)
    if not MAY_SERVE:
        os.execv(sys.executable, [sys.executable, "-m", "lattice_server", *sys.argv[1:]])
    config = flags.logging(ServerConfig() if flags.config_file is None else _read(flags.config_file))
    logs.set_up(config.log_format, config.log_level)
    _serve(_config(flags, config))


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of `lattice start`; None where one was not given. Each is explained where it is declared."""

    head: bool
    worker: bool
    addr: str | None
    node_id: str | None
    drain_deadline: float
    host: str
    port: int
    executor: str
    node_ip: str | None
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
    insecure: bool
    config_file: Path | None
    verbose: bool
    log_level: str | None
    log_format: str | None

    def logging(self, config: ServerConfig) -> ServerConfig:
        """Return a configuration with what the flags say of the log."""
        level = self.log_level or ("info" if self.verbose else config.log_level)
        return replace(config, log_level=level, log_format=self.log_format or config.log_format)

    @property
    def memory_bytes(self) -> int | None:
        """The memory to offer, in bytes."""
        return None if self.memory is None else self.memory * MIB

    @property
    def gpu_memory_bytes(self) -> int | None:
        """The memory of each GPU, in bytes."""
        return None if self.gpu_memory is None else self.gpu_memory * MIB


def _config(flags: Flags, base: ServerConfig) -> ServerConfig:
    """Return how the server is to be, given what the configuration file says. Raises click.ClickException."""
    if flags.ray_address and (flags.executor != "ray" or not flags.num_cpus):
        raise click.UsageError("with --ray-address, which needs --executor ray, say what to reserve: --num-cpus")
    tokens_file = base.tokens_file if flags.tokens_file is None else str(flags.tokens_file.absolute())
    with _secured():
        token = security.read_token(flags.token_file, os.environ)
        if tokens_file:
            read_tokens(Path(tokens_file))
        tls = security.read_tls(flags.tls_cert, flags.tls_key, flags.tls_ca)
        has_tokens = token is not None or bool(tokens_file)
        warning = security.check_exposure(flags.host, tls, has_tokens, is_allowed=flags.insecure)
    if warning is not None:
        log.warning("%s", warning)
    # What this process starts has no use for it: workers beside the server come by its own socket.
    os.environ.pop(security.TOKEN, None)
    return replace(
        base,
        host=flags.host,
        port=flags.port,
        tls=tls,
        token=token,
        tokens_file=tokens_file,
        executor=flags.executor,
        node_ip=flags.node_ip or "",
        ray_address=flags.ray_address or "",
        ray_workers=flags.ray_workers,
        num_cpus=flags.num_cpus,
        num_gpus=flags.num_gpus,
        memory_bytes=flags.memory_bytes,
        gpu_memory_bytes=flags.gpu_memory_bytes,
        labels=dict(label.split("=", 1) for label in flags.labels),
    )


def _serve(config: ServerConfig) -> None:
    """Be the server until a signal ends it, noted for `lattice stop`. Raises click.ClickException."""
    # Here, since the server takes most of a second to import, and `lattice start` starts anew before it serves.
    from lattice_server.app import SchedulerError, serve
    from lattice_server.engine.ports import ExecutorError
    from lattice_server.engine.store_folder import StoreError
    from lattice_server.rpc.server import PortInUseError

    noted: list[str] = []
    with _noting():
        pidfile.check()

    def announce(address: str) -> None:
        noted.append(f"head-{address.rpartition(':')[2]}")
        pidfile.note(noted[0])
        click.echo(f"Lattice is listening on {address}")

    try:
        uvloop.run(serve(config, announce))
    except PortInUseError as error:
        advice = (
            f"choose another --port, or 0 for any; `lattice stop --port {config.port}` stops a server that runs here"
        )
        raise click.ClickException(f"{error}; {advice}") from None
    except (SchedulerError, ExecutorError, StoreError) as error:
        raise click.ClickException(str(error)) from None
    finally:
        for name in noted:
            pidfile.forget(name)


def _become_worker(flags: Flags) -> NoReturn:
    """Go on as the worker's program, in this very process: signals and exit status are its own."""
    if not flags.addr:
        raise click.UsageError("say which server to join: --addr HOST:PORT")
    if not re.search(r":\d{1,5}$", flags.addr):
        raise click.UsageError(f"--addr {flags.addr!r} names no port: write HOST:PORT")
    # Not by flags: everybody on this machine may read a command line.
    files = {"LATTICE_TLS_CA": flags.tls_ca, "LATTICE_TLS_CERT": flags.tls_cert, "LATTICE_TLS_KEY": flags.tls_key}
    os.environ.update({name: str(path.absolute()) for name, path in files.items() if path is not None})
    if flags.insecure:
        os.environ["LATTICE_INSECURE"] = "1"
    with _secured():
        token = security.read_token(flags.token_file, os.environ)
    # Nor by the environment, which the tasks of the same user may read.
    os.environ.pop(security.TOKEN, None)
    node_id = flags.node_id or f"{socket.gethostname()}-{secrets.token_hex(2)}"
    words = {
        "--addr": flags.addr,
        "--node-id": node_id,
        "--drain-deadline": flags.drain_deadline,
        "--num-cpus": flags.num_cpus,
        "--num-gpus": flags.num_gpus,
        "--memory-bytes": flags.memory_bytes,
        "--gpu-memory-bytes": flags.gpu_memory_bytes,
        "--log-level": flags.logging(ServerConfig()).log_level,
        "--log-format": flags.log_format,
    }
    command = [sys.executable, "-m", "lattice_worker", "--join"]
    command += [part for name, value in words.items() if value is not None for part in (name, str(value))]
    command += [part for label in flags.labels for part in ("--label", label)]
    if token is not None:
        command += token_flags(token)
    with _noting():
        pidfile.note(f"node-{node_id}")
    sys.stdout.flush()
    os.execv(sys.executable, command)


@contextmanager
def _noting() -> Iterator[None]:
    try:
        yield
    except pidfile.UnsafeError as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def _secured() -> Iterator[None]:
    try:
        yield
    except security.SecurityError as error:
        raise click.UsageError(str(error)) from None


def _read(path: Path) -> ServerConfig:
    try:
        return read_config(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise click.ClickException(f"{path}: it is not UTF-8") from None
    except (ConfigError, OSError) as error:
        raise click.ClickException(f"{path}: {error}") from None


@click.command()
@click.option("--port", default=50051, show_default=True, help="Port of the server to stop.")
@click.option("--node", "node_id", help="Stop this node's worker on this machine instead.")
@click.option(
    "--wait", type=click.FloatRange(0), default=60.0, show_default=True, help="How many seconds stopping may take."
)
def stop(port: int, node_id: str | None, wait: float) -> None:
    """Stop the Lattice server on this machine that listens on a port, or the worker of a node.

    What runs on a worker ends first, or is moved after the deadline the worker was started with.
    """
    what = f"server on port {port}" if node_id is None else f"worker of node {node_id}"
    try:
        with _noting():
            pidfile.stop(f"head-{port}" if node_id is None else f"node-{node_id}", wait)
    except pidfile.NotRunningError:
        raise click.ClickException(f"no {what} runs here that is yours") from None
    except psutil.TimeoutExpired:
        raise click.ClickException(f"the {what} did not stop in {wait:.0f} s") from None
    click.echo(f"Stopped the {what}.")
