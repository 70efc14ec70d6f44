"""Builds the server's parts, starts and stops them in order. The only module that knows all the others."""

import asyncio
import gc
import glob
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from lattice.v1 import cluster_pb2

from lattice_server import __version__
from lattice_server.config import ServerConfig
from lattice_server.core.run.run import Bounds
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine.admission import Admission
from lattice_server.engine.artifact_store import ArtifactStore
from lattice_server.engine.artifact_transfer import Transfers
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.code_store import CodeStore
from lattice_server.engine.drafts import Drafts
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import Contact, Executor
from lattice_server.engine.run_entry import Retention
from lattice_server.engine.scheduler_thread import SchedulerThread
from lattice_server.engine.sessions import Sessions
from lattice_server.engine.slices import Slices
from lattice_server.engine.store_folder import SOCKET
from lattice_server.engine.usage import Bound
from lattice_server.engine.workflow_store import WorkflowLibrary
from lattice_server.rpc.artifacts import ArtifactServicer
from lattice_server.rpc.authentication import Authentication
from lattice_server.rpc.cluster import ClusterServicer
from lattice_server.rpc.convert.payloads import timestamp
from lattice_server.rpc.idempotency import Repeats
from lattice_server.rpc.limits import FEATURES, PROTOCOL_VERSION, limits_to_proto, usage_to_proto
from lattice_server.rpc.node_join import Machines
from lattice_server.rpc.request_parser import Intake
from lattice_server.rpc.results import ResultsServicer
from lattice_server.rpc.server import RpcServer
from lattice_server.rpc.tasks import TaskServicer
from lattice_server.rpc.workers import WorkerServicer
from lattice_server.rpc.workflows import WorkflowServicer
from lattice_server.tokens import ANY_TENANT, Scope, credential, digest_of, follow, new_token, read_tokens

log = logging.getLogger(__name__)

# How long one thread may hold the interpreter; the default of 5 ms would be most of a task's latency.
SWITCH_INTERVAL_S = 0.0005
WORKER_START_S = 30.0
# Collections of a heap that holds whole graphs take long, and find little: almost nothing here forms cycles. The two
# younger generations are small, so that no thread is held up for long; the oldest one is rarely looked through.
GC_THRESHOLDS = (5_000, 4, 12_500)


class SchedulerError(Exception):
    """The scheduler failed for good, and the server was stopped."""


