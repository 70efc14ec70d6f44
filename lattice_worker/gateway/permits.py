"""The permits of a node's requests to models that have a budget; the server decides which may be made.

What there is to report travels in one question at a time, so that many requests share a message. Rule: a request that
was asked for ends once, also when its caller is gone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import Any


class ImpossibleError(Exception):
    """A request is larger than its budget."""


class Permits:
    """Asks the server by `ask`, which takes the name and the value of a question."""

    def __init__(self, ask: Callable[..., Awaitable[Any]]) -> None:
        self._ask = ask
        self._numbers = count(1)
        self._waiting: dict[str, asyncio.Future[None]] = {}
        # Lists of lists: a tuple is no JSON, and would be pickled.
        self._asked: list[list[Any]] = []
        self._answered: list[list[Any]] = []
        self._ended: list[list[Any]] = []
        self._told: list[list[Any]] = []
        self._refused: list[list[Any]] = []
        self._news = asyncio.Event()

    async def serve(self) -> None:
        """Report and take permits until the server does not know this gateway any more. Raises QuestionError."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._report())
            both.create_task(self._take())

    async def acquire(self, service: str, tokens: int, *, is_again: bool = False) -> str:
        """Wait until a request may be made; return the name by which it ends. Raises ImpossibleError."""
        name = str(next(self._numbers))
        permitted = self._waiting[name] = asyncio.get_running_loop().create_future()
        self._asked.append([name, service, tokens, is_again])
        self._news.set()
        try:
            await permitted
        except asyncio.CancelledError:
            self.end(name, None)
            raise
        finally:
            self._waiting.pop(name, None)
        return name

    def note_answer(self, name: str, told: Mapping[str, Sequence[float]]) -> None:
        """Report that the answer to a request has begun, and what its provider told of its limits."""
        self._answered.append([name, time.monotonic()])
        if told:
            self._told.append([name, told])
        self._news.set()

    def end(self, name: str, tokens: int | None) -> None:
        """Report the end of a request, which used so many tokens if that is known."""
        self._ended.append([name, tokens])
        self._news.set()

    def refuse(self, name: str, retry_after_s: float | None) -> None:
        """Report that a request was refused, and for how long no other one may be made."""
        self._refused.append([name, retry_after_s])
        self._news.set()

    async def _report(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            now = time.monotonic()
            report = {
                "asked": self._asked,
                "answered": [[name, now - at] for name, at in self._answered],
                "told": self._told,
                "ended": self._ended,
                "refused": self._refused,
            }
            self._asked, self._answered, self._told, self._ended, self._refused = [], [], [], [], []
            answer = await self._ask("lattice/gateway.budget", report)
            for name, why in answer["refused"].items():
                if (waiting := self._waiting.get(name)) is not None and not waiting.done():
                    waiting.set_exception(ImpossibleError(why))

    async def _take(self) -> None:
        while True:
            for name in (await self._ask("lattice/gateway.permits"))["permitted"]:
                # One that waits no more has reported its end.
                if (waiting := self._waiting.get(name)) is not None and not waiting.done():
                    waiting.set_result(None)
