"""The commands `lattice start` and `lattice stop`. Rule: flags become one `ServerConfig`, or flags of a worker."""

import logging
import os
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import psutil
import uvloop

from lattice_server import MAY_SERVE, logs, pidfile, security
from lattice_server.config import METRICS, TASK_OUTPUT, TRACES, ServerConfig
from lattice_server.configfile import ConfigError, read_config
from lattice_server.core.model import Isolation
from lattice_server.flags import FiniteRange, Flags, check_effects, check_role, noting, secured
from lattice_server.joining import become_worker
from lattice_server.secrets_file import read_secrets
from lattice_server.tokens import read_tokens

log = logging.getLogger(__name__)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PORT = click.IntRange(0, 65_535)
CONFIG_HELP = "A TOML file with limits, batching rules and bounds; see docs/scheduling.md."


@click.command()
@click.option("--head", is_flag=True, help="Start the server.")
@click.option("--worker", is_flag=True, help="Have this machine join a server.")
@click.option("--addr", metavar="HOST:PORT", envvar="LATTICE_TARGET", help="The server to join.")
@click.option("--node-id", help="The id of this machine's node; by default its host name and some digits.")
@click.option(
    "--drain-deadline",
    type=FiniteRange(0),
    default=30.0,
    show_default=True,
    help="How many seconds running attempts have to finish when the worker is stopped; then they are moved.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=PORT, default=50051, show_default=True, help="Port to listen on; 0 picks one.")
@click.option(
    "--executor",
    type=click.Choice(["ray", "local"]),
    default="ray",
    show_default=True,
    help="Have Ray start the workers, or the server itself, on this machine.",
)
@click.option("--node-ip", metavar="ADDRESS", help="The address Ray listens on; by default that of the server.")
@click.option(
    "--gateway-port",
    type=click.IntRange(1, 65_535),
    envvar="LATTICE_GATEWAY_PORT",
    help="The port at which this node's gateway to models listens for other nodes; by default a free one.",
)
@click.option("--ray-address", metavar="HOST:PORT", help="Place workers in this Ray cluster instead of starting Ray.")
@click.option(
    "--ray-workers",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="With --ray-address: how many workers, each with --num-cpus and --num-gpus.",
)
@click.option("--num-cpus", type=FiniteRange(0, 2**20), help="CPUs to offer instead of those this machine has.")
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
@click.option("--tls-ca", type=FILE, help="The authority of callers' certificates; for a worker: of the server's.")
@click.option("--token-file", type=FILE, help="The token that callers, or this worker, must send; or LATTICE_TOKEN.")
@click.option(
    "--tokens-file",
    type=FILE,
    envvar="LATTICE_TOKENS_FILE",
    help="The subjects, tenants and scopes of tokens; see docs/security.md.",
)
@click.option(
    "--secrets",
    "secrets_file",
    type=FILE,
    envvar="LATTICE_SECRETS_FILE",
    help="Secrets that tasks may name, by tenant; see docs/tasks.md.",
)
@click.option("--insecure", is_flag=True, help="Serve, or join, beyond this machine without TLS or a token.")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=CONFIG_HELP)
@click.option(
    "--metrics",
    type=click.Choice(METRICS),
    help="Serve metrics to Prometheus, send them by OTLP, or print them; see docs/telemetry.md.",
)
@click.option(
    "--metrics-address",
    metavar="HOST:PORT",
    help="Where Prometheus reads the metrics; by default a free port of this machine's loopback interface.",
)
@click.option("--traces", type=click.Choice(TRACES), help="Send traces of runs by OTLP, or print them.")
@click.option(
    "--journal",
    metavar="FOLDER|URL|memory",
    envvar="LATTICE_JOURNAL",
    help="Where runs are recorded to survive a restart: a folder, postgresql://..., or `memory` to forget them. By "
    "default a folder of this port in ~/.local/share/lattice; memory with --port 0. See docs/durability.md.",
)
@click.option(
    "--min-isolation",
    type=click.Choice([level.value for level in Isolation]),
    help="Run no task at a weaker level of isolation; tasks that name none have this one. See docs/isolation.md.",
)
@click.option(
    "--journal-sync",
    type=click.Choice(["full", "normal"]),
    help="With a folder: survive a cut of the power as well (full, the default), or only a killed server (normal).",
)
@click.option("--verbose", is_flag=True, help="The same as --log-level info.")
@click.option("--log-level", type=click.Choice(logs.LEVELS), envvar="LATTICE_LOG_LEVEL", help="Log from this level on.")
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    envvar="LATTICE_LOG_FORMAT",
    help="Log lines as text, or as one JSON object each.",
)
@click.option(
    "--task-output",
    type=click.Choice(TASK_OUTPUT),
    help="Where text that tasks print goes: to the events of their runs, or also to the log.",
)
def start(**given: Any) -> None:
    """Start a Lattice server on this machine, or have the machine join one, until Ctrl-C or `lattice stop`."""
    flags = Flags(**given)
    if flags.head == flags.worker:
        raise click.UsageError("say --head to start the server, or --worker to join one")
    check_role(click.get_current_context(), is_worker=flags.worker)
    if wrong := [label for label in flags.labels if not re.match("[^=]+=", label)]:
        raise click.UsageError(f"a label is NAME=VALUE, not {wrong[0]!r}")
    if flags.worker:
        become_worker(flags)
    if flags.executor == "ray" and find_spec("ray") is None:
        raise click.ClickException(
            'the Ray executor needs Ray: pip install "lattice-control-plane[ray]", or start with --executor local'
        )
    if not MAY_SERVE:
        os.execv(sys.executable, [sys.executable, "-m", "lattice_server", *sys.argv[1:]])
    config = flags.gateways(flags.telemetry(flags.logging(_read(flags.config_file))))
    logs.set_up(config.log_format, config.log_level)
    config = _config(flags, config)
    check_effects(click.get_current_context(), config)
    _serve(config)