class App:
    """One server. Build, start and stop it on the event loop of the main thread. Once it `has_failed`, stop it."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.address = ""
        self._started_s = time.time()
        share = config.tenant_share
        self._store = ArtifactStore(config.store_folder, config.spare_bytes, upload_ttl_s=config.upload_ttl_s)
        # What all upload leaves as much again for what tasks make.
        self._store.uploads.usage.bound = Bound(min(config.upload_bytes, self._store.total_bytes // 2), share)
        code = CodeStore(Bound(config.code_bytes, share))
        loop = asyncio.get_running_loop()
        self._bus = MessageBus(loop)
        self.has_failed = asyncio.Event()
        self._sessions = Sessions(config.silence_limit_s)
        bounds = Bounds(config.max_run_tasks, config.max_map_items, config.max_spawn_depth)
        slices = Slices()
        self._admission = admission = Admission(bounds, config.max_open_tasks)
        self._orchestrator = Orchestrator(
            self._bus,
            self._sessions,
            self._store,
            code,
            Retention(
                config.retained_runs,
                config.retained_bytes,
                min(config.retained_artifact_bytes, self._store.total_bytes // 2),
                share,
                config.result_ttl_s,
                config.repeat_ttl_s,
            ),
            admission,
            config.open_run_grace_s,
            slices,
        )
        self._epoch = epoch = secrets.token_hex(4)
        transfers = Transfers(self._store, self._sessions)
        self._store.on_drop = self._sessions.drop_artifact
        self._sessions.unneeded = self._store.unneeded
        self._watching: list[asyncio.Task[None]] = []
        machine = Scheduler(epoch, config.session_ttl_s, config.limits)
        self._scheduler = SchedulerThread(machine, self._bus, lambda: loop.call_soon_threadsafe(self.has_failed.set))
        self._executor = _executor(config, self._store)
        self._authentication = _authentication(config)
        intake = Intake(code, config.inline_limit_bytes, config.batch_rules)
        repeats = Repeats(slices=slices, kept_s=config.repeat_ttl_s)
        library = WorkflowLibrary(self._store, code, config.max_workflows, Bound(config.workflow_bytes, share))
        drafts = Drafts(self._store, config.max_run_tasks)
        ended = self._orchestrator.ended
        self._stores = (code.usage, self._store.uploads.usage, library.usage, ended.memory, ended.values)
        self._workers = WorkerServicer(
            config,
            self._bus,
            self._sessions,
            intake,
            transfers,
            Machines(config, self._executor, self._bus, self._orchestrator.inquiries),
            epoch,
            admission.check_possible,
        )
        self._rpc = RpcServer(
            config,
            str(self._store.directory / SOCKET),
            WorkflowServicer(self._orchestrator, library, drafts, intake, repeats, slices, config.question_limit_bytes),
            TaskServicer(self._orchestrator, intake, repeats),
            ResultsServicer(self._orchestrator, slices),
            ArtifactServicer(self._store, transfers),
            ClusterServicer(self._bus, self._sessions, self._orchestrator.inquiries, repeats, self._describe),
            self._workers,
            self._authentication,
            slices,
        )

    async def start(self) -> None:
        """Listen, then start workers. Raises PortInUseError, ExecutorError; what had been started is stopped then."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.set_threshold(*GC_THRESHOLDS)
        try:
            port = await self._rpc.start()
        except BaseException:
            self._store.close()
            raise
        self.address = self.config.address(port)
        self._scheduler.start()
        config = self.config
        self._watching.append(asyncio.create_task(self._sessions.watch(config.heartbeat_interval_s)))
        if self._authentication is not None and config.tokens_file:
            self._watching.append(asyncio.create_task(follow(Path(config.tokens_file), self._authentication.replace)))
        if self._rpc.certificates is not None:
            self._watching.append(asyncio.create_task(self._rpc.certificates.follow()))
        contact = Contact(self._rpc.local_target, self.address, self._issue, self._revoke)
        try:
            await self._executor.start(contact, self._bus.post)
        except BaseException:
            await self.stop()
            raise
        await self._rpc.set_serving(True)

    async def ready(self) -> None:
        """Wait until the first worker is there, or for as long as one may need to start."""
        if self.config.num_cpus == 0:
            return
        try:
            async with asyncio.timeout(WORKER_START_S):
                await self._admission.has_nodes()
        except TimeoutError:
            log.warning("no worker has connected within %.0f s", WORKER_START_S)

    async def stop(self) -> None:
        """Refuse new work, say goodbye to workers, end every process the server started."""
        # From the last to the first, each whatever became of those before it.
        async with AsyncExitStack() as ending:
            ending.callback(self._store.close)
            ending.push_async_callback(asyncio.to_thread, self._scheduler.stop)
            for watching in self._watching:
                ending.callback(watching.cancel)
            ending.push_async_callback(self._rpc.stop, self.config.stop_grace_s)
            ending.push_async_callback(self._executor.stop)
            ending.callback(self._workers.close_all)
            self._orchestrator.is_stopping = True
            await self._rpc.set_serving(False)

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
        described = await self._orchestrator.inquiries.nodes()
        return cluster_pb2.GetServerInfoResponse(
            version=__version__,
            protocol_version=PROTOCOL_VERSION,
            features=FEATURES,
            limits=limits_to_proto(self.config, self._stores),
            stores=map(usage_to_proto, self._stores),
            executor=self._executor.name,
            server_epoch=self._epoch,
            start_time=timestamp(self._started_s),
            ray_address=self._executor.ray_address(),
            pid=os.getpid(),
            active_runs=sum(not entry.run.is_terminal for entry in self._orchestrator.runs.values()),
            queued_tasks=described.waiting,
            running_attempts=described.running,
        )


def _authentication(config: ServerConfig) -> Authentication | None:
    """Return who may call; None where nobody is asked. Raises SecurityError."""
    if config.token is None and not config.tokens_file:
        return None
    token = config.token
    own = [] if token is None else [credential("operator", digest_of(token), [*Scope], tenant=ANY_TENANT)]
    made = Authentication(own)
    if config.tokens_file:
        made.replace(read_tokens(Path(config.tokens_file)))
    return made


def _executor(config: ServerConfig, store: ArtifactStore) -> Executor:
    if config.executor == "ray":
        from lattice_server.executors.ray import RayExecutor

        return RayExecutor(config, store.directory)
    from lattice_server.executors.local import LocalExecutor

    return LocalExecutor(config, store.directory)


async def serve(config: ServerConfig, announce: Callable[[str], None]) -> None:
    """Run a server until SIGINT or SIGTERM; `announce` is told its address once there is a worker.

    Raises SchedulerError when the server had to stop by itself, ExecutorError when there can be no workers.
    """
    stopping = asyncio.Event()
    _on_signals(stopping.set)
    app = App(config)
    await app.start()
    await _first(app.ready(), stopping.wait(), app.has_failed.wait())
    if not stopping.is_set() and not app.has_failed.is_set():
        announce(app.address)
    await _first(stopping.wait(), app.has_failed.wait())
    await app.stop()
    if app.has_failed.is_set():
        raise SchedulerError("the scheduler failed and the server stopped; its log says why")


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _on_signals(callback: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, callback)
