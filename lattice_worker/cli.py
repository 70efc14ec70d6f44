"""Owns the command line of a worker: `python -m lattice_worker`. Rule: flags become one `WorkerConfig`."""

import argparse
import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import uvloop

from lattice_worker import logs, secrecy
from lattice_worker.agent import Agent
from lattice_worker.channel import ChannelError, check
from lattice_worker.config import HEAD_STORE, WorkerConfig
from lattice_worker.containers.config import EngineConfig
from lattice_worker.egress.addresses import networks_of
from lattice_worker.machine import host
from lattice_worker.node_join import Joiner
from lattice_worker.pool.zygotes import GATEWAY_PORT
from lattice_worker.store.artifact_staging import DISK, locked

PR_SET_PDEATHSIG = 1
PRELOAD = "LATTICE_PRELOAD"
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY_BYTES = 256 * 1024 * 1024  # With less of it free, as in most containers, values are kept on disk.
STORE_PREFIX = "lattice-worker-"
NEW_S = 10.0
DRAIN_MARGIN_S = 5.0
MAX_PORT = 65_535


def main() -> None:
    """Run a worker until the server lets it go or a signal ends it."""
    secrecy.move_token(os.environ, sys.orig_argv)
    parser = argparse.ArgumentParser(prog="lattice_worker", description="Run attempts for a Lattice server.")
    parser.add_argument("--addr", required=True, help="the server, host:port or, for TLS, grpcs://host:port")
    parser.add_argument("--node-id", required=True)
    parser.add_argument("--worker-id", help="by default one that nobody else has")
    parser.add_argument("--join", action="store_true", help="offer this machine, and let the server say what to do")
    parser.add_argument("--drain-deadline", type=float, default=30.0, help="seconds for what runs when told to stop")
    parser.add_argument("--log-level", choices=logs.LEVELS, default="warning")
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text")
    parser.add_argument("--store-dir", help="the server's own store of large values; without it the worker has its own")
    parser.add_argument("--server", default="", help="what a client in a task dials; by default what the worker dials")
    parser.add_argument("--num-cpus", type=float)
    parser.add_argument("--num-gpus", type=int)
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--gpu-memory-bytes", type=int, help="of each device, where it cannot be measured")
    parser.add_argument("--label", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--exit-on-close", action="store_true", help="end when the server ends")
    parser.add_argument(secrecy.FLAG, type=int, help="a pipe with the token; without it LATTICE_TOKEN, or none")
    parser.add_argument("--host-fd", type=int, help="a socket to who started the worker, and fetches large values")
    flags = parser.parse_args()
    logs.set_up(flags.log_format, flags.log_level)
    token = "" if flags.token_fd is None else secrecy.read_token(flags.token_fd)
    if token:
        secrecy.hide()
    _die_with(os.environ.get("LATTICE_PARENT_PID"))
    # Orphans of the zygote become children of this process, which kills them; see `Zygotes`.
    host.adopt_orphans()
    host.raise_descriptor_limit()
    with store(flags.store_dir) as directory:
        config = _config(flags, directory, token)
        try:
            check(config)
        except ChannelError as error:
            sys.exit(f"lattice_worker: {error}")
        worker = Joiner(config) if flags.join else Agent(config)
        uvloop.run(_run(worker, None if config.exit_on_close else flags.drain_deadline))
    if worker.refusal and not config.exit_on_close:
        sys.exit(f"the server would not have this worker: {worker.refusal}")


def _config(flags: argparse.Namespace, directory: str, token: str) -> WorkerConfig:
    return WorkerConfig(
        target=flags.addr,
        server=flags.server or flags.addr,
        worker_id=flags.worker_id or f"{flags.node_id}-{uuid4().hex[:12]}",
        node_id=flags.node_id,
        store_directory=directory,
        store_name=HEAD_STORE if flags.store_dir else flags.node_id,
        token=token,
        tls_ca=os.environ.get("LATTICE_TLS_CA", ""),
        tls_cert=os.environ.get("LATTICE_TLS_CERT", ""),
        tls_key=os.environ.get("LATTICE_TLS_KEY", ""),
        insecure=os.environ.get("LATTICE_INSECURE") == "1",
        num_cpus=flags.num_cpus,
        num_gpus=flags.num_gpus,
        memory_bytes=flags.memory_bytes,
        gpu_memory_bytes=flags.gpu_memory_bytes,
        labels=dict(label.split("=", 1) for label in flags.label),
        exit_on_close=flags.exit_on_close,
        host_fd=flags.host_fd,
        engine=EngineConfig.of(os.environ),
        named_group=os.environ.get("LATTICE_CGROUP"),
        egress_networks=_networks(os.environ.get("LATTICE_EGRESS_NETWORKS", "")),
        gateway_port=_port(os.environ.get(GATEWAY_PORT, "")),
        preload=_modules(os.environ.get(PRELOAD, "")),
    )


def _modules(text: str) -> tuple[str, ...]:
    """Return a list of modules. The process that imports them tells which one cannot be imported."""
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def _networks(text: str) -> str:
    """Return a list of networks. Exits when it is none: without them the worker would refuse servers."""
    try:
        networks_of(text)
    except ValueError as error:
        sys.exit(f"lattice_worker: LATTICE_EGRESS_NETWORKS must be networks such as 10.1.0.0/16, by commas: {error}")
    return text


def _port(text: str) -> int:
    """Return a port; 0 for an empty text. Exits when it is none: a firewall would keep other gateways out."""
    if not text:
        return 0
    if not text.isdecimal() or not 0 < int(text) <= MAX_PORT:
        sys.exit(f"lattice_worker: {GATEWAY_PORT} must be a port from 1 to {MAX_PORT}, not {text!r}")
    return int(text)


@contextlib.contextmanager
def store(directory: str | None) -> Iterator[str]:
    """A directory for large values: the given one, or a new one that goes with the worker.

    A new one is in memory if enough of that is free, with a folder on disk for values that do not fit; else on disk.
    """
    if directory is not None:
        yield directory
        return
    on_disk = Path(tempfile.gettempdir())
    if not _is_roomy(SHARED_MEMORY):
        with _folder(on_disk) as made:
            yield str(made)
        return
    with _folder(SHARED_MEMORY) as made, contextlib.ExitStack() as closing:
        with contextlib.suppress(OSError):
            (made / DISK).symlink_to(closing.enter_context(_folder(on_disk)).resolve())
        yield str(made)


def _is_roomy(folder: Path) -> bool:
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize >= MIN_SHARED_MEMORY_BYTES


@contextlib.contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """A folder of this worker's, while the block runs; those of workers that were killed are deleted."""
    for left in parent.glob(f"{STORE_PREFIX}*"):
        # One that is new may not be locked yet.
        with contextlib.suppress(OSError), locked(left):
            if time.time() - left.stat().st_mtime > NEW_S:
                shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=STORE_PREFIX, dir=parent, ignore_cleanup_errors=True) as made,
        locked(Path(made)),
    ):
        yield Path(made)


async def _run(worker: Agent | Joiner, drain_deadline_s: float | None) -> None:
    """Run a worker until it is over. The first signal asks it to leave, if it may take its time; the next ends it."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(worker.run())
    is_leaving = False

    def leave() -> None:
        nonlocal is_leaving
        if is_leaving or drain_deadline_s is None:
            task.cancel()
            return
        is_leaving = True
        worker.leave(drain_deadline_s)
        # A server that cannot be reached cannot let it go.
        loop.call_later(drain_deadline_s + DRAIN_MARGIN_S, task.cancel)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, leave)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _die_with(parent: str | None) -> None:
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit("the process that started this worker is gone")
