"""Owns when the readers of one run are told of news. Rule: many readers take a bounded part of the main thread.

A message to a reader takes the main thread nearly a tenth of a millisecond. So the readers of a round are woken in
groups, and a pause after each group is left to the runs. News that come during a round are told in the next one, in one
message to each reader.
"""

import asyncio

# So many readers are woken at once. With the pause this bounds the readers of a run to 5,300 messages a second.
GROUP = 16
PAUSE_S = 0.003


class Audience:
    """The readers of one run that wait for news; lives on the main thread."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._due: dict[asyncio.Future[None], None] = {}  # Those of this round that are still to be woken.
        self._is_in_round = False
        self._has_news = False  # Since this round began.

    def tell(self) -> None:
        """Wake the readers that wait, in this round or the next."""
        if self._is_in_round:
            self._has_news = True
        elif len(self._waiting) <= GROUP:
            waiting, self._waiting = self._waiting, {}
            _wake(waiting)
        else:
            self._is_in_round = True
            self._due, self._waiting = self._waiting, {}
            self._wake_group()

    async def news(self, *, is_behind: bool) -> None:
        """Wait for news. A reader that `is_behind` knows of news and waits only for a round that has begun.

        It may also return without news.
        """
        if is_behind:
            if not self._is_in_round:
                return
            self._has_news = True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            await future
        finally:
            # Any number of readers may come and leave before the next event.
            self._waiting.pop(future, None)
            self._due.pop(future, None)

    def _wake_group(self) -> None:
        if not self._due and self._has_news:
            self._has_news = False
            self._due, self._waiting = self._waiting, {}
        self._is_in_round = bool(self._due)
        if self._is_in_round:
            _wake([self._due.popitem()[0] for _ in range(min(GROUP, len(self._due)))])
            # No reference to the timer is kept: it would form a cycle.
            asyncio.get_running_loop().call_later(PAUSE_S, self._wake_group)


def _wake(futures: "dict[asyncio.Future[None], None] | list[asyncio.Future[None]]") -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
