"""Owns the runs by id: live ones, ended ones that are kept, and the ids of ended ones that were evicted.

Rule: an id means one run of its tenant; the id of an evicted run starts nothing again while it is remembered.
"""

from collections.abc import Mapping

from lattice_server.core.errors import ConflictError, NotFoundError
from lattice_server.core.tenancy import UNNAMED, Reach, Shelf, key_of
from lattice_server.engine.runs.ended_runs import EndedRuns, Retention
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.secrets import NO_SECRETS
from lattice_server.engine.stores.artifact_store import ArtifactStore


class RunRegistry:
    """The runs of all tenants, oldest first; lives on the main thread."""

    def __init__(self, store: ArtifactStore, retention: Retention) -> None:
        self.runs: Shelf[RunEntry] = Shelf()
        self.ended = EndedRuns(self.runs, store, retention)

    def known(
        self, run_id: str, fingerprint: str, tenant: str, request_id: str = "", secrets: Mapping[str, str] = NO_SECRETS
    ) -> RunEntry | None:
        """Return a tenant's run that has this id and content, if there is one.

        A call that repeats the `request_id` of the call that started the run counts as equal, even if the rest differs.
        The run takes the values of secrets that it lacks.

        Raises:
            ConflictError: the tenant used the id with other content.
            NotFoundError: the run with this id and content was evicted.
        """
        existing = self.runs.get(key_of(run_id, tenant))
        if existing is not None:
            if fingerprint != existing.fingerprint and not (request_id and request_id == existing.request_id):
                raise ConflictError("RUN_ID_CONFLICT", f"run {run_id!r} exists with other content")
            existing.supply(secrets)
            return existing
        own = Reach(tenant)
        if (known := self.ended.fingerprint_of(run_id, own)) is not None:
            if known != fingerprint and not request_id:
                raise ConflictError("RUN_ID_CONFLICT", f"run {run_id!r} existed with other content")
            raise self._missing(run_id, own)
        return None

    def run(self, run_id: str, reach: Reach = UNNAMED) -> RunEntry:
        """Return a run within reach. Raises NotFoundError."""
        entry = self.runs.find(run_id, reach)
        if entry is None:
            raise self._missing(run_id, reach)
        return entry

    def task(self, run_id: str, task_id: str, reach: Reach = UNNAMED) -> RunEntry:
        """Return the run of a task. Raises NotFoundError when there is no such run or task."""
        entry = self.run(run_id, reach)
        if task_id not in entry.run.tasks:
            raise NotFoundError("TASK_NOT_FOUND", f"run {run_id!r} has no task {task_id!r}")
        return entry

    def _missing(self, run_id: str, reach: Reach) -> NotFoundError:
        metadata = {"run_id": run_id}
        if self.ended.fingerprint_of(run_id, reach) is None:
            return NotFoundError("RUN_NOT_FOUND", f"there is no run {run_id!r}", metadata=metadata)
        text = f"run {run_id!r} has ended, and its results are no longer kept; it is not run again by that id"
        return NotFoundError("RUN_EVICTED", text, metadata=metadata)
