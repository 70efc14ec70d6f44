"""Owns graphs that are sent in parts, on the main thread.

Rule: a part costs what it has; a draft that nothing names for 10 minutes is dropped.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lattice_server.core.errors import AbortedError, ConflictError, ExhaustedError, NotFoundError
from lattice_server.core.model import Artifact, Function, Payload, TaskSpec
from lattice_server.core.references import leaves
from lattice_server.core.tenancy import Reach, id_of
from lattice_server.engine.artifact_store import ArtifactStore
from lattice_server.engine.store_folder import MIB
from lattice_server.engine.uploads import Name

TTL_S = 600.0
# For as long a request that is repeated finds what was made of its draft; see `EndedIds`.
USED_TTL_S = 3600.0
MAX_DRAFTS = 1000


@dataclass(slots=True)
class Draft:
    """A graph that is not complete. `print_`, opaque here, tells what its parts were; those of one that `is_used` are
    gone."""

    key: str
    tenant: str
    print_: object
    tasks: list[TaskSpec] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    uploads: list[Name] = field(default_factory=list)
    size_bytes: int = 0
    revision: int = 0
    is_used: bool = False
    expiry: asyncio.TimerHandle | None = None


class Drafts:
    """The drafts by key: at most `max_drafts`, with parts of `max_bytes` in all."""

    def __init__(
        self,
        store: ArtifactStore,
        max_tasks: int,
        *,
        max_bytes: int = 1024 * MIB,
        max_drafts: int = MAX_DRAFTS,
        ttl_s: float = TTL_S,
    ) -> None:
        self._drafts: dict[str, Draft] = {}
        self._store = store
        self._max_tasks = max_tasks
        self._max_bytes = max_bytes
        self._max_drafts = max_drafts
        self._ttl_s = ttl_s
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._drafts)

    def get(self, key: str) -> Draft:
        """Return a draft, which then lives for another 10 minutes. Raises NotFoundError."""
        draft = self._drafts.get(key)
        if draft is None:
            text = f"there is no draft {id_of(key)!r}: it was dropped, or never made; send its parts again"
            raise NotFoundError("DRAFT_NOT_FOUND", text, metadata={"draft_id": id_of(key)})
        self._keep(draft)
        return draft

    def expect(self, key: str, revision: int | None, size_bytes: int, tasks: int) -> Mapping[str, Function]:
        """See whether a part may be added to a draft, or begin one; return the functions that came before.

        Raises:
            AbortedError: it has another revision; None expects any.
            ConflictError: it was used.
            ExhaustedError: RUN_TOO_LARGE, or QUEUE_FULL when there are as many drafts as may be.
        """
        draft = self._drafts.get(key)
        known = 0 if draft is None else draft.revision
        if draft is not None and draft.is_used:
            raise ConflictError("WORKFLOW_ID_CONFLICT", f"draft {id_of(key)!r} was used; take another id")
        if revision not in {None, known}:
            text = f"draft {id_of(key)!r} has revision {known}, not {revision}"
            raise AbortedError("REVISION_MISMATCH", text, metadata={"revision": str(known)})
        if tasks + (0 if draft is None else len(draft.tasks)) > self._max_tasks:
            raise ExhaustedError("RUN_TOO_LARGE", f"a run may have at most {self._max_tasks} tasks")
        is_full = self._kept_bytes + size_bytes > self._max_bytes
        unused = sum(not found.is_used for found in self._drafts.values())
        if is_full or (draft is None and unused >= self._max_drafts):
            text = f"{unused} drafts of {self._kept_bytes} bytes are kept, as much as may be"
            raise ExhaustedError("QUEUE_FULL", text, retry_after_s=1.0)
        return {} if draft is None else draft.functions

    def add(
        self,
        key: str,
        functions: Mapping[str, Function],
        tasks: list[TaskSpec],
        size_bytes: int,
        print_: object,
        reach: Reach,
    ) -> Draft:
        """Add a part, after `expect`; `print_` is that of all parts so far.

        Raises NotFoundError when it names an artifact that is not within `reach`, which is its sender's.
        """
        artifacts = list(_artifacts_in(tasks))
        self._store.check((artifact.artifact_id for artifact in artifacts), reach)
        draft = self._drafts.get(key)
        if draft is None:
            draft = self._drafts[key] = Draft(key, reach.tenant, print_)
        draft.uploads += self._store.take(artifacts, draft.tenant, reach.tenant)
        draft.artifacts += artifacts
        draft.tasks += tasks
        draft.functions.update(functions)
        draft.size_bytes += size_bytes
        draft.revision += 1
        draft.print_ = print_
        self._kept_bytes += size_bytes
        self._keep(draft)
        return draft

    def use_up(self, key: str) -> None:
        """Drop what a draft has, of which a run or a workflow was made; that it was there is known for an hour."""
        draft = self._drafts.get(key)
        if draft is not None and not draft.is_used:
            self._empty(draft)
            draft.is_used = True
            self._keep(draft)
            used = [found for found in self._drafts.values() if found.is_used]
            if len(used) > self._max_drafts:
                self._drop(used[0])

    def _keep(self, draft: Draft) -> None:
        if draft.expiry is not None:
            draft.expiry.cancel()
        ttl_s = USED_TTL_S if draft.is_used else self._ttl_s
        draft.expiry = asyncio.get_running_loop().call_later(ttl_s, self._drop, draft)

    def _drop(self, draft: Draft) -> None:
        if draft.expiry is not None:
            draft.expiry.cancel()
        self._empty(draft)
        del self._drafts[draft.key]

    def _empty(self, draft: Draft) -> None:
        self._kept_bytes -= draft.size_bytes
        self._store.uploads.release(draft.uploads)
        self._store.release(draft.artifacts, draft.tenant)
        draft.uploads = []
        draft.tasks, draft.functions, draft.artifacts, draft.size_bytes = [], {}, [], 0


def _artifacts_in(tasks: Iterable[TaskSpec]) -> Iterable[Artifact]:
    for task in tasks:
        for binding in task.inputs.values():
            for leaf in leaves(binding):
                if isinstance(leaf, Payload) and isinstance(leaf.content, Artifact):
                    yield leaf.content
