"""Tells the server, for its metrics, which requests a gateway has answered. Rule: it delays no request."""

import asyncio
from collections import deque
from contextlib import suppress

from lattice_worker import context

INTERVAL_S = 1.0
MAX_REQUESTS = 1000  # Of one report.
MAX_WAITING = 10_000  # The oldest of more are not reported.


class Reports:
    """The requests that are to be reported."""

    def __init__(self) -> None:
        self._waiting: deque[list[object]] = deque(maxlen=MAX_WAITING)
        self._news = asyncio.Event()

    def note(self, service: str, status: int, seconds: float) -> None:
        """Take a request that has ended."""
        self._waiting.append([service, status, seconds])  # Lists, since JSON has no tuples.
        self._news.set()

    async def run(self) -> None:
        """Report, until the server does not know this gateway any more."""
        with suppress(context.QuestionError):
            while True:
                await self._news.wait()
                requests = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_REQUESTS))]
                if not self._waiting:
                    self._news.clear()
                await context.ask_async("lattice/gateway.report", {"requests": requests})
                # The requests of the next second share a report; without requests there is none.
                await asyncio.sleep(INTERVAL_S)
