"""Owns the runs that have ended, on the main thread.

Rule: a result is kept until a caller has read it, or its time to live is over; then its run is history, of which the
newest runs are kept. Over a bound, history is evicted first, then the oldest results. No run is evicted by its own end.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from lattice_server.core.frozen import frozen
from lattice_server.core.tenancy import UNNAMED, Reach
from lattice_server.engine.runs.ended_ids import EndedIds
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.usage import Bound, Evictable, Usage

GIB = 1024 * 1024 * 1024
# How long the large values of a result that was read are kept, because clients fetch them after the result.
FETCH_S = 60.0


@frozen
class Retention:
    """How long, and how much of, ended runs are kept.

    Attributes:
        runs: how many runs are kept whose result was read or is too old.
        kept_bytes: the memory of all ended runs.
        artifact_bytes: the size of their values in the store.
        share: the part of either that one tenant may have.
        result_ttl_s: how long a result is kept that no caller has read.
        id_ttl_s: how long the id of an evicted run is remembered.
    """

    runs: int = 1000
    kept_bytes: int = 2 * GIB
    artifact_bytes: int = 2 * GIB
    share: float = 0.5
    result_ttl_s: float = 3600.0
    id_ttl_s: float = 3600.0


class EndedRuns:
    """The ended runs among `runs` and their sizes. Evicted runs are deleted from `runs`.

    `on_add` is called when a run has ended, `on_read` when its result was read for the first time, and `on_drop` with
    each run that is evicted.
    """

    def __init__(
        self,
        runs: OrderedDict[str, RunEntry],
        store: ArtifactStore,
        retention: Retention,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs = runs
        self._store = store
        self._clock = clock
        self.on_add: Callable[[], object] = lambda: None
        self.on_read: Callable[[RunEntry], object] = lambda entry: None
        self.on_drop: Callable[[RunEntry], object] = lambda entry: None
        self._result_ttl_s = retention.result_ttl_s
        self._dropped = EndedIds(kept_s=retention.id_ttl_s)
        self.memory = Usage("ended runs", Bound(retention.kept_bytes, retention.share))
        self.values = Usage("results", Bound(retention.artifact_bytes, retention.share))
        self.history = Usage("history", Bound(retention.runs))
        self._memory, self._values = Evictable(self.memory), Evictable(self.values)
        self._history = Evictable(self.history)
        # Results and the times until which they are kept, in the order of these times.
        self._unread: OrderedDict[str, float] = OrderedDict()
        self._fetched: OrderedDict[str, float] = OrderedDict()

    def fingerprint_of(self, run_id: str, reach: Reach = UNNAMED) -> str | None:
        """Return the fingerprint of the request of an evicted run; None for a run that is not remembered."""
        return self._dropped.fingerprint_of(run_id, self._clock(), reach)

    def note_evicted(self, key: str, fingerprint: str) -> None:
        """Remember the id of a run that was evicted elsewhere."""
        self._dropped.remember(key, fingerprint, self._clock())

    def add(self, entry: RunEntry) -> None:
        """Keep a run that has ended; evict others over a bound."""
        tenant, key = entry.run.tenant, entry.key
        for name, size in _sizes(entry):
            self.memory.hold(tenant, name, size)
        for artifact in entry.artifacts:
            self.values.hold(tenant, artifact.artifact_id, artifact.size_bytes)
        self._memory.add(tenant, key, sooner=False)
        if entry.artifacts:
            self._values.add(tenant, key, sooner=False)
        self._unread[key] = self._clock() + self._result_ttl_s
        self._expire()
        self._evict(tenant, spared=key)
        self.on_add()

    def note_read(self, entry: RunEntry) -> None:
        """Note that a caller has read the result of a run, which may have been evicted."""
        tenant, key = entry.run.tenant, entry.key
        self._expire()
        if self._unread.pop(key, None) is None:
            return
        self.on_read(entry)
        if entry.artifacts:
            self._fetched[key] = self._clock() + min(FETCH_S, self._result_ttl_s)
        else:
            self._retire(tenant, key)
        self._evict(tenant)

    def drop(self, entry: RunEntry) -> None:
        """Evict a run that has ended."""
        self._drop(entry.run.tenant, entry.key)

    def _expire(self) -> None:
        """Make history of the runs whose time to live is over."""
        now = self._clock()
        for waiting in (self._unread, self._fetched):
            while waiting and next(iter(waiting.values())) <= now:
                key, _ = waiting.popitem(last=False)
                self._retire(self._runs[key].run.tenant, key)

    def _retire(self, tenant: str, key: str) -> None:
        """Make a run history."""
        self._memory.add(tenant, key)
        if self._runs[key].artifacts:
            self._values.add(tenant, key)
        self.history.hold(tenant, key, 1)
        self._history.add(tenant, key)

    def _evict(self, tenant: str, spared: str = "") -> None:
        for evictable, evict in (
            (self._history, self._drop),
            (self._memory, self._drop),
            (self._values, self._release),
        ):
            while (victim := evictable.victim(tenant, spared)) is not None:
                evict(*victim)

    def _drop(self, tenant: str, key: str) -> None:
        self._release(tenant, key)
        entry = self._runs[key]
        self.on_drop(entry)
        del self._runs[key]
        self._memory.discard(tenant, key)
        for name, _ in _sizes(entry):
            self.memory.release(tenant, name)
        if self.history.holds(tenant, key):
            self._history.discard(tenant, key)
            self.history.release(tenant, key)
        self._unread.pop(key, None)
        self._fetched.pop(key, None)
        self._dropped.remember(key, entry.fingerprint, self._clock())

    def _release(self, tenant: str, key: str) -> None:
        """Release the large values of a run."""
        entry = self._runs[key]
        self._values.discard(tenant, key)
        for artifact in entry.artifacts:
            self.values.release(tenant, artifact.artifact_id)
        self._store.release(entry.artifacts, tenant)
        entry.artifacts = []


def _sizes(entry: RunEntry) -> Iterator[tuple[str, int]]:
    """Return the sizes of a run and its code by name; code that several ended runs share counts once."""
    # No digest has a colon and a blank, so no run has the name of code.
    yield f"run: {entry.key}", entry.kept_bytes
    for function in entry.functions.values():
        if function.bundle is not None:
            yield function.bundle.digest, function.bundle.size_bytes
        yield function.digest, function.size_bytes
