"""Owns the ids of runs that were evicted. Rule: the id of a run starts nothing again for an hour after its eviction.

A caller that lost the answer to its request repeats it. Without this, a run that ended and was evicted in between would
run a second time.
"""

from lattice_server.core.tenancy import UNNAMED, Reach, Shelf

KEPT_S = 3600.0
# About 40 MB.
MAX_IDS = 200_000


class EndedIds:
    """The keys of evicted runs and the fingerprints of their requests, oldest first."""

    def __init__(self, max_ids: int = MAX_IDS, kept_s: float = KEPT_S) -> None:
        self._max_ids = max_ids
        self._kept_s = kept_s
        self._found: Shelf[tuple[str, float]] = Shelf()

    def __len__(self) -> int:
        return len(self._found)

    def remember(self, key: str, fingerprint: str, now: float) -> None:
        """Remember a run, and forget the oldest ones beyond the limit."""
        self._found[key] = fingerprint, now
        while self._found and (
            len(self._found) > self._max_ids or next(iter(self._found.values()))[1] < now - self._kept_s
        ):
            self._found.popitem(last=False)

    def fingerprint_of(self, run_id: str, now: float, reach: Reach = UNNAMED) -> str | None:
        """Return the fingerprint of a run's request; None for a run that is not remembered, or not within reach."""
        fingerprint, ended = self._found.find(run_id, reach) or (None, 0.0)
        return fingerprint if ended >= now - self._kept_s else None
