"""The Ray node of this machine: a child process that is started, watched and ended here.

Rule: it ends with this process, however that ends.
"""

import asyncio
import contextlib
import json
import logging
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from lattice.v1 import worker_pb2

from lattice_worker import background
from lattice_worker.config import WorkerConfig
from lattice_worker.machine import host
from lattice_worker.machine.ray_folder import LOG, RayFolder
from lattice_worker.runner.surroundings.process_tree import kill_tree

log = logging.getLogger(__name__)

# Names a Ray of the user's own; it would take precedence over the cluster to join.
USERS_RAY = "RAY_ADDRESS"
RESTART_S = 1.0
STOP_S = 5.0
# `ray`, which ends at once when its parent is gone, named by the first argument. Ray takes a loopback address for a
# mistake and puts one of this machine's network in its place; a head on this machine is found at loopback only.
RAY = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("its parent is gone")
import ray._private.services, ray.scripts.scripts
ray._private.services.resolve_ip_for_localhost = lambda host: host
ray.scripts.scripts.main()
"""


def version() -> str:
    """Return the versions of Ray and Python here."""
    python = ".".join(platform.python_version_tuple()[:2])
    try:
        return f"ray {metadata.version('ray')} on python {python}"
    except metadata.PackageNotFoundError:
        return f"no ray on python {python}"


class RayNode:
    """One Ray node, kept alive until it is stopped."""

    def __init__(self, config: WorkerConfig, cluster: worker_pb2.RayCluster) -> None:
        self._config = config
        self._cluster = cluster
        self._process: asyncio.subprocess.Process | None = None
        self._folder: RayFolder | None = None
        self._restarting: asyncio.Task[None] | None = None

    def is_of(self, cluster: worker_pb2.RayCluster) -> bool:
        """Whether this is a node of that cluster."""
        return bool(self._cluster == cluster)

    def start(self) -> None:
        """Start the node, and again whenever it ends."""
        self._restarting = background.start(self._keep_running(), lambda _: self.start())

    async def stop(self, *, at_once: bool = False) -> None:
        """End the node and its processes; `at_once` without waiting for its cluster, which is gone."""
        if self._restarting is not None:
            self._restarting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restarting
        if self._process is not None and self._process.returncode is None:
            await self._end(self._process, at_once=at_once)
        await self._clear()

    async def _end(self, process: asyncio.subprocess.Process, *, at_once: bool) -> None:
        if not at_once:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await process.wait()
        kill_tree(process.pid)
        await process.wait()

    async def _clear(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(folder.close)

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._clear()
                self._folder = RayFolder()
                with (self._folder.path / LOG).open("wb") as file:
                    # Its output is a long guide to using Ray by hand.
                    output = sys.stderr if log.isEnabledFor(logging.INFO) else file
                    self._process = await asyncio.create_subprocess_exec(
                        *self._command(self._folder.path),
                        env=self._environment(),
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                status = await self._process.wait()
                log.warning("the Ray node of this machine ended with status %s; starting another", status)
            except OSError as error:
                log.warning("a Ray node could not be started on this machine: %s; trying again", error)
            except Exception:
                log.exception("a Ray node could not be started on this machine; trying again")
            # One that cannot even start must not be started in a tight loop.
            await asyncio.sleep(RESTART_S)

    def _command(self, folder: Path) -> list[str]:
        capacity = host.capacity(self._config)
        command = [sys.executable, "-c", RAY, str(os.getpid()), "start", "--address", self._cluster.address]
        command += ["--node-ip-address", host.address_towards(self._cluster.address), "--temp-dir", str(folder)]
        command += ["--num-cpus", str(max(1, int(capacity.cpu))), "--num-gpus", str(len(capacity.gpus))]
        command += ["--resources", json.dumps({self._cluster.resource: 1}), "--disable-usage-stats", "--block"]
        # What tasks write is in the log of their run; Ray need not read it too.
        command += ["--include-log-monitor", "false"]
        return command

    def _environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name != USERS_RAY},
            "LATTICE_TARGET": self._config.target,
            "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._cluster.token,
        }
