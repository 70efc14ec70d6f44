"""Owns the calls that wait until records are durable, on the main thread. Rule: they are made in order."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from lattice_server.engine.recording.journal_port import JournalError
from lattice_server.engine.recording.journal_records import DroppedRun


class Durability:
    """A `JournalListener` for an event loop, and the calls and coroutines that wait for commits.

    `on_failure` is called on the loop when the journal broke, `on_dropped` with the runs and artifacts that it deleted.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_failure: Callable[[JournalError], None],
        on_dropped: Callable[[Sequence[DroppedRun], Sequence[str]], None],
    ) -> None:
        self.number = 0
        self._loop = loop
        self._on_failure = on_failure
        self._on_dropped = on_dropped
        self._failure: JournalError | None = None
        self._newest = 0
        self._is_waking = False
        self._calls: deque[tuple[int, Callable[[], object]]] = deque()
        self._futures: set[asyncio.Future[None]] = set()

    def when(self, number: int, call: Callable[[], object]) -> None:
        """Call something once a commit is durable, at once if it is; never when the journal breaks before.

        It is called after all that was given before it.
        """
        if number <= self.number:
            call()
        else:
            self._calls.append((number, call))

    async def wait(self, number: int) -> None:
        """Wait until a commit is durable. Raises JournalError when it never will be."""
        if number <= self.number:
            return
        if self._failure is not None:
            raise self._failure
        done: asyncio.Future[None] = self._loop.create_future()
        self._futures.add(done)
        self.when(number, lambda: None if done.done() else done.set_result(None))
        try:
            await done
        finally:
            self._futures.discard(done)

    def durable(self, number: int) -> None:
        """See `JournalListener`."""
        self._newest = number
        # Cleared before the number is read: a commit that comes later wakes the loop again.
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._advance)

    def failed(self, error: JournalError) -> None:
        """See `JournalListener`."""
        self._loop.call_soon_threadsafe(self._fail, error)

    def dropped(self, runs: Sequence[DroppedRun], artifacts: Sequence[str]) -> None:
        """See `JournalListener`."""
        self._loop.call_soon_threadsafe(self._on_dropped, runs, artifacts)

    def _advance(self) -> None:
        self._is_waking = False
        self.number = max(self.number, self._newest)
        while self._calls and self._calls[0][0] <= self.number:
            self._calls.popleft()[1]()

    def _fail(self, error: JournalError) -> None:
        self._failure = error
        self._calls.clear()
        for done in self._futures:
            if not done.done():
                done.set_exception(error)
        self._on_failure(error)
