"""Owns stored workflows, on the main thread. Rule: a run has a copy of its workflow, which may change at any time."""

import time
from dataclasses import dataclass, replace
from itertools import count
from uuid import uuid4

from lattice_server.core.errors import AbortedError, ConflictError, ExhaustedError, LatticeError, NotFoundError
from lattice_server.core.model import Artifact, Function, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.tenancy import UNNAMED, Reach, Shelf, key_of
from lattice_server.engine.recording.journal_records import StoredWorkflow
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.engine.stores.store_folder import MIB
from lattice_server.engine.stores.uploads import Name
from lattice_server.engine.stores.usage import Bound, Usage

BOUND = Bound(1024 * MIB, share=0.5)


@dataclass(slots=True)
class WorkflowEntry:
    """A stored workflow. Later ones have a higher `number`; `definition`, opaque here, is returned to callers."""

    workflow_id: str
    tenant: str
    number: int
    spec: WorkflowSpec
    functions: dict[str, Function]
    definition: object
    fingerprint: str
    created_s: float
    artifacts: list[Artifact]
    uploads: list[Name]
    revision: int = 1


class WorkflowStore:
    """The stored workflows by id, oldest first: at most `max_workflows`, with definitions as large as `bound` says.

    They reference their functions in `code` and their large values in `store`, and are recorded in `journal`.
    """

    def __init__(
        self,
        store: ArtifactStore,
        code: CodeStore,
        max_workflows: int,
        bound: Bound = BOUND,
        journal: RunJournal | None = None,
    ) -> None:
        self.workflows: Shelf[WorkflowEntry] = Shelf()
        self.usage = Usage("stored workflows", bound)
        self._journal = journal
        self._numbers = count(1 if journal is None else journal.journal.last_workflow + 1)
        self._store = store
        self._code = code
        self._max_workflows = max_workflows

    def create(
        self,
        workflow_id: str,
        spec: WorkflowSpec,
        functions: dict[str, Function],
        definition: object,
        fingerprint: str,
        size_bytes: int = 0,
        graph: dag.Dag | None = None,
        *,
        reach: Reach = UNNAMED,
    ) -> tuple[WorkflowEntry, bool]:
        """Store a workflow of a tenant, or return the workflow that has this id and content.

        Args:
            size_bytes: the size of its definition.
            graph: its graph, if it has been built.
            reach: that of the caller, whose artifacts it may name; its tenant owns the workflow.

        Raises:
            ConflictError: the id was used with other content.
            ExhaustedError: TOO_MANY_WORKFLOWS or STORE_FULL; a workflow has to be deleted first.
            InvalidError: the graph is not valid.
            NotFoundError: it names an artifact that is not within reach.
        """
        tenant = reach.tenant
        existing = self.find(workflow_id, fingerprint, tenant)
        if existing is not None:
            return existing, False
        graph = graph or dag.build(spec)
        self._store.check((artifact.artifact_id for artifact in graph.artifacts), reach)
        self._check_room(tenant, size_bytes)
        self._code.hold(tenant, functions.values())
        named = workflow_id or f"workflow-{uuid4().hex}"
        entry = WorkflowEntry(
            named,
            tenant,
            next(self._numbers),
            spec,
            functions,
            definition,
            fingerprint,
            time.time(),
            graph.artifacts,
            self._store.take(graph.artifacts, tenant),
        )
        self._record(entry)
        self.usage.hold(tenant, named, size_bytes)
        self.workflows[key_of(named, tenant)] = entry
        return entry, True

    def restore(
        self, stored: StoredWorkflow, definition: object, spec: WorkflowSpec, functions: dict[str, Function]
    ) -> None:
        """Take back a workflow that was stored before a restart of the server. Raises ExhaustedError, InvalidError."""
        graph = dag.build(spec)
        self._code.hold(stored.tenant, functions.values())
        entry = WorkflowEntry(
            stored.workflow_id,
            stored.tenant,
            stored.number,
            spec,
            functions,
            definition,
            stored.fingerprint,
            stored.stored_s,
            graph.artifacts,
            self._store.take(graph.artifacts, stored.tenant),
            stored.revision,
        )
        self.usage.hold(stored.tenant, stored.workflow_id, len(stored.definition))
        self.workflows[key_of(stored.workflow_id, stored.tenant)] = entry

    def _record(self, entry: WorkflowEntry) -> None:
        """Record a new workflow. Raises ExhaustedError, UnavailableError, after releasing its references."""
        if self._journal is None:
            return
        try:
            self._journal.store(entry)
        except LatticeError:
            self._code.release(entry.tenant, entry.functions.values())
            self._store.uploads.release(entry.uploads)
            self._store.release(entry.artifacts, entry.tenant)
            raise

    def find(self, workflow_id: str, fingerprint: str, tenant: str) -> WorkflowEntry | None:
        """Return a tenant's workflow that has this id and content, if any. Raises ConflictError as `create`."""
        existing = self.workflows.get(key_of(workflow_id, tenant))
        if existing is not None and existing.fingerprint != fingerprint:
            raise ConflictError("WORKFLOW_ID_CONFLICT", f"workflow {workflow_id!r} exists with other content")
        return existing

    def change(
        self,
        entry: WorkflowEntry,
        spec: WorkflowSpec,
        functions: dict[str, Function],
        definition: object,
        size_bytes: int = 0,
        graph: dag.Dag | None = None,
        *,
        reach: Reach = UNNAMED,
    ) -> None:
        """Replace a stored workflow's definition; see `create`. Raises ExhaustedError, InvalidError, NotFoundError."""
        graph = graph or dag.build(spec)
        known = {artifact.artifact_id for artifact in entry.artifacts}
        new = (artifact.artifact_id for artifact in graph.artifacts if artifact.artifact_id not in known)
        self._store.check(new, reach)
        tenant = entry.tenant
        self._check_size(tenant, size_bytes - self.usage.size_of(tenant, entry.workflow_id))
        self._code.hold(tenant, functions.values())
        uploads = self._store.take(graph.artifacts, tenant, reach.tenant)
        changed = replace(
            entry,
            spec=spec,
            functions=functions,
            artifacts=graph.artifacts,
            uploads=uploads,
            definition=definition,
            revision=entry.revision + 1,
        )
        self._record(changed)
        self._release(entry)
        self.usage.hold(tenant, entry.workflow_id, size_bytes)
        entry.spec, entry.functions, entry.artifacts, entry.uploads = spec, functions, graph.artifacts, uploads
        entry.definition = definition
        entry.revision += 1

    def delete(self, workflow_id: str, reach: Reach = UNNAMED) -> None:
        """Delete a stored workflow. Raises NotFoundError."""
        entry = self.get(workflow_id, reach)
        if self._journal is not None:
            self._journal.unstore(entry.number)
        self._release(entry)
        del self.workflows[key_of(entry.workflow_id, entry.tenant)]

    def _release(self, entry: WorkflowEntry) -> None:
        self.usage.release(entry.tenant, entry.workflow_id)
        self._code.release(entry.tenant, entry.functions.values())
        self._store.uploads.release(entry.uploads)
        self._store.release(entry.artifacts, entry.tenant)

    def _check_room(self, tenant: str, size_bytes: int) -> None:
        if len(self.workflows) >= self._max_workflows:
            text = f"{len(self.workflows)} workflows are stored, as many as may be; delete one, or run graphs inline"
            raise ExhaustedError("TOO_MANY_WORKFLOWS", text)
        self._check_size(tenant, size_bytes)

    def _check_size(self, tenant: str, added_bytes: int) -> None:
        if added_bytes > 0 and (refusal := self.usage.refusal(tenant, added_bytes)) is not None:
            refusal.message += "; delete one, or run graphs inline"
            raise refusal

    def get(self, workflow_id: str, reach: Reach = UNNAMED) -> WorkflowEntry:
        """Return a stored workflow. Raises NotFoundError."""
        entry = self.workflows.find(workflow_id, reach)
        if entry is None:
            raise NotFoundError("WORKFLOW_NOT_FOUND", f"there is no workflow {workflow_id!r}")
        return entry


def expect_revision(what: str, revision: int, expected: int | None) -> None:
    """Raise AbortedError unless something has the revision a caller expects; None expects any."""
    if expected is not None and expected != revision:
        text = f"{what} has revision {revision}, not {expected}"
        raise AbortedError("REVISION_MISMATCH", text, metadata={"revision": str(revision)})
