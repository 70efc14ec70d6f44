"""Owns the connection for asyncio. Rule: gRPC binds a channel to an event loop, so each loop has its own channel."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from lattice_client import background
from lattice_client.errors import RequestError
from lattice_client.transport import forks
from lattice_client.transport.async_bidi import AsyncBidiCall, AsyncSteps
from lattice_client.transport.channel import (
    BidiCall,
    Channel,
    Delivery,
    LimitReachedError,
    Mailbox,
    Steps,
    options_for,
)
from lattice_client.transport.security import Security
from lattice_client.transport.stubs import Stubs
from lattice_client.transport.tracing import call_span

if TYPE_CHECKING:
    from grpc.aio import (
        StreamStreamMultiCallable,
        StreamUnaryMultiCallable,
        UnaryStreamMultiCallable,
        UnaryUnaryMultiCallable,
    )

LAST_EVENTS_S = 0.01
Q = TypeVar("Q")
R = TypeVar("R")


class AsyncChannel(Channel):
    """The connection to one server: a gRPC channel for each event loop that makes calls."""

    def __init__(self, dialled: Security) -> None:
        super().__init__(dialled)
        self._connections: dict[asyncio.AbstractEventLoop, Connection] = {}
        self._lock = threading.Lock()
        self._beside: set[asyncio.Task[None]] = set()  # The event loop itself keeps no task.

    def _stubs(self) -> Stubs:
        if self.is_closed:
            raise self.closed_error()
        loop = asyncio.get_running_loop()
        found = self._connections.get(loop)
        if found is None or forks.is_broken():
            with self._lock:
                for other in [other for other in self._connections if other.is_closed()]:
                    del self._connections[other]
                found = self._connections[loop] = _connect(self._dialled)
        return found.stubs

    async def call(self, method: "UnaryUnaryMultiCallable[Q, R]", request: Q) -> R:
        """Return the answer of a call. Raises RequestError, ClientClosedError."""
        with self._closing(), call_span(method):
            return await method(request)

    async def stream(self, method: "UnaryStreamMultiCallable[Q, R]", request: Q) -> AsyncIterator[R]:
        """Yield the messages of a call. Raises as `call`."""
        with self._closing():
            call = method(request)
            try:
                async for response in call:
                    yield response
            finally:
                # gRPC keeps a call whose messages were not all read until it is cancelled.
                call.cancel()

    async def upload(self, method: "StreamUnaryMultiCallable[Q, R]", messages: Iterable[Q]) -> R:
        """Send messages; return the answer. Raises as `call`."""
        with self._closing(), call_span(method):
            return await method(_each(messages))

    def open_bidi(self, method: "StreamStreamMultiCallable[Q, R]") -> BidiCall[Q, R]:
        """Start a bidirectional stream. Raises ClientClosedError, ForkError."""
        with self._closing():
            return AsyncBidiCall(method, self._closing)

    def mailbox(self) -> Mailbox[Any]:
        """Return a mailbox of the running event loop."""
        return AsyncMailbox()

    def delivery(self, step: Callable[[], Coroutine[Any, Any, bool]]) -> Delivery:
        """Return a `Delivery` whose stream is read by a task of the running event loop."""
        self.beside(partial(_repeated, step))
        return AsyncDelivery()

    def beside(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine in a task of the running event loop. It tells those who wait for it itself."""
        task = background.start(work(), background.only_log)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def steps(self, step: Callable[[], Awaitable[bool]]) -> Steps:
        """Return a `Steps` that runs in a task of the running loop."""
        return AsyncSteps(step)

    @asynccontextmanager
    async def limit(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Limit the duration of a block. Raises LimitReachedError."""
        try:
            async with asyncio.timeout(timeout_s) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise LimitReachedError from None

    def now(self) -> float:
        """Return the time of the running loop, in seconds."""
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Close the channels of all event loops."""
        here = asyncio.get_running_loop()
        with self._lock:
            own = self._connections.pop(here, None)
        self.shut()
        if own is not None:
            await own.end.aclose()

    def shut(self) -> None:
        """Have each event loop close its channel. Calls in progress raise ClientClosedError."""
        self.is_closed = True
        with self._lock:
            connections, self._connections = self._connections, {}
        for loop, connection in connections.items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(connection.end.aclose(), loop)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """As `_converting`; also convert the errors of a call on a closed channel to ClientClosedError.

        gRPC swallows a cancellation that comes while the call fails: it is raised here, so that no retry follows.
        """
        before = _cancellations()
        try:
            with self._converting():
                yield
        except RequestError:
            if _cancellations() > before:
                raise asyncio.CancelledError from None
            raise
        except grpc.aio.UsageError:  # another thread closed it
            raise self.closed_error() from None
        except asyncio.CancelledError:
            if self.is_closed and not _cancellations():
                raise self.closed_error() from None
            raise


@dataclass(frozen=True, slots=True)
class Connection:
    """The channel of one event loop; `end` closes it when it is closed."""

    stubs: Stubs
    end: AsyncGenerator[None, None]


def _connect(dialled: Security) -> Connection:
    """Return a connection for the running event loop."""
    forks.check_process()
    options = options_for(dialled)
    if dialled.credentials is None:
        channel = grpc.aio.insecure_channel(dialled.address, options=options)
    else:
        channel = grpc.aio.secure_channel(dialled.address, dialled.credentials, options=options)
    forks.use(channel)
    end = _closing_at_end(channel)
    forks.use(end)
    with suppress(StopIteration):
        end.__anext__().send(None)
    return Connection(Stubs(channel, dialled.headers), end)


async def _closing_at_end(channel: grpc.aio.Channel) -> AsyncGenerator[None, None]:
    """Close a channel when the generator is closed.

    `asyncio.run` closes the generators of its event loop before the loop. gRPC would report an error for each event of
    a channel whose loop is closed.
    """
    try:
        yield
    finally:
        await channel.close()
        # gRPC does not tell when the last events of cancelled calls have come.
        await asyncio.sleep(LAST_EVENTS_S)


def _cancellations() -> int:
    """Return how often the cancellation of the running task was requested."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


async def _each(messages: Iterable[Q]) -> AsyncIterator[Q]:
    for message in messages:
        yield message


async def _repeated(step: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    while await step():
        pass


class AsyncDelivery(Delivery):
    """A stream that is read beside those who wait."""

    async def get(self, box: Mailbox[R | None]) -> R | None:
        """Wait for an item of a mailbox, and take it."""
        return await box.get()


class AsyncMailbox(Mailbox[R], Generic[R]):
    """Items for the coroutines of one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[R] = asyncio.Queue()

    def put(self, item: R) -> None:
        """Add an item."""
        self._items.put_nowait(item)

    async def get(self) -> R:
        """Wait for an item, and take it."""
        return await self._items.get()

    def is_here(self) -> bool:
        """Whether the running event loop is that of the mailbox."""
        return self._loop is asyncio.get_running_loop()
