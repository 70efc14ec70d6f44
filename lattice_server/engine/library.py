"""Owns stored workflows, on the main thread. Rule: a run works on a copy, so a workflow may change at any time."""

import time
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from uuid import uuid4

from lattice_server.core import dag
from lattice_server.core.errors import AbortedError, ConflictError, ExhaustedError, NotFoundError
from lattice_server.core.model import Artifact, Function, WorkflowSpec
from lattice_server.engine.folders import MIB
from lattice_server.engine.store import ArtifactStore


@dataclass(slots=True)
class WorkflowEntry:
    """A stored workflow. Later ones have a higher `number`; `definition` is what a caller gets back, opaque here."""

    workflow_id: str
    number: int
    spec: WorkflowSpec
    functions: dict[str, Function]
    definition: object
    fingerprint: str
    created_s: float
    artifacts: list[Artifact]
    size_bytes: int
    revision: int = 1


class WorkflowLibrary:
    """The stored workflows by id, oldest first: at most `max_workflows`, with definitions of `max_bytes` in all."""

    def __init__(self, store: ArtifactStore, max_workflows: int, max_bytes: int = 512 * MIB) -> None:
        self.workflows: OrderedDict[str, WorkflowEntry] = OrderedDict()
        self._numbers = count(1)
        self._store = store
        self._max_workflows = max_workflows
        self._max_bytes = max_bytes
        self._kept_bytes = 0

    def create(
        self,
        workflow_id: str,
        spec: WorkflowSpec,
        functions: dict[str, Function],
        definition: object,
        fingerprint: str,
        size_bytes: int = 0,
        graph: dag.Dag | None = None,
    ) -> tuple[WorkflowEntry, bool]:
        """Store a workflow, or return the one that has this id and content. Its definition takes `size_bytes`.

        Its `graph` is built here unless it was before.

        Raises:
            ConflictError: the id was used with other content.
            ExhaustedError: TOO_MANY_WORKFLOWS, by number or by size; one has to be deleted first.
            InvalidError: the graph is not valid.
        """
        existing = self.find(workflow_id, fingerprint)
        if existing is not None:
            return existing, False
        graph = graph or dag.build(spec)
        if len(self.workflows) >= self._max_workflows:
            text = f"{len(self.workflows)} workflows are stored, as many as may be; delete one, or run graphs inline"
            raise ExhaustedError("TOO_MANY_WORKFLOWS", text)
        self._check_size(size_bytes)
        named = workflow_id or f"workflow-{uuid4().hex}"
        entry = WorkflowEntry(
            named,
            next(self._numbers),
            spec,
            functions,
            definition,
            fingerprint,
            time.time(),
            graph.artifacts,
            size_bytes,
        )
        self._kept_bytes += size_bytes
        self._store.take(entry.artifacts)
        self.workflows[named] = entry
        return entry, True

    def find(self, workflow_id: str, fingerprint: str) -> WorkflowEntry | None:
        """Return the workflow that has this id and content, if there is one. Raises ConflictError as `create`."""
        existing = self.workflows.get(workflow_id)
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
    ) -> None:
        """Replace a stored workflow's definition; see `create`. Raises ExhaustedError, InvalidError."""
        graph = graph or dag.build(spec)
        self._check_size(size_bytes - entry.size_bytes)
        self._kept_bytes += size_bytes - entry.size_bytes
        entry.size_bytes = size_bytes
        self._store.take(graph.artifacts)
        self._store.release(entry.artifacts)
        entry.spec, entry.functions, entry.artifacts = spec, functions, graph.artifacts
        entry.definition = definition
        entry.revision += 1

    def delete(self, workflow_id: str) -> None:
        """Forget a stored workflow. Raises NotFoundError."""
        entry = self.get(workflow_id)
        self._store.release(entry.artifacts)
        self._kept_bytes -= entry.size_bytes
        del self.workflows[workflow_id]

    def _check_size(self, added_bytes: int) -> None:
        if self._kept_bytes + added_bytes > self._max_bytes:
            text = f"the stored workflows would take more than {self._max_bytes // MIB} MiB"
            raise ExhaustedError("TOO_MANY_WORKFLOWS", f"{text}; delete one, or run graphs inline")

    def get(self, workflow_id: str) -> WorkflowEntry:
        """Return a stored workflow. Raises NotFoundError."""
        try:
            return self.workflows[workflow_id]
        except KeyError:
            raise NotFoundError("WORKFLOW_NOT_FOUND", f"there is no workflow {workflow_id!r}") from None


def expect_revision(what: str, revision: int, expected: int | None) -> None:
    """Raise AbortedError unless something has the revision a caller expects; None expects any."""
    if expected is not None and expected != revision:
        text = f"{what} has revision {revision}, not {expected}"
        raise AbortedError("REVISION_MISMATCH", text, metadata={"revision": str(revision)})
