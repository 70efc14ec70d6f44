"""Owns the life of a server: it starts the parts in order, and stops them in reverse order."""

import asyncio
import glob
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

from lattice.v1 import cluster_pb2

from lattice_server import __version__, background
from lattice_server.composition import Engine, authentication_of, executor_of, metrics_of, rpc_server, tracing_of
from lattice_server.config import ServerConfig
from lattice_server.core.errors import UnavailableError
from lattice_server.engine.ports import Contact
from lattice_server.engine.restoring.run_restorer import RunRestorer
from lattice_server.engine.runs.run_logging import TaskOutputLog
from lattice_server.garbage import GarbageCollection
from lattice_server.rpc.convert.cluster import FEATURES, PROTOCOL_VERSION, limits_to_proto, usage_to_proto
from lattice_server.rpc.convert.times import timestamp
from lattice_server.secrets_file import read_secrets
from lattice_server.tokens import Scope, credential, digest_of, new_token, read_tokens, reload_on_change

log = logging.getLogger(__name__)

# How long one thread may hold the interpreter; the default of 5 ms would be most of a task's latency.
SWITCH_INTERVAL_S = 0.0005
WORKER_START_S = 30.0
# The stores that keep many small objects, and how much they may have while all objects are collected.
WITH_OBJECTS = frozenset({"stored workflows", "drafts", "ended runs"})
IDLE_BYTES = 64 * 1024 * 1024


class SchedulerError(Exception):
    """A part of the server failed for good, and the server was stopped."""


