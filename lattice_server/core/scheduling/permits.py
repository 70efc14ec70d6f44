"""Owns how many calls of a concurrency key may run at once.

Rule: a permit is taken when a call is placed, or when a node is reserved for it, and released once. A call that waits
or backs off holds none.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from lattice_server.core.model import TaskSpec


class Concurrency(NamedTuple):
    """What a call counts for: the key, and how many calls of it this one allows; zero means any number."""

    key: str
    max_parallel: int


def concurrency_of(spec: TaskSpec) -> Concurrency | None:
    """Return what the calls of a task count for; None when nothing limits them."""
    key = spec.concurrency_key or (spec.function.digest if spec.max_parallel else "")
    return Concurrency(key, spec.max_parallel) if key else None


class Permits:
    """The permits that are taken, by key and by how many calls those that took them allow.

    Calls of one key may disagree on how many of them may run: the least number that one of them allows holds, and that
    of the server, given in `limits`.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = limits
        self._taken: dict[str, Counter[int]] = {}

    def limit(self, wanted: Concurrency) -> int | None:
        """Return how many calls of a key may run beside one more; None when any number may."""
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
        """Give one permit back."""
        if held is None:
            return
        taken = self._taken[held.key]
        taken[held.max_parallel] -= 1
        if not taken[held.max_parallel]:
            # What it allowed no longer counts.
            del taken[held.max_parallel]
        if not taken:
            del self._taken[held.key]

    def check(self, held: Counter[Concurrency]) -> None:
        """Assert that the permits that are held are those that were taken, and no more than may be."""
        counted = Counter(
            {Concurrency(key, most): n for key, taken in self._taken.items() for most, n in taken.items()}
        )
        assert counted == held, "permits are miscounted"
        for key, taken in self._taken.items():
            limits = [limit for limit in taken if limit > 0] + [self._limits.get(key, taken.total())]
            assert taken.total() <= min(limits), f"{taken.total()} calls of {key} hold permits"
