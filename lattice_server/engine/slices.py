"""Owns the time slices of long work on the main thread.

Rule: each round of the event loop runs at most one slice of all such work, so other callbacks wait for one slice only.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

from lattice_server.core.steps import STEP_ITEMS, Steps, stepwise

T = TypeVar("T")


class Slices:
    """The queue of all sliced work, in the order of arrival; lives on the main thread."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._is_due = False

    def call(self, work: Callable[[], object]) -> None:
        """Queue a slice."""
        self._waiting.append(work)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._run_next)

    async def pause(self) -> None:
        """End a slice; return when the next one may run."""
        resumed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.call(lambda: None if resumed.done() else resumed.set_result(None))
        await resumed

    async def finish(self, steps: Steps[T]) -> T:
        """Do work that comes in steps, each in a slice of its own; return its result."""
        while True:
            try:
                next(steps)
            except StopIteration as done:
                found: T = done.value
                return found
            await self.pause()

    async def each(self, items: Iterable[T], size: int = STEP_ITEMS) -> AsyncIterator[T]:
        """Yield items; a slice ends after `size` of them."""
        for item, is_step in stepwise(items, size):
            yield item
            if is_step:
                await self.pause()

    def _run_next(self) -> None:
        work = self._waiting.popleft()
        self._is_due = bool(self._waiting)
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._run_next)
        work()
