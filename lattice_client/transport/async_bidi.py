"""Owns bidirectional streams for asyncio. Rule: a stream belongs to the event loop that opened it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import grpc

from lattice_client import background
from lattice_client.transport.channel import BidiCall, Steps

if TYPE_CHECKING:
    from grpc.aio import StreamStreamMultiCallable

Q = TypeVar("Q")
R = TypeVar("R")


class AsyncBidiCall(BidiCall[Q, R], Generic[Q, R]):
    """A bidirectional stream of one event loop."""

    def __init__(
        self, method: "StreamStreamMultiCallable[Q, R]", converting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._converting = converting
        self._requests: asyncio.Queue[Q | None] = asyncio.Queue()
        self._call: Any = method(_queued(self._requests))

    def send(self, message: Q) -> None:
        """Queue a message."""
        self._requests.put_nowait(message)

    async def read(self) -> R | None:
        """Wait for the next message; None at the end of the stream."""
        with self._converting():
            found = await self._call.read()
        return None if found is grpc.aio.EOF else cast(R, found)

    def abandon(self) -> None:
        """Cancel the stream."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)


async def _queued(requests: "asyncio.Queue[Q | None]") -> AsyncIterator[Q]:
    while (request := await requests.get()) is not None:
        yield request


class AsyncSteps(Steps):
    """Steps that a task of the running loop makes, whether or not a caller waits."""

    def __init__(self, step: Callable[[], Awaitable[bool]]) -> None:
        self._loop = asyncio.get_running_loop()
        # Only callers whose condition is true are woken: thousands may wait for the tasks of one run.
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._is_over = False
        self._error: BaseException | None = None
        stepping = background.share(self._step_until_last(step))
        self._stepping: asyncio.Task[None] | None = stepping
        stepping.add_done_callback(self._end)

    async def _step_until_last(self, step: Callable[[], Awaitable[bool]]) -> None:
        while await step():
            self.wake()

    def _end(self, stepping: "asyncio.Task[None]") -> None:
        if not stepping.cancelled():
            self._error = stepping.exception()
        # A task keeps its context, whose variables may refer to the run, and the finalizer of the run refers to this.
        self._is_over, self._stepping = True, None
        self.wake()

    async def until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until a condition is true or the last step was made."""
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("an open run belongs to the event loop it was opened on: use it there")
        while not is_ready():
            if self._is_over:
                if self._error is not None:
                    raise self._error
                return
            waiter = self._loop.create_future()
            self._waiting[waiter] = is_ready
            try:
                await waiter
            finally:
                del self._waiting[waiter]

    def wake(self) -> None:
        """Wake the waiting callers whose condition is true, and all of them after the last step."""
        for waiter, is_ready in self._waiting.items():
            if not waiter.done() and (self._is_over or is_ready()):
                waiter.set_result(None)

    def stop(self) -> None:
        """Make no further step."""
        if (stepping := self._stepping) is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(stepping.cancel)
