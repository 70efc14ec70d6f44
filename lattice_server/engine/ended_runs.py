"""Owns the runs that have ended, on the main thread. Rule: the oldest are dropped first, the newest is always kept."""

import time
from collections import OrderedDict

from lattice_server.core.tenancy import Reach
from lattice_server.engine.ended_ids import EndedIds
from lattice_server.engine.run_entry import Retention, RunEntry
from lattice_server.engine.store import ArtifactStore


class EndedRuns:
    """The ended ones among `runs`, oldest first, and what they take. Those over a limit are deleted from `runs`."""

    def __init__(self, runs: OrderedDict[str, RunEntry], store: ArtifactStore, retention: Retention) -> None:
        self._runs = runs
        self._store = store
        self._retention = retention
        self._ended: OrderedDict[str, RunEntry] = OrderedDict()
        self._dropped = EndedIds()
        self._tasks = 0
        self._bytes = 0
        self._artifact_bytes = 0

    def fingerprint_of(self, run_id: str, reach: Reach) -> str | None:
        """Return what a run that was dropped had been started with; None for one that is not remembered."""
        return self._dropped.fingerprint_of(run_id, time.monotonic(), reach)

    def add(self, entry: RunEntry) -> None:
        """Keep a run that has ended; drop the oldest runs over their limit, and the oldest artifacts over theirs."""
        self._ended[entry.key] = entry
        self._tasks += len(entry.run.tasks)
        self._bytes += entry.kept_bytes
        self._artifact_bytes += entry.artifact_bytes
        kept = self._retention
        while len(self._ended) > kept.runs or (
            len(self._ended) > 1 and (self._tasks > kept.tasks or self._bytes > kept.kept_bytes)
        ):
            self._drop_oldest()
        if self._artifact_bytes <= kept.artifact_bytes:
            return
        for oldest in list(self._ended.values())[:-1]:
            if self._artifact_bytes <= kept.artifact_bytes:
                break
            self._release(oldest)

    def _drop_oldest(self) -> None:
        key, oldest = self._ended.popitem(last=False)
        self._tasks -= len(oldest.run.tasks)
        self._bytes -= oldest.kept_bytes
        self._release(oldest)
        del self._runs[key]
        self._dropped.remember(key, oldest.fingerprint, time.monotonic())

    def _release(self, entry: RunEntry) -> None:
        self._artifact_bytes -= entry.artifact_bytes
        self._store.release(entry.artifacts, entry.run.tenant)
        entry.artifacts, entry.artifact_bytes = [], 0
