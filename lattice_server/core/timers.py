"""Owns what is to happen to tasks later. Rule: what happens to a task that is over, never happens."""

import heapq
from collections.abc import Iterator
from itertools import count

from lattice_server.core.attempts import Task

SLACK = 1024  # How many tasks that are over may be kept beyond the number of the others.


class Timers:
    """Tasks by the time at which something is due for them. Part of `dispatch`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Task]] = []
        self._numbers = count()
        self._max_size = SLACK

    def add(self, task: Task, at: float) -> None:
        """Note that something is due for a task at a time."""
        heapq.heappush(self._heap, (at, next(self._numbers), task))
        if len(self._heap) > self._max_size:
            self._heap = [entry for entry in self._heap if not entry[2].is_over]
            heapq.heapify(self._heap)
            self._max_size = 2 * len(self._heap) + SLACK

    def due(self, now: float) -> Iterator[Task]:
        """Take out the tasks for which it is time, earliest first."""
        while self._heap and self._heap[0][0] <= now:
            task = heapq.heappop(self._heap)[2]
            if not task.is_over:
                yield task

    def next_at(self) -> float | None:
        """Return when something is due next."""
        while self._heap and self._heap[0][2].is_over:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def tasks(self) -> list[Task]:
        """Return the tasks for which something is due, once for each thing."""
        return [task for _, _, task in self._heap if not task.is_over]
