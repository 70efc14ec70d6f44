"""Owns the memory of runs that are no longer kept. Rule: a run's id starts nothing again for an hour after its end.

A caller that lost the answer to its request repeats it. Without this, a run that ended and was dropped in between would
run a second time.
"""

from lattice_server.core.tenancy import UNNAMED, Reach, Shelf

KEPT_S = 3600.0
# About 40 MB.
MAX_IDS = 200_000


class EndedIds:
    """Keys of runs and what they were started with, oldest first."""

    def __init__(self, max_ids: int = MAX_IDS, kept_s: float = KEPT_S) -> None:
        self._max_ids = max_ids
        self._kept_s = kept_s
        self._found: Shelf[tuple[str, float]] = Shelf()

    def __len__(self) -> int:
        return len(self._found)

    def remember(self, key: str, fingerprint: str, now: float) -> None:
        """Remember a run, and forget those that are over the limit."""
        self._found[key] = fingerprint, now
        while self._found and (
            len(self._found) > self._max_ids or next(iter(self._found.values()))[1] < now - self._kept_s
        ):
            self._found.popitem(last=False)

    def fingerprint_of(self, run_id: str, now: float, reach: Reach = UNNAMED) -> str | None:
        """Return what a run was started with; None for one that is not remembered, or not within reach."""
        fingerprint, ended = self._found.find(run_id, reach) or (None, 0.0)
        return fingerprint if ended >= now - self._kept_s else None