def _config(flags: Flags, base: ServerConfig) -> ServerConfig:
    """Return the configuration of the server: the flags over those of the file. Raises click.ClickException."""
    if flags.ray_address and (flags.executor != "ray" or not flags.num_cpus):
        raise click.UsageError("--ray-address needs --executor ray, and --num-cpus for the CPUs to reserve")
    tokens_file = base.tokens_file if flags.tokens_file is None else str(flags.tokens_file.absolute())
    secrets_file = base.secrets_file if flags.secrets_file is None else str(flags.secrets_file.absolute())
    with secured():
        if secrets_file:
            read_secrets(Path(secrets_file))
        token = security.read_token(flags.token_file, os.environ)
        if tokens_file:
            read_tokens(Path(tokens_file))
        tls = security.read_tls(flags.tls_cert, flags.tls_key, flags.tls_ca)
        has_tokens = token is not None or bool(tokens_file)
        warning = security.check_exposure(flags.host, tls, has_tokens, is_allowed=flags.insecure)
    if warning is not None:
        log.warning("%s", warning)
    # Child processes must not inherit it: workers on this machine connect by the server's own socket.
    os.environ.pop(security.TOKEN, None)
    return replace(
        base,
        host=flags.host,
        port=flags.port,
        tls=tls,
        token=token,
        tokens_file=tokens_file,
        secrets_file=secrets_file,
        executor=flags.executor,
        min_isolation=flags.min_isolation or base.min_isolation,
        node_ip=flags.node_ip or "",
        ray_address=flags.ray_address or "",
        ray_workers=flags.ray_workers,
        num_cpus=flags.num_cpus,
        num_gpus=flags.num_gpus,
        memory_bytes=flags.memory_bytes,
        gpu_memory_bytes=flags.gpu_memory_bytes,
        labels=dict(label.split("=", 1) for label in flags.labels),
        journal=_default_journal(flags.port) if flags.journal is None else _journal(flags.journal),
        journal_sync=flags.journal_sync or base.journal_sync,
    )


def _default_journal(port: int) -> str:
    """Return the journal of a server that is started without `--journal`. Raises click.ClickException."""
    if port == 0:
        return "memory"  # After a restart it has another port, which no client knows.
    try:
        folder = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    except RuntimeError as error:
        raise click.ClickException(f"no place for the journal: {error}; name a folder with --journal") from None
    return str(folder.absolute() / f"lattice/journal-{port}")


