"""Owns how many calls of a concurrency key may run at once.

Rule: a permit is taken when a call is placed, or when a node is reserved for it, and released once. A queued task and
a task in backoff have none.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from lattice_server.core.model import TaskSpec


class Concurrency(NamedTuple):
    """A concurrency key, and how many calls of it may run at once according to one task; zero means any number."""

    key: str
    max_parallel: int


def concurrency_of(spec: TaskSpec) -> Concurrency | None:
    """Return the concurrency key of a task; None when its calls are not limited."""
    key = spec.concurrency_key or (spec.function.digest if spec.max_parallel else "")
    return Concurrency(key, spec.max_parallel) if key else None


class Permits:
    """The permits that are taken, by key and by the limit of the task that took them.

    The tasks of one key may have different limits: the lowest one counts, or that of the server, given in `limits`.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = limits
        self._taken: dict[str, Counter[int]] = {}

    def limit(self, wanted: Concurrency) -> int | None:
        """Return how many calls of a key may run at once if one more is placed; None when there is no limit."""
        allowed = [wanted.max_parallel, *self._taken.get(wanted.key, ())]
        limits = [limit for limit in allowed if limit > 0]
        if wanted.key in self._limits:
            limits.append(self._limits[wanted.key])
        return min(limits, default=None)

    def has_free(self, wanted: Concurrency | None) -> bool:
        """Whether one more call may be placed."""
        if wanted is None:
            return True
        limit = self.limit(wanted)
        return limit is None or self.taken(wanted.key) < limit

    def taken(self, key: str) -> int:
        """Return how many permits of a key are taken."""
        taken = self._taken.get(key)
        return 0 if taken is None else taken.total()

    def take(self, wanted: Concurrency | None) -> None:
        """Take one permit."""
        if wanted is not None:
            self._taken.setdefault(wanted.key, Counter())[wanted.max_parallel] += 1

    def release(self, held: Concurrency | None) -> None:
        """Release one permit."""
        if held is None:
            return
        taken = self._taken[held.key]
        taken[held.max_parallel] -= 1
        if not taken[held.max_parallel]:
            # Its limit no longer counts.
            del taken[held.max_parallel]
        if not taken:
            del self._taken[held.key]

    def check(self, held: Counter[Concurrency]) -> None:
        """Assert that as many permits are taken as slots and reservations hold, and no more than the limits allow."""
        counted = Counter(
            {Concurrency(key, most): n for key, taken in self._taken.items() for most, n in taken.items()}
        )
        assert counted == held, "permits are miscounted"
        for key, taken in self._taken.items():
            limits = [limit for limit in taken if limit > 0] + [self._limits.get(key, taken.total())]
            assert taken.total() <= min(limits), f"{taken.total()} calls of {key} hold permits"
