"""Owns the child process that is Ray's driver. Rule: this module does not import Ray; it sends orders and reads events.

A process that is a driver of Ray is ended by Ray when Ray's head dies, so the server is not one itself.

An order is a JSON object a line on the child's stdin: first the settings of `Settings`, then `{"do": "reserve", "key",
"bundle"}`, `{"do": "serve", "key", "bundle", "worker_id", "store", "flags", "target", "environment",
"follows_node"}` and
`{"do": "release", "key"}`. An event is one on its stdout: `started` (address, total), `placed` (key, worker_id, pid),
`ended` (key, worker_id, status, reason) and, last, `over` (reason).
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, field, replace
from typing import Any, BinaryIO

from lattice_server.config import ServerConfig
from lattice_server.core.frozen import frozen
from lattice_server.executors.bind_address import ray_interface
from lattice_server.executors.processes import end_session
from lattice_server.executors.ray_folder import LOG, RayFolder
from lattice_server.executors.ray_reservation import HEAD, whole_cpus

log = logging.getLogger(__name__)

STOP_S = 10.0
LINE_LIMIT_BYTES = 1024 * 1024
# For the Ray that this server starts; variables in the environment override these.
TUNING = {
    # The loss of a node is detected within some seconds, so that its reservation waits for it to come back.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    # The head would serve these on all interfaces; -1 turns them off.
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Patch releases of one Python are compatible; by default Ray refuses them.
    "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
}
# Variables for the user's own commands, which Ray's processes must not inherit: RAY_ADDRESS names a Ray of the user's
# own, and nodes of this server's Ray would join that one.
PRIVATE = ("LATTICE_TARGET", "LATTICE_TOKEN", "RAY_ADDRESS")


@frozen
class Settings:
    """The Ray to start, or with an address other than `local` the one to join."""

    address: str = "local"
    node_ip: str = ""
    num_cpus: int | None = None
    num_gpus: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    temp_dir: str = ""


class RayChild:
    """One driver and the Ray it started. Everything runs on the main thread's event loop."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        inherited = {name: value for name, value in os.environ.items() if name not in PRIVATE}
        self._environment = {**inherited, **environment, "LATTICE_PARENT_PID": str(os.getpid())}
        self._process: asyncio.subprocess.Process | None = None
        self._folder: RayFolder | None = None

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Start the driver and yield its events, until it ends. Raises OSError."""
        self._folder = folder = RayFolder()
        with (folder.path / LOG).open("wb") as file:
            await self._start(None if log.isEnabledFor(logging.INFO) else file)
        self.order(**asdict(replace(self._settings, temp_dir=str(folder.path))))
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            yield json.loads(line)

    async def _start(self, output: BinaryIO | None) -> None:
        """Start the driver; `output` takes the log of its Ray, or None to inherit stderr."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lattice_server.executors.ray_driver",
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            limit=LINE_LIMIT_BYTES,
            # Signals of the terminal are for the server only, and the session identifies all of Ray's processes.
            start_new_session=True,
        )

    def order(self, **order: Any) -> None:
        """Send an order to the driver, if it runs."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def stop(self) -> None:
        """End the driver, the Ray it started, and leftover processes of that."""
        try:
            if self._process is not None:
                await self._end(self._process)
        finally:
            folder, self._folder = self._folder, None
            if folder is not None:
                await asyncio.to_thread(folder.close)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await asyncio.to_thread(end_session, process.pid)


def ray_child(config: ServerConfig, token: str) -> RayChild:
    """Return a driver of the Ray that a server has for itself, protected by `token`, or of the one it is to join."""
    if config.ray_address:
        return RayChild(Settings(address=config.ray_address), {})
    settings = Settings(
        node_ip=ray_interface(config.node_ip or config.host),
        num_cpus=None if config.num_cpus is None else whole_cpus(config.num_cpus),
        num_gpus=0 if config.num_cpus == 0 else config.num_gpus,
        resources={HEAD: 1},
    )
    tuning = {name: os.environ.get(name, value) for name, value in TUNING.items()}
    # In the environment, which only this user can read. By default Ray shares one token among all of the user's Rays.
    return RayChild(settings, {**tuning, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
