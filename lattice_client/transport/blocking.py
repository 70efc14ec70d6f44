"""Owns the connection whose calls block the calling thread. Rule: a call uses no other thread of this package.

A blocking gRPC call returns to Python every 0.2 s, so that signals, such as Ctrl-C, are handled meanwhile.
"""

import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
from grpc.experimental import ChannelOptions

from lattice_client import errors
from lattice_client.transport import forks
from lattice_client.transport.blocking_bidi import BlockingBidiCall, BlockingSteps
from lattice_client.transport.blocking_calls import (
    BlockingMailbox,
    MessageStream,
    UnreleasedCalls,
    deadline,
    finish,
    left_s,
)
from lattice_client.transport.blocking_delivery import BlockingDelivery
from lattice_client.transport.channel import (
    BidiCall,
    Channel,
    Delivery,
    LimitReachedError,
    Mailbox,
    Steps,
    options_for,
)
from lattice_client.transport.interrupts import calling
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

Q = TypeVar("Q")
R = TypeVar("R")


class BlockingChannel(Channel):
    """The connection to one server, for any number of threads."""

    def __init__(self, dialled: Security) -> None:
        super().__init__(dialled)
        self._lock = threading.Lock()
        self._connection: tuple[grpc.Channel, Stubs] | None = None
        self._unreleased = UnreleasedCalls()

    def _stubs(self) -> Stubs:
        if self.is_closed:
            raise self.closed_error()
        if self._connection is None or forks.is_broken():
            with self._lock:
                if self._connection is None or forks.is_broken():
                    self._connection = _connect(self._dialled)
        return self._connection[1]

    async def call(self, method: "UnaryUnaryMultiCallable[Q, R]", request: Q) -> R:
        """Return the answer of a call. Raises RequestError, ClientClosedError, LimitReachedError."""
        with self._closing(), call_span(method):
            return cast(R, calling(cast(Any, method), request, timeout=left_s()))

    async def stream(self, method: "UnaryStreamMultiCallable[Q, R]", request: Q) -> AsyncIterator[R]:
        """Yield the messages of a call. Raises as `call`."""
        self._unreleased.release()
        with self._closing():
            found: MessageStream[R] = MessageStream(calling(cast(Any, method), request, timeout=left_s()))
            try:
                while (response := found.read()) is not None:
                    yield response
            finally:
                self._unreleased.cancel(found)

    async def upload(self, method: "StreamUnaryMultiCallable[Q, R]", messages: Iterable[Q]) -> R:
        """Send messages; return the answer. Raises as `call`."""
        with self._closing(), call_span(method):
            return cast(R, calling(cast(Any, method), iter(messages), timeout=left_s()))

    def open_bidi(self, method: "StreamStreamMultiCallable[Q, R]") -> BidiCall[Q, R]:
        """Start a bidirectional stream. Raises ClientClosedError, ForkError."""
        with self._closing():
            return BlockingBidiCall(cast(Any, method), self._closing, left_s, self._unreleased)

    def mailbox(self) -> Mailbox[Any]:
        """Return a mailbox for any thread."""
        return BlockingMailbox()

    def delivery(self, step: Callable[[], Coroutine[Any, Any, bool]]) -> Delivery:
        """Return a `Delivery` whose stream is read by one of the threads that wait."""
        return BlockingDelivery(step)

    def beside(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine in a thread of its own, which ends with the program."""
        threading.Thread(target=finish, args=[work()], name="lattice-answers", daemon=True).start()

    def steps(self, step: Callable[[], Awaitable[bool]]) -> Steps:
        """Return a `Steps` that runs in the waiting threads."""
        return BlockingSteps(step, left_s)

    @asynccontextmanager
    async def limit(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Limit the duration of a block. Raises LimitReachedError."""
        if timeout_s is None:
            yield
            return
        token = deadline.set(self.now() + timeout_s)
        try:
            yield
        finally:
            deadline.reset(token)

    def now(self) -> float:
        """Return the time, in seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait. Raises LimitReachedError."""
        limit_s = left_s()
        # No message can end this early: it is the backoff before another call.
        time.sleep(seconds if limit_s is None else min(seconds, limit_s))
        if limit_s is not None and limit_s <= seconds:
            raise LimitReachedError

    def shut(self) -> None:
        """Close the connection. Calls in progress in other threads raise ClientClosedError."""
        self.is_closed = True
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None and not forks.is_broken():
            self._unreleased.release()
            calling(connection[0].close)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """As `_converting`; also convert the errors of gRPC for a passed deadline and a closed channel."""
        try:
            with self._converting():
                yield
        except errors.RequestError as error:
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED and left_s() is not None:
                raise LimitReachedError from None
            raise
        except ValueError:
            if self.is_closed:
                raise self.closed_error() from None
            raise


def _connect(dialled: Security) -> tuple[grpc.Channel, Stubs]:
    forks.check_process()
    options = [*options_for(dialled), (ChannelOptions.SingleThreadedUnaryStream, 1)]
    if dialled.credentials is None:
        channel = grpc.insecure_channel(dialled.address, options=options)
    else:
        channel = grpc.secure_channel(dialled.address, dialled.credentials, options=options)
    forks.use(channel)
    return channel, Stubs(channel, dialled.headers)
