"""Owns the start of runs: the checks of a request, in steps, and the run made of it at once.

Rule: a request that is refused changes nothing.
"""

import asyncio
import time
from collections.abc import Mapping
from itertools import count
from typing import NamedTuple, NotRequired, TypedDict
from uuid import uuid4

from lattice_server.core.errors import LatticeError
from lattice_server.core.model import Artifact, Function, Payload, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.reuse import Earlier
from lattice_server.core.run.run import Run
from lattice_server.core.run.task_table import TaskTable, tabulating
from lattice_server.core.steps import STEP_ITEMS, Steps
from lattice_server.core.tenancy import UNNAMED, Reach, Shelf, key_of
from lattice_server.engine.commands.driver import RunDriver
from lattice_server.engine.commands.open_runs import OpenRuns
from lattice_server.engine.commands.tethers import Tethers
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.entry import RunEntry, run_bytes
from lattice_server.engine.runs.references import RunStores, functions_of
from lattice_server.engine.runs.secrets import NO_SECRETS
from lattice_server.engine.stores.artifact_store import ArtifactStore


class StartSettings(TypedDict):
    """How a run is run; see `Run` and `RunEntry`. `reach` is that of the caller, whose artifacts the run may name."""

    labels: Mapping[str, str]
    priority: int
    tenant: NotRequired[str]
    workflow_id: NotRequired[str]
    timeout_s: NotRequired[float | None]
    earlier: NotRequired[Earlier | None]
    is_open: NotRequired[bool]
    request_id: NotRequired[str]
    reach: NotRequired[Reach]
    is_transient: NotRequired[bool]
    secrets: NotRequired[Mapping[str, str]]
    disconnect_grace_s: NotRequired[float | None]


class Prepared(NamedTuple):
    """A request for a run that was checked; the run has not started."""

    spec: WorkflowSpec
    parameters: Mapping[str, Payload]
    graph: dag.Dag
    table: TaskTable
    functions: Mapping[str, Function]
    definition: bytes = b""


class RunStarter:
    """Prepares runs and starts them in `runs`; lives on the main thread."""

    def __init__(
        self,
        runs: Shelf[RunEntry],
        store: ArtifactStore,
        stores: RunStores,
        admission: Admission,
        driver: RunDriver,
        open_runs: OpenRuns,
        tethers: Tethers,
        journal: RunJournal | None = None,
    ) -> None:
        self._runs = runs
        self._store = store
        self._stores = stores
        self._admission = admission
        self._driver = driver
        self._open_runs = open_runs
        self._tethers = tethers
        self._journal = journal
        self._numbers = count(1 if journal is None else journal.journal.last_run + 1)

    def preparing(
        self, run_id: str, spec: WorkflowSpec, parameters: Mapping[str, Payload], settings: StartSettings
    ) -> Steps[Prepared]:
        """Check a request, in steps. Raises as `Orchestrator.start_run`."""
        tenant, is_transient = settings.get("tenant", ""), settings.get("is_transient", False)
        self._admission.check_room(len(spec.tasks), run_bytes(len(spec.tasks), _bytes_of(parameters)), tenant)
        graph = yield from dag.building(spec, parameters)
        if settings.get("earlier") is None:
            named = (artifact.artifact_id for artifact in (*graph.artifacts, *_artifacts_of(parameters)))
            self._store.check(named, settings.get("reach", UNNAMED))
        if settings.get("earlier") is None:
            # In a run that retries another one, tasks whose secrets are gone fail, and the others run.
            self._driver.requirements.check(spec.tasks, settings.get("secrets", NO_SECRETS), tenant)
        yield from self._admission.checking(spec.tasks)
        table = yield from tabulating(key_of(run_id or f"run-{uuid4().hex}", tenant), graph)
        functions = yield from functions_of(spec.tasks)
        definition = b"" if self._journal is None or is_transient else (yield from self._journal.codec.workflow(spec))
        return Prepared(spec, parameters, graph, table, functions, definition)

    def start(self, prepared: Prepared, fingerprint: str, settings: StartSettings) -> RunEntry:
        """Start a run that was prepared.

        Raises ExhaustedError, since other runs may have started meanwhile, or the journal takes no new work.
        """
        entry = self._entry(prepared, fingerprint, settings)
        uploader = settings.get("reach", UNNAMED).tenant
        self._admission.check_room(len(prepared.spec.tasks), entry.kept_bytes, entry.run.tenant)
        self._stores.hold_code(entry, prepared.functions)
        if self._journal is not None:
            try:
                self._journal.accept(entry, prepared.definition, prepared.parameters)
            except LatticeError:
                self._stores.release(entry)
                raise
        self._runs[entry.key] = entry
        self._stores.hold_artifacts(entry, _artifacts_of(prepared.parameters), uploader)
        self.arm(entry)
        with self._driver.change(entry, uploader=uploader) as perform:
            perform(entry.run.start(prepared.parameters, time.monotonic()))
        return entry

    def arm(self, entry: RunEntry) -> None:
        """Set the timers of a run that starts, or that continues after a restart of the server."""
        if entry.timeout_s is not None:
            # The clock may have been set back since.
            passed_s = max(0.0, time.time() - entry.created_s)
            left_s = max(0.0, entry.timeout_s - passed_s)
            entry.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, entry, entry.timeout_s)
        if entry.run.is_open:
            self._open_runs.open(entry)
        elif entry.disconnect_grace_s is not None:
            self._tethers.begin(entry, entry.disconnect_grace_s)

    def _entry(self, prepared: Prepared, fingerprint: str, settings: StartSettings) -> RunEntry:
        run = Run(
            prepared.table.run_id,
            prepared.spec,
            prepared.graph,
            settings.get("workflow_id", ""),
            settings["priority"],
            tenant=settings.get("tenant", ""),
            bounds=self._admission.bounds,
            earlier=settings.get("earlier"),
            table=prepared.table,
            slice_tasks=STEP_ITEMS,
            is_open=settings.get("is_open", False),
        )
        return RunEntry(
            run,
            next(self._numbers),
            fingerprint,
            time.time(),
            settings["labels"],
            _bytes_of(prepared.parameters),
            settings.get("request_id", ""),
            timeout_s=settings.get("timeout_s"),
            is_transient=settings.get("is_transient", False),
            secrets=dict(settings.get("secrets", NO_SECRETS)),
            disconnect_grace_s=settings.get("disconnect_grace_s"),
        )

    def _expire(self, entry: RunEntry, limit_s: float) -> None:
        entry.expiry = None
        with self._driver.change(entry) as perform:
            perform(entry.run.expire(limit_s, time.monotonic()))


def _artifacts_of(parameters: Mapping[str, Payload]) -> list[Artifact]:
    return [payload.content for payload in parameters.values() if isinstance(payload.content, Artifact)]


def _bytes_of(parameters: Mapping[str, Payload]) -> int:
    return sum(payload.kept_bytes for payload in parameters.values())
