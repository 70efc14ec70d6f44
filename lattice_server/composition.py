"""Builds the parts of one server from its configuration and connects them. Rule: it starts nothing."""

import asyncio
import logging
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lattice.v1 import cluster_pb2

from lattice_server import __version__
from lattice_server.config import ServerConfig
from lattice_server.core.run.run import Bounds
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import Executor
from lattice_server.engine.recording.durability import Durability
from lattice_server.engine.recording.journal_port import Journal, JournalError, JournalListener, JournalRetention
from lattice_server.engine.recording.journal_records import DroppedRun
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.chunk_store import ChunkStore
from lattice_server.engine.runs.ended_runs import Retention
from lattice_server.engine.scheduler_thread import SchedulerThread
from lattice_server.engine.services.services import Services
from lattice_server.engine.slices import Slices
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.engine.stores.store_folder import SOCKET
from lattice_server.engine.stores.usage import Bound, Usage
from lattice_server.engine.workers.artifact_transfer import Transfers
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.engine.workflows.draft_graphs import DraftGraphs
from lattice_server.engine.workflows.workflow_restorer import restore_workflows
from lattice_server.engine.workflows.workflow_store import WorkflowStore
from lattice_server.executors.bind_address import address_for_others
from lattice_server.journal.sqlite import SqliteSettings, open_sqlite
from lattice_server.journal.sqlite_database import Sync
from lattice_server.rpc.artifacts import ArtifactServicer
from lattice_server.rpc.assigned_artifacts import AssignedArtifacts
from lattice_server.rpc.authentication import Authentication
from lattice_server.rpc.cluster import ClusterServicer
from lattice_server.rpc.convert.journal import ContractCodec
from lattice_server.rpc.convert.services import function_of_worker
from lattice_server.rpc.durable_answers import DurableAnswers
from lattice_server.rpc.handlers import ignore
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
from lattice_server.secrets_file import read_secrets
from lattice_server.telemetry import TelemetryError
from lattice_server.tokens import ANY_TENANT, Scope, credential, digest_of, read_tokens

if TYPE_CHECKING:
    from lattice_server.telemetry.metrics import Metrics
    from lattice_server.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

# Functions of workers, which the server calls by their names.
INSTANCE, GATEWAY = "lattice_worker.services.instance:serve", "lattice_worker.gateway.task:serve"


