"""Owns the turns of long work on the main thread. Rule: in each round of the event loop at most one slice of all such
work is done, so that whatever else came waits for one slice and no more."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

from lattice_server.core.steps import STEP_ITEMS, Steps, stepwise

T = TypeVar("T")


class Slices:
    """All that is done in slices, first come, first served; lives on the main thread."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._is_due = False

    def call(self, work: Callable[[], object]) -> None:
        """Have a slice done when it is its turn."""
        self._waiting.append(work)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    async def pause(self) -> None:
        """End a slice; return when it is the turn of the next one."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.call(lambda: None if turn.done() else turn.set_result(None))
        await turn

    async def finish(self, steps: Steps[T]) -> T:
        """Do work that comes in steps, each in a slice of its own; return what it made."""
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

    def _turn(self) -> None:
        work = self._waiting.popleft()
        self._is_due = bool(self._waiting)
        if self._is_due:
            asyncio.get_running_loop().call_soon(self._turn)
        work()
