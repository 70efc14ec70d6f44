"""Builds the parts of one server from its configuration and connects them. Rule: it starts nothing."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from lattice.v1 import cluster_pb2

from lattice_server.config import ServerConfig
from lattice_server.core.run.run import Bounds
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine.admission import Admission
from lattice_server.engine.artifact_store import ArtifactStore
from lattice_server.engine.artifact_transfer import Transfers
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.chunk_store import ChunkStore
from lattice_server.engine.code_store import CodeStore
from lattice_server.engine.draft_graphs import DraftGraphs
from lattice_server.engine.ended_runs import Retention
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import Executor
from lattice_server.engine.scheduler_thread import SchedulerThread
from lattice_server.engine.services.services import Services
from lattice_server.engine.sessions import Sessions
from lattice_server.engine.slices import Slices
from lattice_server.engine.store_folder import SOCKET
from lattice_server.engine.usage import Bound, Usage
from lattice_server.engine.workflow_store import WorkflowStore
from lattice_server.rpc.artifacts import ArtifactServicer
from lattice_server.rpc.assigned_artifacts import AssignedArtifacts
from lattice_server.rpc.authentication import Authentication
from lattice_server.rpc.cluster import ClusterServicer
from lattice_server.rpc.convert.services import function_of_worker
from lattice_server.rpc.llms import LlmServicer
from lattice_server.rpc.machines import Machines
from lattice_server.rpc.request_cache import RequestCache
from lattice_server.rpc.results import ResultsServicer
from lattice_server.rpc.server import RpcServer
from lattice_server.rpc.services import ServicesServicer
from lattice_server.rpc.spec_parser import SpecParser
from lattice_server.rpc.tasks import TaskServicer
from lattice_server.rpc.workers import WorkerServicer
from lattice_server.rpc.workflows import WorkflowServicer
from lattice_server.tokens import ANY_TENANT, Scope, credential, digest_of, read_tokens

# Functions of workers, which the server calls by their names.
INSTANCE, GATEWAY = "lattice_worker.services.instance:serve", "lattice_worker.gateway.task:serve"


class Engine:
    """The parts around the core: stores, orchestrator, sessions, and the scheduler's thread.

    `on_failure` is called from the scheduler's thread when that gives up.
    """

    def __init__(self, config: ServerConfig, on_failure: Callable[[], object]) -> None:
        share = config.tenant_share
        self.epoch = secrets.token_hex(4)
        self.slices = Slices()
        self.bus = MessageBus(asyncio.get_running_loop())
        self.sessions = Sessions(config.silence_limit_s)
        self.store = ArtifactStore(config.store_folder, config.spare_bytes, upload_ttl_s=config.upload_ttl_s)
        # Uploads may fill half of the file system, so that the outputs of tasks have the other half.
        self.store.uploads.usage.bound = Bound(min(config.upload_bytes, self.store.files.total_bytes // 2), share)
        self.store.on_drop = self.sessions.drop_artifact
        self.sessions.unneeded = self.store.unneeded
        self.transfers = Transfers(self.store, self.sessions)
        self.code = CodeStore(Bound(config.code_bytes, share))
        self.workflows = WorkflowStore(self.store, self.code, config.max_workflows, Bound(config.workflow_bytes, share))
        self.drafts = DraftGraphs(self.store, config.max_run_tasks, Bound(config.draft_bytes, share))
        self.admission = Admission(
            Bounds(config.max_run_tasks, config.max_map_items, config.max_spawn_depth),
            config.max_open_tasks,
            Bound(config.live_run_bytes, share),
        )
        self.orchestrator = Orchestrator(
            self.bus,
            self.sessions,
            self.store,
            self.code,
            _retention(config, self.store),
            self.admission,
            config.open_run_grace_s,
            self.slices,
            ChunkStore(Bound(config.chunk_bytes, share)),
        )
        self.services = Services(self.orchestrator, function_of_worker(INSTANCE), function_of_worker(GATEWAY))
        self.scheduler = SchedulerThread(
            Scheduler(self.epoch, config.session_ttl_s, config.limits), self.bus, on_failure
        )

    def usages(self) -> tuple[Usage, ...]:
        """Return how full each bounded store is."""
        ended = self.orchestrator.ended
        uploads, live = self.store.uploads.usage, self.admission.memory
        chunks = self.orchestrator.chunks.usage
        own = (self.code.usage, uploads, self.workflows.usage, self.drafts.usage, live)
        return *own, ended.memory, ended.values, chunks


def executor_of(config: ServerConfig, store_directory: Path) -> Executor:
    """Return the executor that a configuration names; Ray's modules are imported only for Ray."""
    if config.executor == "ray":
        from lattice_server.executors.ray import RayExecutor

        return RayExecutor(config, store_directory)
    from lattice_server.executors.local import LocalExecutor

    return LocalExecutor(config, store_directory)


def authentication_of(config: ServerConfig) -> Authentication | None:
    """Return the credentials of callers; None for a server that asks for none. Raises SecurityError."""
    if config.token is None and not config.tokens_file:
        return None
    token = config.token
    own = [] if token is None else [credential("operator", digest_of(token), [*Scope], tenant=ANY_TENANT)]
    made = Authentication(own)
    if config.tokens_file:
        made.replace(read_tokens(Path(config.tokens_file)))
    return made


def rpc_server(
    config: ServerConfig,
    engine: Engine,
    executor: Executor,
    authentication: Authentication | None,
    describe: Callable[[], Awaitable[cluster_pb2.GetServerInfoResponse]],
) -> tuple[RpcServer, WorkerServicer]:
    """Return the gRPC front of an engine, and the servicer of its workers; `describe` answers `GetServerInfo`."""
    orchestrator, slices = engine.orchestrator, engine.slices
    parser = SpecParser(engine.code, config.inline_limit_bytes, config.batch_rules)
    cache = RequestCache(slices=slices, kept_s=config.repeat_ttl_s)
    assigned = AssignedArtifacts()
    machines = Machines(config, executor, engine.bus, orchestrator.queries)
    workers = WorkerServicer(
        config,
        engine.bus,
        engine.sessions,
        parser,
        engine.transfers,
        machines,
        assigned,
        engine.epoch,
        engine.admission.check_possible,
    )
    limit_bytes = config.question_limit_bytes
    server = RpcServer(
        config,
        str(engine.store.directory / SOCKET),
        WorkflowServicer(orchestrator, engine.workflows, engine.drafts, parser, cache, slices, limit_bytes),
        TaskServicer(orchestrator, parser, cache),
        ResultsServicer(orchestrator, slices),
        ArtifactServicer(engine.store, engine.transfers, assigned),
        ClusterServicer(engine.bus, engine.sessions, cache, orchestrator.queries, describe),
        workers,
        ServicesServicer(engine.services, engine.code, cache),
        LlmServicer(engine.services, cache),
        authentication,
        slices,
    )
    return server, workers


def _retention(config: ServerConfig, store: ArtifactStore) -> Retention:
    return Retention(
        config.retained_runs,
        config.retained_bytes,
        min(config.retained_artifact_bytes, store.files.total_bytes // 2),
        config.tenant_share,
        config.result_ttl_s,
        config.repeat_ttl_s,
    )
