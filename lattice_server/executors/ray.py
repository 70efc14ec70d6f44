"""Has Ray place and start workers.

Rule: Ray reserves, places and starts; assignments travel over the workers' streams.

A worker runs inside a placement group's bundle that holds all it offers, so Ray's own accounting stays true. Ray runs
in other processes; when it dies, another one is started, and the workers and machines come back.
"""

import asyncio
import contextlib
import logging
import platform
import secrets
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lattice_server import background
from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent
from lattice_server.engine.ports import Contact, ExecutorError, Machine, Membership, RayCluster
from lattice_server.executors.backoff import Backoff
from lattice_server.executors.ray_driver_client import RayChild, ray_child
from lattice_server.executors.ray_members import RayMembers
from lattice_server.executors.ray_workers import RayWorkers

log = logging.getLogger(__name__)

LEAVE_S = 5.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0


class RayExecutor:
    """Starts a Ray or joins one, reserves there, and restarts the worker of each reservation when it dies."""

    name = "ray"

    def __init__(self, config: ServerConfig, store_directory: Path) -> None:
        self._config = config
        self._store_directory = store_directory
        self._token = ""
        self._address = ""
        self._is_up = asyncio.Event()
        self._child: RayChild | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._members = RayMembers(config)
        self._workers: RayWorkers | None = None
        self._has_begun = False

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start Ray and the workers, again whenever one dies. Raises ExecutorError when Ray cannot start."""
        self._contact = contact
        workers = self._workers = RayWorkers(self._config, contact, self._order, post, self._members.note_release)
        self._supervisor = background.share(self._supervise(workers))
        up = background.share(self._is_up.wait())
        await asyncio.wait({self._supervisor, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._supervisor.done():
            self._supervisor.result()
        background.watch(self._supervisor, contact.on_failure)

    async def stop(self) -> None:
        """End the workers and the Ray this executor started; leave another's as it was."""
        if self._workers is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await self._workers.all_ended()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    def ray_address(self) -> str:
        """Return where Ray's head listens."""
        return self._address

    async def join(self, machine: Machine) -> Membership:
        """Take a machine into Ray, once Ray is up. In another's Ray a machine has to serve its node itself."""
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if self._config.ray_address:
            return Membership(None, over)
        await self._is_up.wait()
        assert self._workers is not None
        resource = self._members.join(machine, over, self._workers, self._contact)
        return Membership(RayCluster(self._address, self._token, resource, _version()), over)

    def leave(self, node_id: str, membership: Membership) -> None:
        """Release the machine's reservation unless it joins again in time."""
        assert self._workers is not None
        self._members.leave(node_id, membership.over, self._workers)

    def has_given_up(self, worker_id: str) -> bool:
        """Whether a worker was given up: it may connect again before Ray can end it."""
        return self._workers is not None and self._workers.has_given_up(worker_id)

    async def _supervise(self, workers: RayWorkers) -> None:
        """Start a Ray, and another one whenever it ends."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(MIN_BACKOFF_S, MAX_BACKOFF_S)
        while True:
            started = loop.time()
            try:
                reason = await self._run_ray(workers)
            except OSError as error:
                reason = f"its driver could not be started: {error}"
            if not self._has_begun:
                raise ExecutorError(f"{reason}; --verbose shows what Ray writes, --executor local does without Ray")
            log.error("Ray is gone: %s; starting another", reason)
            await workers.lose_all(f"Ray is gone: {reason}")
            self._members.restart_all()
            await asyncio.sleep(backoff.after(loop.time() - started))

    async def _run_ray(self, workers: RayWorkers) -> str:
        """Run a Ray to its end and return how it ended. Raises OSError."""
        reason = "its driver ended"
        self._token = secrets.token_hex(32)
        child = self._child = ray_child(self._config, self._token)
        try:
            async for event in child.events():
                if event["event"] == "over":
                    reason = event["reason"]
                elif event["event"] == "started":
                    self._begin(workers, event["address"], event["total"])
                else:
                    workers.take(event)
        finally:
            self._is_up.clear()
            self._address = ""
            await child.stop()
        return reason

    def _begin(self, workers: RayWorkers, address: str, total: dict[str, float]) -> None:
        self._address = address
        if not self._has_begun:
            self._has_begun = True
            workers.begin(total, self._store_directory)
        workers.reserve_all()
        self._is_up.set()

    def _order(self, **order: Any) -> None:
        if self._child is not None:
            self._child.order(**order)


def _version() -> str:
    """Return the versions of Ray and Python here, which a machine must have too."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"ray {metadata.version('ray')} on python {python}"
