"""Starts one worker as a process of this machine. Rule: it ends, by id, only the processes that it started."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from lattice_server import background
from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent, WorkerLost
from lattice_server.engine.ports import OWN_NODE, Contact, Machine, Membership
from lattice_server.executors.backoff import Backoff
from lattice_server.executors.processes import MARK, end_orphans, worker_command
from lattice_server.executors.worker_command import log_flags, offer_of_head, worker_flags

log = logging.getLogger(__name__)

STOP_S = 5.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0


class LocalExecutor:
    """Starts one worker process beside the server, and another one whenever it dies."""

    name = "local"

    def __init__(self, config: ServerConfig, store_directory: Path) -> None:
        self._config = config
        self._store_directory = store_directory
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._worker_id = ""

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start the worker, again whenever it dies; none when the server offers no CPUs."""
        if self._config.num_cpus == 0:
            return
        self._supervisor = background.start(self._supervise(contact, post), contact.on_failure)

    async def stop(self) -> None:
        """End the worker."""
        self._is_stopping = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
                await asyncio.to_thread(end_orphans, self._worker_id)

    def ray_address(self) -> str:
        """Return nothing: there is no Ray here."""
        return ""

    async def join(self, machine: Machine) -> Membership:
        """Let the machine serve its node itself."""
        return Membership(None, asyncio.get_running_loop().create_future())

    def leave(self, node_id: str, membership: Membership) -> None:
        """Do nothing: the end of the worker's own stream is enough."""

    def has_given_up(self, worker_id: str) -> bool:
        """Return False: a process of this machine that ended does not come back."""
        return False

    async def _supervise(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        backoff = Backoff(MIN_BACKOFF_S, MAX_BACKOFF_S)
        while True:
            worker_id = self._worker_id = f"local-{uuid4().hex[:12]}"
            started = asyncio.get_running_loop().time()
            try:
                reason = await self._run_worker(worker_id, contact)
            except OSError as error:
                reason = f"its process could not be started: {error}"
            if self._is_stopping:
                return
            log.warning("the worker is gone: %s; starting another", reason, extra={"worker_id": worker_id})
            post([WorkerLost(worker_id, reason)])
            await asyncio.sleep(backoff.after(asyncio.get_running_loop().time() - started))

    async def _run_worker(self, worker_id: str, contact: Contact) -> str:
        """Run a worker to its end and return how it ended. Raises OSError."""
        offer, store, server = offer_of_head(self._config), self._store_directory, contact.target
        flags = worker_flags(offer, worker_id=worker_id, node_id=OWN_NODE, store_directory=store, server=server)
        flags += log_flags(self._config)
        self._process = await asyncio.create_subprocess_exec(
            *worker_command(contact.local_target, flags),
            env={**os.environ, "LATTICE_PARENT_PID": str(os.getpid()), MARK: worker_id},
            stdin=asyncio.subprocess.DEVNULL,
        )
        status = await self._process.wait()
        await asyncio.to_thread(end_orphans, worker_id)
        return f"its process ended with status {status}"
