"""Owns queries to the scheduler's thread.

Rule: only the scheduler's own thread reads its machine; it answers a query by an effect.
"""

import asyncio
from itertools import count
from typing import TypeVar

from lattice_server.core.messages import (
    Answer,
    ExplainRequested,
    Explanation,
    NodesDescribed,
    NodesRequested,
    TaskExplained,
)
from lattice_server.engine.bus import MessageBus

Found = TypeVar("Found", bound=Answer)


class SchedulerQueries:
    """Asks the scheduler and waits for the answer; lives on the main thread."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._numbers = count(1)
        self._open: dict[int, asyncio.Future[Answer]] = {}

    async def nodes(self) -> NodesDescribed:
        """Return the nodes, and how many tasks are queued and running."""
        number = next(self._numbers)
        return await self._ask(number, NodesRequested(number), NodesDescribed)

    async def explain(self, run_id: str, task_id: str) -> Explanation | None:
        """Return why a task waits; None when the scheduler does not have it."""
        number = next(self._numbers)
        return (await self._ask(number, ExplainRequested(number, run_id, task_id), TaskExplained)).explanation

    def answer(self, answer: Answer) -> None:
        """Hand an answer to the query that it is for."""
        future = self._open.pop(answer.request_id, None)
        if future is not None and not future.done():
            future.set_result(answer)

    async def _ask(self, number: int, question: NodesRequested | ExplainRequested, kind: type[Found]) -> Found:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        self._bus.post([question])
        try:
            answer = await future
        finally:
            self._open.pop(number, None)
        assert isinstance(answer, kind)
        return answer
