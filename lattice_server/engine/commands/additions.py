"""Owns the addition of tasks to runs that have started.

Rule: an addition is made as a whole; one that is refused changes nothing.
"""

import time
from collections.abc import Mapping, Sequence

from lattice_server.core.errors import ExhaustedError
from lattice_server.core.messages import TasksSpawned
from lattice_server.core.model import Function, TaskSpec
from lattice_server.core.run.additions import Addition
from lattice_server.core.run.run import Effect
from lattice_server.core.steps import Steps, finish
from lattice_server.core.tenancy import Reach
from lattice_server.engine.commands.driver import RunDriver
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.entry import TASK_BYTES, RunEntry
from lattice_server.engine.runs.references import RunStores, functions_of
from lattice_server.engine.runs.secrets import NO_SECRETS
from lattice_server.engine.slices import Slices
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.workflows.workflow_store import expect_revision

# How often tasks are checked in slices. A run that grew each time in between gets them checked at once.
MAX_CHECKS = 3


class RunAdditions:
    """Adds tasks to runs; lives on the main thread."""

    def __init__(
        self,
        store: ArtifactStore,
        stores: RunStores,
        admission: Admission,
        driver: RunDriver,
        slices: Slices,
        journal: RunJournal | None = None,
    ) -> None:
        self._store = store
        self._stores = stores
        self._admission = admission
        self._driver = driver
        self._slices = slices
        self._journal = journal

    async def add(
        self,
        entry: RunEntry,
        tasks: Sequence[TaskSpec],
        expected_revision: int | None,
        reach: Reach,
        secrets: Mapping[str, str] = NO_SECRETS,
    ) -> None:
        """Add tasks of a caller, in slices. Raises as `Orchestrator.add_tasks`."""
        run, tenant = entry.run, entry.run.tenant
        self._driver.requirements.check(tasks, {**entry.secrets, **secrets}, tenant)
        expect_revision(f"run {entry.run_id!r}", run.revision, expected_revision)
        self._admission.check_room(len(tasks), TASK_BYTES * len(tasks), tenant)
        functions = await self._slices.finish(self._checking(tasks))
        definition = None if self._journal is None else await self._slices.finish(self._journal.codec.tasks(tasks))
        addition = await self._addition(entry, tasks)
        # Meanwhile the run, and the server, may have got other tasks.
        expect_revision(f"run {entry.run_id!r}", run.revision, expected_revision)
        extension = addition.extension
        self._admission.check_room(len(tasks), TASK_BYTES * len(tasks) + extension.kept_bytes, tenant)
        self._store.check((artifact.artifact_id for artifact in extension.artifacts), reach)
        self._stores.hold_code(entry, functions)
        entry.definition = definition
        if not run.is_terminal:
            entry.secrets |= secrets
        with self._driver.change(entry, uploader=reach.tenant) as perform:
            try:
                perform(run.add(addition, time.monotonic()))
            finally:
                entry.definition = None
        await self._slices.finish(addition.clear())

    def spawn(self, entry: RunEntry, event: TasksSpawned, now: float) -> list[Effect]:
        """Return the effects of tasks that an attempt spawned; the attempt fails when they exceed a limit."""
        refusal = None
        try:
            self._admission.check_memory(TASK_BYTES * len(event.tasks), entry.run.tenant)
            self._stores.hold_code(entry, finish(functions_of(event.tasks)))
        except ExhaustedError as error:
            refusal = error
        return entry.run.spawn(event.task_id, event.tasks, now, refusal, is_called=event.is_called)

    def _checking(self, tasks: Sequence[TaskSpec]) -> Steps[dict[str, Function]]:
        yield from self._admission.checking(tasks)
        return (yield from functions_of(tasks))

    async def _addition(self, entry: RunEntry, tasks: Sequence[TaskSpec]) -> Addition:
        """Check tasks against the graph of a run until it does not grow meanwhile."""
        run = entry.run
        for _ in range(MAX_CHECKS):
            revision = run.revision
            addition = await self._slices.finish(run.adding(tasks))
            if run.revision == revision:
                return addition
        return finish(run.adding(tasks))