class App:
    """One server. Build, start and stop it on the event loop of the main thread. Once it `has_failed`, stop it."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.address = ""
        self.has_failed = asyncio.Event()
        self._started_s = time.time()
        self._background: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        self._engine = Engine(config, lambda: loop.call_soon_threadsafe(self.has_failed.set))
        with ExitStack() as unfinished:
            unfinished.callback(self._engine.close)
            self._connect(config)
            unfinished.pop_all()

    def _connect(self, config: ServerConfig) -> None:
        """Build the parts around the engine. Raises TelemetryError, SecurityError."""
        self._garbage = GarbageCollection(self._is_idle)
        self._engine.orchestrator.ended.on_add = self._garbage.request
        self._executor = executor_of(config, self._engine.store.directory)
        self._authentication = authentication_of(config)
        self._tracing = tracing_of(config, self._engine)
        self._metrics = metrics_of(config, self._engine)
        if config.task_output == "log":
            self._engine.orchestrator.observers.append(TaskOutputLog())
        parts = (self._authentication, self._describe, self._metrics, self._tracing)
        self._rpc, self._workers = rpc_server(config, self._engine, self._executor, *parts)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads the metrics; empty when it does not."""
        return "" if self._metrics is None else self._metrics.url

    async def start(self) -> None:
        """Listen, then start workers. Live runs of the journal are restored in the background.

        Raises PortInUseError, ExecutorError, TelemetryError, after stopping the started parts.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        # Before the runs of the journal are made: full collections would look through all that are made by then.
        self._garbage.start()
        try:
            self._engine.read_journal()
            port = await self._rpc.start()
        except BaseException:
            self._garbage.stop()
            self._engine.close()
            raise
        self.address = self.config.address(port)
        self._engine.scheduler.start()
        self._start_background()
        contact = Contact(self._rpc.local_target, self.address, self._issue, self._revoke, self._fail)
        try:
            if self._metrics is not None:
                await self._metrics.start()
            await self._executor.start(contact, self._engine.bus.post)
        except BaseException:
            await self.stop()
            raise
        await self._rpc.set_serving(True)

    def _start_background(self) -> None:
        """Restore runs, start the heartbeats of sessions, and watch the files that are read again when they change."""
        found = [self._engine.sessions.watch(self.config.heartbeat_interval_s)]
        if (restorer := self._engine.orchestrator.restorer) is not None:
            found.append(self._restore(restorer))
        if self._authentication is not None and self.config.tokens_file:
            path = Path(self.config.tokens_file)
            found.append(reload_on_change(path, "--tokens-file", read_tokens, self._authentication.replace))
        if self.config.secrets_file:
            replace = self._engine.orchestrator.requirements.secrets.replace
            found.append(reload_on_change(Path(self.config.secrets_file), "--secrets", read_secrets, replace))
        if self._rpc.certificates is not None:
            found.append(self._rpc.certificates.reload_on_change())
        self._background += [background.start(work, self._fail) for work in found]

    async def _restore(self, restorer: RunRestorer) -> None:
        try:
            await restorer.restore()
        except UnavailableError:
            return  # The server stops.
        except Exception:
            log.critical("the runs of the journal cannot be restored, and the server stops")
            raise

    def _fail(self, error: BaseException) -> None:
        """Have the server stopped: a part of it has failed."""
        self.has_failed.set()

    def _is_idle(self) -> bool:
        """Whether no task is open, and so little is kept that looking through it takes a few ms."""
        kept = (usage.total for usage in self._engine.usages() if usage.what in WITH_OBJECTS)
        return not self._engine.admission.open_tasks and sum(kept) <= IDLE_BYTES

    async def ready(self) -> None:
        """Wait until the first worker has connected, or for the time that one may need to start."""
        if self.config.num_cpus == 0:
            return
        try:
            async with asyncio.timeout(WORKER_START_S):
                await self._engine.admission.has_nodes()
        except TimeoutError:
            log.warning("no worker has connected within %.0f s", WORKER_START_S)

    async def stop(self) -> None:
        """Refuse new work, close the workers' sessions, and end every process that the server started."""
        # In reverse order; each step runs even when the ones before it raised.
        async with AsyncExitStack() as ending:
            ending.callback(self._engine.close)
            ending.push_async_callback(asyncio.to_thread, self._engine.scheduler.stop)
            ending.push_async_callback(self._stop_telemetry)
            ending.callback(self._garbage.stop)
            for task in self._background:
                ending.callback(task.cancel)
            ending.push_async_callback(self._rpc.stop, self.config.stop_grace_s)
            ending.push_async_callback(self._executor.stop)
            ending.callback(self._workers.close_all)
            if (restorer := self._engine.orchestrator.restorer) is not None:
                ending.callback(restorer.stop)
            if self._engine.journal is not None:
                # The ends of workers that stop with the server are no facts of the runs, which continue after a start.
                ending.callback(self._engine.journal.freeze)
            self._engine.orchestrator.is_stopping = True
            await self._rpc.set_serving(False)

    async def _stop_telemetry(self) -> None:
        # Together: each may wait for a collector that does not answer.
        await asyncio.gather(*(part.stop() for part in (self._metrics, self._tracing) if part is not None))

    def _issue(self, node_id: str, subject: str) -> str:
        """Return a new token for the worker of a node."""
        token = new_token()
        if self._authentication is not None:
            worker = credential(subject, digest_of(token), {Scope.WORKER}, nodes=(glob.escape(node_id),))
            self._authentication.issue(worker)
        return token

    def _revoke(self, token: str) -> None:
        if self._authentication is not None:
            self._authentication.revoke(digest_of(token))

    async def _describe(self) -> cluster_pb2.GetServerInfoResponse:
        orchestrator, usages = self._engine.orchestrator, self._engine.usages()
        described = await orchestrator.queries.nodes()
        return cluster_pb2.GetServerInfoResponse(
            version=__version__,
            protocol_version=PROTOCOL_VERSION,
            features=FEATURES,
            limits=limits_to_proto(self.config, usages),
            stores=map(usage_to_proto, usages),
            executor=self._executor.name,
            server_epoch=self._engine.epoch,
            start_time=timestamp(self._started_s),
            ray_address=self._executor.ray_address(),
            pid=os.getpid(),
            active_runs=orchestrator.active_runs,
            queued_tasks=described.waiting,
            current_time=timestamp(time.time()),
            running_attempts=described.running,
            metrics_url=self.metrics_url,
        )


async def serve(config: ServerConfig, announce: Callable[[str, str], None]) -> None:
    """Run a server until SIGINT or SIGTERM.

    `announce` is called with its address and the URL of its metrics, if any, once a worker has connected.

    Raises SchedulerError when the server had to stop by itself, ExecutorError when it cannot have workers.
    """
    stopping = asyncio.Event()
    _on_signals(stopping.set)
    app = App(config)
    await app.start()
    try:
        await _first(app.ready(), stopping.wait(), app.has_failed.wait())
        if not stopping.is_set() and not app.has_failed.is_set():
            announce(app.address, app.metrics_url)
        await _first(stopping.wait(), app.has_failed.wait())
    finally:
        await app.stop()
    if app.has_failed.is_set():
        raise SchedulerError("a part of the server failed, and the server stopped; its log says why")


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    tasks = [background.share(wait) for wait in waits]
    ended, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    for task in ended:
        task.result()


def _on_signals(callback: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, callback)
