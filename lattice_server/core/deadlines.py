"""Owns a heap of deadlines. Rule: a key has one deadline; setting it again replaces it."""

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K")
SLACK = 1024  # How many replaced or discarded entries may stay in the heap beyond the number of deadlines.


class Deadlines(Generic[K]):
    """Keys by the time at which they are due, earliest first."""

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[K]:
        return iter(self._at)

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def set(self, key: K, at: float) -> None:
        """Set the deadline of a key."""
        if self._at.get(key) == at:
            return
        self._at[key] = at
        heapq.heappush(self._heap, (at, next(self._numbers), key))
        if len(self._heap) > 2 * len(self._at) + SLACK:
            self._heap = [(at, next(self._numbers), key) for key, at in self._at.items()]
            heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        """Remove the deadline of a key."""
        self._at.pop(key, None)

    def due(self, now: float) -> Iterator[K]:
        """Take out the keys that are due, earliest first."""
        while self._heap and self._heap[0][0] <= now:
            at, _, key = heapq.heappop(self._heap)
            if self._at.get(key) == at:
                del self._at[key]
                yield key

    def next_at(self) -> float | None:
        """Return when a key is due next."""
        heap = self._heap
        while heap and self._at.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None