class Engine:
    """The parts around the core: stores, orchestrator, sessions, and the scheduler's thread.

    `on_failure` is called from the scheduler's thread when that gives up.
    """

    def __init__(self, config: ServerConfig, on_failure: Callable[[], object]) -> None:
        self._open = ExitStack()
        with ExitStack() as unfinished:
            unfinished.callback(self.close)
            self._build(config, on_failure)
            unfinished.pop_all()

    def _build(self, config: ServerConfig, on_failure: Callable[[], object]) -> None:
        share = config.tenant_share
        self.code = CodeStore(Bound(config.code_bytes, share))
        self.journal = _journal(config, self._dropped, on_failure, self.code)
        if self.journal is not None:
            self._open.callback(self.journal.journal.close)
        # Random as well: a journal that is copied back from a backup counts the same lives again.
        number = 0 if self.journal is None else self.journal.journal.epoch
        self.epoch = f"{number:x}.{secrets.token_hex(4)}"
        self.slices = Slices()
        self.bus = MessageBus(asyncio.get_running_loop())
        self.sessions = Sessions(config.silence_limit_s)
        self.store = ArtifactStore(config.store_folder, config.spare_bytes, upload_ttl_s=config.upload_ttl_s)
        self._open.callback(self.store.close)
        # Uploads may fill half of the file system, so that the outputs of tasks have the other half.
        self.store.uploads.usage.bound = Bound(min(config.upload_bytes, self.store.files.total_bytes // 2), share)
        self.store.on_drop = self.sessions.drop_artifact
        self.sessions.unneeded = self.store.unneeded
        self.transfers = Transfers(self.store, self.sessions)
        self.workflows = WorkflowStore(
            self.store, self.code, config.max_workflows, Bound(config.workflow_bytes, share), self.journal
        )
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
            self.journal,
            ChunkStore(Bound(config.chunk_bytes, share)),
        )
        if config.secrets_file:
            self.orchestrator.requirements.secrets.replace(read_secrets(Path(config.secrets_file)))
        functions = function_of_worker(INSTANCE), function_of_worker(GATEWAY)
        interface = address_for_others(config.node_ip or config.host)
        self.services = Services(self.orchestrator, *functions, self.bus.post, interface, config.shrink_delay_s)
        self.scheduler = SchedulerThread(
            Scheduler(self.epoch, config.session_ttl_s, config.limits, is_restoring=self.journal is not None),
            self.bus,
            on_failure,
        )

    def close(self) -> None:
        """Close the stores, and the journal after making all of it durable."""
        self._open.close()

    def read_journal(self) -> None:
        """Take back the workflows of the journal, and learn which runs it has."""
        if self.journal is not None and self.orchestrator.restorer is not None:
            restore_workflows(self.workflows, self.journal)
            self.orchestrator.restorer.list_runs()

    def _dropped(self, runs: Sequence[DroppedRun], artifacts: Sequence[str]) -> None:
        if self.orchestrator.restorer is not None:
            self.orchestrator.restorer.forget(runs)

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


@contextmanager
def _exporting(what: str) -> Iterator[None]:
    """Raise TelemetryError when OpenTelemetry is missing, or refuses the variables by which it is configured."""
    try:
        yield
    except TelemetryError:
        raise
    except ImportError as error:
        text = f'{what} need more packages: pip install "lattice-control-plane[telemetry]" ({error})'
        raise TelemetryError(text) from None
    except Exception as error:
        log.debug("OpenTelemetry failed", exc_info=True)
        raise TelemetryError(f"{what} cannot be exported; check the variables OTEL_*: {error}") from None


def tracing_of(config: ServerConfig, engine: Engine) -> "Tracing | None":
    """Return the traces that a configuration asks for, which observe an engine. Raises TelemetryError."""
    if config.traces == "none" and "opentelemetry.sdk.trace" not in sys.modules:
        return None
    try:
        with _exporting("traces"):
            from lattice_server.telemetry.tracing import Tracing

            tracing = Tracing(config.traces, __version__, engine.epoch)
    except TelemetryError:
        if config.traces == "none":  # The application around the server traces other things.
            return None
        raise
    if tracing.runs is not None:
        engine.orchestrator.observers.append(tracing.runs)
    return tracing


def metrics_of(config: ServerConfig, engine: Engine) -> "Metrics | None":
    """Return the metrics that a configuration asks for, which observe an engine. Raises TelemetryError."""
    if config.metrics == "none":
        return None
    with _exporting("metrics"):
        from lattice_server.telemetry.metrics import Metrics
        from lattice_server.telemetry.state import State

        journal = None if engine.journal is None else engine.journal.journal
        state = State(engine.orchestrator, engine.sessions, engine.services, journal, engine.usages)
        metrics = Metrics(config, state, __version__, engine.epoch)
    engine.orchestrator.observers.append(metrics.runs)
    engine.services.observers.append(metrics.services)
    engine.scheduler.on_pass = metrics.scheduler.note_pass
    if journal is not None:
        journal.on_commit = metrics.journal.note_commit
    return metrics


def rpc_server(
    config: ServerConfig,
    engine: Engine,
    executor: Executor,
    authentication: Authentication | None,
    describe: Callable[[], Awaitable[cluster_pb2.GetServerInfoResponse]],
    metrics: "Metrics | None" = None,
    tracing: "Tracing | None" = None,
) -> tuple[RpcServer, WorkerServicer]:
    """Return the gRPC front of an engine, and the servicer of its workers; `describe` answers `GetServerInfo`."""
    orchestrator, slices = engine.orchestrator, engine.slices
    parser = SpecParser(engine.code, config.inline_limit_bytes, config.batch_rules, config.least)
    cache = RequestCache(slices=slices, kept_s=config.repeat_ttl_s)
    assigned = AssignedArtifacts()
    on_error = ignore if metrics is None else metrics.calls.note_error
    workers = WorkerServicer(
        config,
        engine.bus,
        engine.sessions,
        parser,
        engine.transfers,
        Machines(config, executor, engine.bus, orchestrator.queries),
        assigned,
        engine.epoch,
        engine.admission.check_possible,
        orchestrator.restored,
        None if tracing is None else tracing.runs,
    )
    if metrics is not None:
        workers.observe(metrics.workers.note_runners, on_error)
    answers, tasks = _durable_answers(engine), TaskServicer(orchestrator, parser, cache)
    server = RpcServer(
        config,
        str(engine.store.directory / SOCKET),
        WorkflowServicer(
            orchestrator,
            engine.workflows,
            engine.drafts,
            parser,
            cache,
            slices,
            config.question_limit_bytes,
            tasks.run,
            None if answers is None else answers.recall,
            on_error,
        ),
        tasks,
        ResultsServicer(orchestrator, slices),
        ArtifactServicer(engine.store, engine.transfers, assigned),
        ClusterServicer(engine.bus, engine.sessions, cache, orchestrator.queries, describe),
        workers,
        ServicesServicer(engine.services, engine.code, cache),
        LlmServicer(engine.services, cache),
        authentication,
        slices,
        answers,
        [*([] if tracing is None else tracing.interceptors), *([] if metrics is None else [metrics.calls])],
        on_error,
    )
    return server, workers


def _durable_answers(engine: Engine) -> DurableAnswers | None:
    if engine.journal is None or engine.orchestrator.restorer is None:
        return None
    return DurableAnswers(engine.journal, engine.orchestrator.restorer)


def _journal(
    config: ServerConfig,
    on_dropped: Callable[[Sequence[DroppedRun], Sequence[str]], None],
    on_failure: Callable[[], object],
    code: CodeStore,
) -> RunJournal | None:
    """Open the journal of a server; None for a server without one. Raises JournalError."""
    if config.journal == "memory":
        return None
    durability = Durability(asyncio.get_running_loop(), lambda error: _fail(error, on_failure), on_dropped)
    retention = JournalRetention(config.journal_age_s, config.journal_runs, config.journal_bytes)
    codec = ContractCodec(code, config.batch_rules, config.least)
    return RunJournal(open_journal(config, durability, retention), durability, codec)


def _fail(error: JournalError, on_failure: Callable[[], object]) -> None:
    log.critical("the journal failed, and the server stops: %s", error)
    on_failure()


def open_journal(config: ServerConfig, listener: JournalListener, retention: JournalRetention) -> Journal:
    """Open the journal that a configuration names; the driver of PostgreSQL is imported only for PostgreSQL."""
    if config.journal.startswith(("postgresql://", "postgres://")):
        from lattice_server.journal.postgres import PostgresSettings, open_postgres

        return open_postgres(listener, PostgresSettings(config.journal, retention=retention))
    sync = Sync.FULL if config.journal_sync == "full" else Sync.NORMAL
    return open_sqlite(Path(config.journal), listener, SqliteSettings(sync, retention))


def _retention(config: ServerConfig, store: ArtifactStore) -> Retention:
    return Retention(
        config.retained_runs,
        config.retained_bytes,
        min(config.retained_artifact_bytes, store.files.total_bytes // 2),
        config.tenant_share,
        config.result_ttl_s,
        config.repeat_ttl_s,
    )
