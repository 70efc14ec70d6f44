"""Owns the garbage collection of the server's process.

Rule: while tasks are open, only young objects are collected. A full collection looks through every live run and would
hold up all threads, so it waits until the server is idle.
"""

import asyncio
import gc
from collections.abc import Callable

from lattice_server.huge_pages import use_huge_pages

# Allocations before a collection of the youngest generation, and such collections before one of the middle generation.
# A collection looks through the objects allocated since the last one of its kind: at most 12,000, a few ms.
YOUNG, MIDDLE = 2_000, 5
# Collections of the middle generation before a full one, when it runs by itself: never.
NEVER = 1_000_000_000
# How long the server has to be idle before a full collection, and how far apart two of them are.
IDLE_S, INTERVAL_S = 1.0, 60.0


class GarbageCollection:
    """The policy of one process; lives on the main thread. `is_idle` says whether nothing waits for that thread."""

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._before = gc.get_threshold()
        self._has_frozen = False
        self._timer: asyncio.TimerHandle | None = None
        self._next_at = 0.0

    def start(self) -> None:
        """Exempt the modules and parts that are loaded by now from collections, and set the thresholds.

        A program that serves within its own process and has frozen its objects itself keeps its own choice.
        """
        self._has_frozen = not gc.get_freeze_count()
        if self._has_frozen:
            gc.collect()
            gc.freeze()
        use_huge_pages()
        gc.set_threshold(YOUNG, MIDDLE, NEVER)

    def stop(self) -> None:
        """Restore the thresholds of the process."""
        if self._timer is not None:
            self._timer.cancel()
        gc.set_threshold(*self._before)
        if self._has_frozen:
            gc.unfreeze()

    def request(self) -> None:
        """Have a full collection made as soon as the server is idle, unless one was made a short time ago."""
        loop = asyncio.get_running_loop()
        if self._timer is None and self._is_idle():
            self._timer = loop.call_at(max(loop.time() + IDLE_S, self._next_at), self._collect)

    def _collect(self) -> None:
        self._timer = None
        if self._is_idle():
            self._next_at = asyncio.get_running_loop().time() + INTERVAL_S
            gc.collect()
            use_huge_pages()  # The first runs have loaded more.
