"""Owns graphs that callers send in parts, on the main thread.

Rule: the work of adding a part depends on that part alone. A draft that no request names for 10 minutes is dropped.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from lattice_server.core.errors import AbortedError, ConflictError, ExhaustedError, NotFoundError
from lattice_server.core.model import Artifact, Function, TaskSpec
from lattice_server.core.run.dag import artifacts_in
from lattice_server.core.tenancy import Reach, id_of
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.uploads import Name
from lattice_server.engine.stores.usage import Bound, Usage

TTL_S = 600.0
# As long as a repeated request finds the run or workflow that was made of its draft; see `EndedIds`.
USED_TTL_S = 3600.0
MAX_DRAFTS = 1000
GIB = 1024 * 1024 * 1024
BOUND = Bound(4 * GIB, share=0.5)
# The memory of one task of a draft, without the values in its message.
SPEC_BYTES = 1024
RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class DraftGraph:
    """A graph that is not complete.

    `print_`, opaque here, identifies its parts. A draft that `is_used` remembers nothing else of them.
    """

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


class DraftGraphs:
    """The drafts by key: at most `max_drafts`, with as much memory as `bound` says, and of `max_tasks` each.

    One tenant may have its share of both.
    """

    def __init__(
        self,
        store: ArtifactStore,
        max_tasks: int,
        bound: Bound = BOUND,
        *,
        max_drafts: int = MAX_DRAFTS,
        ttl_s: float = TTL_S,
    ) -> None:
        self.usage = Usage("drafts", bound)
        self._drafts: dict[str, DraftGraph] = {}
        self._store = store
        self._max_tasks = max_tasks
        self._count = Bound(max_drafts, bound.share)
        self._ttl_s = ttl_s

    def __len__(self) -> int:
        return len(self._drafts)

    def get(self, key: str) -> DraftGraph:
        """Return a draft and restart its time to live. Raises NotFoundError."""
        draft = self._drafts.get(key)
        if draft is None:
            text = f"there is no draft {id_of(key)!r}: it was dropped, or never made; send its parts again"
            raise NotFoundError("DRAFT_NOT_FOUND", text, metadata={"draft_id": id_of(key)})
        self._set_timer(draft)
        return draft

    def expect(
        self, key: str, tenant: str, revision: int | None, size_bytes: int, tasks: int
    ) -> Mapping[str, Function]:
        """Check that a tenant may add a part to a draft, or begin one; return the functions of the earlier parts.

        Raises:
            AbortedError: it has another revision; None expects any.
            ConflictError: it was used.
            ExhaustedError: RUN_TOO_LARGE; QUEUE_FULL for the number of drafts; STORE_FULL for their memory.
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
        if draft is None:
            self._check_count(tenant)
        if (refusal := self.usage.refusal(tenant, _memory(size_bytes, tasks))) is not None:
            # A draft that fills the store alone fits no better later.
            others = self.usage.total - (0 if draft is None else draft.size_bytes)
            refusal.retry_after_s = RETRY_AFTER_S if others else None
            raise refusal
        return {} if draft is None else draft.functions

    def add(
        self,
        key: str,
        functions: Mapping[str, Function],
        tasks: list[TaskSpec],
        size_bytes: int,
        print_: object,
        reach: Reach,
    ) -> DraftGraph:
        """Add a part, after `expect`; `print_` is that of all parts so far.

        Raises NotFoundError when it names an artifact that is not within `reach`, the reach of its sender.
        """
        artifacts = list(artifacts_in(tasks))
        self._store.check((artifact.artifact_id for artifact in artifacts), reach)
        draft = self._drafts.get(key)
        if draft is None:
            draft = self._drafts[key] = DraftGraph(key, reach.tenant, print_)
        draft.uploads += self._store.take(artifacts, draft.tenant, reach.tenant)
        draft.artifacts += artifacts
        draft.tasks += tasks
        draft.functions.update(functions)
        draft.revision += 1
        draft.print_ = print_
        added = _memory(size_bytes, len(tasks))
        draft.size_bytes += added
        self.usage.add(draft.tenant, added)
        self._set_timer(draft)
        return draft

    def use_up(self, key: str) -> None:
        """Drop the parts of a draft of which a run or a workflow was made; its id is remembered for an hour."""
        draft = self._drafts.get(key)
        if draft is not None and not draft.is_used:
            self._empty(draft)
            draft.is_used = True
            self._set_timer(draft)
            used = [found for found in self._drafts.values() if found.is_used]
            if len(used) > self._count.total:
                self._drop(used[0])

    def _check_count(self, tenant: str) -> None:
        unused = [found.tenant for found in self._drafts.values() if not found.is_used]
        if len(unused) >= self._count.total or unused.count(tenant) >= self._count.of_tenant:
            text = (
                f"{unused.count(tenant)} drafts are kept for this tenant, {len(unused)} in all; use or leave some first"
            )
            raise ExhaustedError("QUEUE_FULL", text, retry_after_s=RETRY_AFTER_S)

    def _set_timer(self, draft: DraftGraph) -> None:
        if draft.expiry is not None:
            draft.expiry.cancel()
        ttl_s = USED_TTL_S if draft.is_used else self._ttl_s
        draft.expiry = asyncio.get_running_loop().call_later(ttl_s, self._drop, draft)

    def _drop(self, draft: DraftGraph) -> None:
        if draft.expiry is not None:
            draft.expiry.cancel()
            draft.expiry = None
        self._empty(draft)
        del self._drafts[draft.key]

    def _empty(self, draft: DraftGraph) -> None:
        self.usage.add(draft.tenant, -draft.size_bytes)
        self._store.uploads.release(draft.uploads)
        self._store.release(draft.artifacts, draft.tenant)
        draft.uploads = []
        draft.tasks, draft.functions, draft.artifacts, draft.size_bytes = [], {}, [], 0


def _memory(size_bytes: int, tasks: int) -> int:
    return size_bytes + SPEC_BYTES * tasks
