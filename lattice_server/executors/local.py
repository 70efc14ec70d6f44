"""Starts one worker as a process of this machine. Rule: it ends what it started, by its id, and nothing else."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent, WorkerLost
from lattice_server.engine.ports import Contact, Machine, Membership
from lattice_server.executors.orphans import MARK, end_leftovers
from lattice_server.executors.program import worker_command
from lattice_server.executors.worker_command import log_flags, offer_of_head, worker_flags

log = logging.getLogger(__name__)

STOP_S = 5.0
MAX_BACKOFF_S = 5.0


class LocalExecutor:
    """Keeps one worker process alive beside the server."""

    name = "local"

    def __init__(self, config: ServerConfig, store_directory: Path) -> None:
        self._config = config
        self._store_directory = store_directory
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._worker_id = ""

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start the worker, and again whenever it dies; none where nothing is offered."""
        if self._config.num_cpus == 0:
            return
        self._keeper = asyncio.create_task(self._keep(contact, post))

    async def stop(self) -> None:
        """End the worker."""
        self._is_stopping = True
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
                await asyncio.to_thread(end_leftovers, self._worker_id)

    def ray_address(self) -> str:
        """Return nothing: there is no Ray here."""
        return ""

    async def join(self, machine: Machine) -> Membership:
        """Let the machine serve its node itself."""
        return Membership(None, asyncio.get_running_loop().create_future())

    def leave(self, node_id: str, membership: Membership) -> None:
        """Do nothing: the worker's own stream tells."""

    def has_given_up(self, worker_id: str) -> bool:
        """Return False: a process of this machine that ended does not come back."""
        return False

    async def _keep(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        backoff_s = 0.0
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
            lived_s = asyncio.get_running_loop().time() - started
            backoff_s = 0.0 if lived_s > MAX_BACKOFF_S else min(MAX_BACKOFF_S, backoff_s * 2 or 0.1)
            # A worker that cannot even start must not be started in a tight loop.
            await asyncio.sleep(backoff_s)

    async def _run_worker(self, worker_id: str, contact: Contact) -> str:
        """Run a worker to its end and return how it ended. Raises OSError."""
        offer, store, server = offer_of_head(self._config), self._store_directory, contact.target
        flags = worker_flags(offer, worker_id=worker_id, node_id="local", store_directory=store, server=server)
        flags += log_flags(self._config)
        self._process = await asyncio.create_subprocess_exec(
            *worker_command(contact.local_target, flags),
            env={**os.environ, "LATTICE_PARENT_PID": str(os.getpid()), MARK: worker_id},
            stdin=asyncio.subprocess.DEVNULL,
        )
        status = await self._process.wait()
        await asyncio.to_thread(end_leftovers, worker_id)
        return f"its process ended with status {status}"
