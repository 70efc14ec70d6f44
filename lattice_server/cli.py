"""The commands of the head: `lattice start` and `lattice stop`. Rule: flags become one `ServerConfig`."""

import json
import logging
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import psutil
import uvloop

from lattice_server import MAY_SERVE, security
from lattice_server.app import serve
from lattice_server.config import ServerConfig
from lattice_server.configfile import ConfigError, read_config
from lattice_server.rpc.server import PortInUseError

log = logging.getLogger(__name__)

STOP_S = 30.0
MIB = 1024 * 1024
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
CONFIG_HELP = "A TOML file with limits, batching rules and bounds; see docs/scheduling.md."


def _record_path(port: str) -> Path:
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"lattice-heads-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{port}.json"


@click.command()
@click.option("--head", is_flag=True, help="Start the server.")
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
@click.option("--tls-ca", type=FILE, help="Callers need certificates signed by this one.")
@click.option("--token-file", type=FILE, help="The token callers must show, or LATTICE_TOKEN.")
@click.option("--insecure", is_flag=True, help="Serve beyond this machine without TLS or a token.")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=CONFIG_HELP)
@click.option("--verbose", is_flag=True, help="Log more.")
def start(
    head: bool,
    host: str,
    port: int,
    executor: str,
    node_ip: str | None,
    ray_address: str | None,
    ray_workers: int,
    num_cpus: float | None,
    num_gpus: int | None,
    memory: int | None,
    gpu_memory: int | None,
    labels: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    token_file: Path | None,
    insecure: bool,
    config_file: Path | None,
    verbose: bool,
) -> None:
    """Start a Lattice server on this machine and serve until Ctrl-C or `lattice stop`."""
    if not head:
        raise click.UsageError("say --head to start the server")
    if not MAY_SERVE:
        os.execv(sys.executable, [sys.executable, "-m", "lattice_server", *sys.argv[1:]])
    try:
        token, tls = security.read_token(token_file, os.environ), security.read_tls(tls_cert, tls_key, tls_ca)
        warning = security.check_exposure(host, tls, token, is_allowed=insecure)
    except security.SecurityError as error:
        raise click.UsageError(str(error)) from None
    # What this process starts has no use for it: workers beside the server come by its own socket.
    os.environ.pop(security.TOKEN, None)
    if ray_address and (executor != "ray" or not num_cpus):
        raise click.UsageError("with --ray-address, which needs --executor ray, say what to reserve: --num-cpus")
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if wrong := [label for label in labels if "=" not in label]:
        raise click.UsageError(f"a label is NAME=VALUE, not {wrong[0]!r}")
    if warning is not None:
        log.warning("%s", warning)
    config = replace(
        ServerConfig() if config_file is None else _read(config_file),
        host=host,
        port=port,
        tls=tls,
        token=token,
        executor=executor,
        node_ip=node_ip or "",
        ray_address=ray_address or "",
        ray_workers=ray_workers,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        memory_bytes=None if memory is None else memory * MIB,
        gpu_memory_bytes=None if gpu_memory is None else gpu_memory * MIB,
        labels=dict(label.split("=", 1) for label in labels),
    )
    records: list[Path] = []

    def announce(address: str) -> None:
        record = _record_path(address.rpartition(":")[2])
        record.write_text(json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()}))
        records.append(record)
        click.echo(f"Lattice is listening on {address}")

    try:
        uvloop.run(serve(config, announce))
    except PortInUseError as error:
        raise click.ClickException(f"{error}. Choose another --port, or 0 for any.") from None
    finally:
        for record in records:
            record.unlink(missing_ok=True)


def _read(path: Path) -> ServerConfig:
    try:
        return read_config(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise click.ClickException(f"{path}: it is not UTF-8") from None
    except (ConfigError, OSError) as error:
        raise click.ClickException(f"{path}: {error}") from None


@click.command()
@click.option("--port", default=50051, show_default=True, help="Port of the server to stop.")
def stop(port: int) -> None:
    """Stop the Lattice server on this machine that listens on a port."""
    record = _record_path(str(port))
    try:
        known = json.loads(record.read_text())
        process = psutil.Process(known["pid"])
        # A process id may have been given to somebody else since.
        if process.create_time() != known["started"]:
            raise psutil.NoSuchProcess(known["pid"])
    except (FileNotFoundError, psutil.NoSuchProcess):
        record.unlink(missing_ok=True)
        raise click.ClickException(f"no Lattice server of yours listens on port {port} here") from None
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except psutil.TimeoutExpired:
        raise click.ClickException(f"the server (process {process.pid}) did not stop in {STOP_S:.0f} s") from None
    click.echo(f"Stopped the server on port {port}.")