def _journal(named: str) -> str:
    """Return the journal that a flag names, a folder by its whole path. Raises click.UsageError."""
    if not named:
        raise click.UsageError("--journal needs a folder, a URL postgresql://..., or `memory` for none")
    if named == "memory" or named.startswith(("postgresql://", "postgres://")):
        return named
    if scheme := re.match("[A-Za-z][A-Za-z0-9+.-]*:", named):
        text = (
            f"--journal takes a folder, a URL postgresql://..., or `memory`, and nothing that begins with {scheme[0]!r}"
        )
        raise click.UsageError(f"{text}; a folder of such a name is ./{named}")
    return str(Path(named).absolute())


def _serve(config: ServerConfig) -> None:
    """Run the server until a signal ends it, with a note for `lattice stop`. Raises click.ClickException."""
    # Read when grpc is imported, which serving does. Fork handlers: see the package.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # By default gRPC writes a line for each failed TLS handshake: any program that finds the port could fill the disk.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Imported here: the imports take most of a second, and are not needed to refuse a wrong flag.
    from lattice_server.app import SchedulerError, serve
    from lattice_server.engine.ports import ExecutorError
    from lattice_server.engine.recording.journal_port import JournalError, JournalLockedError
    from lattice_server.engine.stores.store_folder import StoreError
    from lattice_server.rpc.server import PortInUseError
    from lattice_server.telemetry import TelemetryError

    noted: list[str] = []
    with noting():
        pidfile.check()

    def announce(address: str, metrics_url: str) -> None:
        noted.append(f"head-{address.rpartition(':')[2]}")
        pidfile.note(noted[0])
        click.echo(f"Lattice is listening on {address}")
        if metrics_url:
            click.echo(f"Prometheus can read the metrics at {metrics_url}")
        if config.journal.startswith("/"):
            click.echo(f"Runs are recorded in {config.journal}")

    try:
        uvloop.run(serve(config, announce))
    except PortInUseError as error:
        advice = (
            f"choose another --port, or 0 for any; `lattice stop --port {config.port}` stops a server that runs here"
        )
        raise click.ClickException(f"{error}; {advice}") from None
    except JournalLockedError as error:
        raise click.ClickException(f"{error}; stop it, or name another --journal") from None
    except (SchedulerError, ExecutorError, StoreError, JournalError, TelemetryError) as error:
        raise click.ClickException(str(error)) from None
    finally:
        for name in noted:
            pidfile.forget(name)


def _read(path: Path | None) -> ServerConfig:
    """Return the configuration of the environment and a file, if any. Raises click.ClickException."""
    source = "" if path is None else f"{path}: "
    try:
        return read_config("" if path is None else path.read_text(encoding="utf-8"), os.environ)
    except UnicodeDecodeError:
        raise click.ClickException(f"{source}it is not UTF-8") from None
    except (ConfigError, OSError) as error:
        raise click.ClickException(f"{source}{error}") from None


@click.command()
@click.option("--port", type=PORT, default=50051, show_default=True, help="Port of the server to stop.")
@click.option("--node", "node_id", help="Stop this node's worker on this machine instead.")
@click.option(
    "--wait", type=FiniteRange(0), default=60.0, show_default=True, help="How many seconds stopping may take."
)
def stop(port: int, node_id: str | None, wait: float) -> None:
    """Stop the Lattice server on this machine that listens on a port, or the worker of a node.

    A worker first finishes its attempts; attempts that exceed its drain deadline are moved.
    """
    what = f"server on port {port}" if node_id is None else f"worker of node {node_id}"
    try:
        with noting():
            pidfile.stop(f"head-{port}" if node_id is None else f"node-{node_id}", wait)
    except pidfile.NotRunningError:
        raise click.ClickException(f"no {what} runs here that is yours") from None
    except psutil.TimeoutExpired:
        raise click.ClickException(f"the {what} did not stop in {wait:.0f} s") from None
    click.echo(f"Stopped the {what}.")
