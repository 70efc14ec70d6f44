"""Owns questions to the scheduler's thread.

Rule: nobody reads the scheduler's machine but its own thread, which answers by an effect like any other.
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


class Inquiries:
    """Asks and waits for the answer; lives on the main thread."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._numbers = count(1)
        self._open: dict[int, asyncio.Future[Answer]] = {}

    async def nodes(self) -> NodesDescribed:
        """Return the nodes, and how many tasks wait and run."""
        number = next(self._numbers)
        return await self._ask(number, NodesRequested(number), NodesDescribed)

    async def explain(self, run_id: str, task_id: str) -> Explanation | None:
        """Return why a task waits; None when the scheduler does not have it."""
        number = next(self._numbers)
        return (await self._ask(number, ExplainRequested(number, run_id, task_id), TaskExplained)).explanation

    def answer(self, answer: Answer) -> None:
        """Hand an answer to whoever waits for it."""
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
