"""Starts the worker of this machine for `lattice start --worker`. Rule: secrets reach it by a pipe or in files."""

import os
import re
import secrets
import socket
import sys
from typing import NoReturn

import click

from lattice_server import pidfile, security
from lattice_server.config import ServerConfig
from lattice_server.executors.processes import token_flags
from lattice_server.flags import Flags, noting, secured

MAX_PORT = 65_535


def become_worker(flags: Flags) -> NoReturn:
    """Replace this process by the worker's program, which then gets its signals and sets its exit status."""
    if not flags.addr:
        raise click.UsageError("say which server to join: --addr HOST:PORT")
    port = re.search(r":(\d{1,5})$", flags.addr)
    if port is None or not 0 < int(port[1]) <= MAX_PORT:
        form = f"HOST:PORT, with a port from 1 to {MAX_PORT}"
        raise click.UsageError(f"--addr {flags.addr!r} names no port: write {form}")
    # Not by flags: all users of this machine may read a command line.
    files = {"LATTICE_TLS_CA": flags.tls_ca, "LATTICE_TLS_CERT": flags.tls_cert, "LATTICE_TLS_KEY": flags.tls_key}
    os.environ.update({name: str(path.absolute()) for name, path in files.items() if path is not None})
    flags.gateways(ServerConfig())
    if flags.insecure:
        os.environ["LATTICE_INSECURE"] = "1"
    with secured():
        token = security.read_token(flags.token_file, os.environ)
    # Nor by the environment: tasks of the same user may read it.
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
    with noting():
        pidfile.note(f"node-{node_id}")
    sys.stdout.flush()
    os.execv(sys.executable, command)
