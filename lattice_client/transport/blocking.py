"""Owns calls that block a thread. Rule: no thread of this package's stands between a caller and its answer.

gRPC's calls of this kind run in the caller's own thread, which so finds out of signals, such as Ctrl-C, within 0.2 s.
"""

import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import grpc
from grpc.experimental import ChannelOptions

from lattice_client import errors
from lattice_client.transport import forks
from lattice_client.transport.bidi import BlockingConversation, BlockingSteps
from lattice_client.transport.channel import (
    Channel,
    Conversation,
    LimitReachedError,
    OpenCall,
    Steps,
    Stubs,
    options_for,
)
from lattice_client.transport.interrupts import calling
from lattice_client.transport.security import Security

if TYPE_CHECKING:
    from grpc.aio import (
        StreamStreamMultiCallable,
        StreamUnaryMultiCallable,
        UnaryStreamMultiCallable,
        UnaryUnaryMultiCallable,
    )

Q = TypeVar("Q")
R = TypeVar("R")

# When the block that this thread is in must end, on the clock of `time.monotonic`.
_deadline: ContextVar[float | None] = ContextVar("_deadline", default=None)


class BlockingChannel(Channel):
    """The connection to one server, for any number of threads."""

    def __init__(self, dialled: Security) -> None:
        super().__init__(dialled)
        self._lock = threading.Lock()
        self._connection: tuple[grpc.Channel, Stubs] | None = None
        # Streams that nothing reads any more, and that gRPC still keeps.
        self._left_over: deque[_Stream[Any]] = deque()

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
        with self._closing():
            return cast(R, calling(cast(Any, method), request, timeout=left_s()))

    async def stream(self, method: "UnaryStreamMultiCallable[Q, R]", request: Q) -> AsyncIterator[R]:
        """Yield the messages of a call. Raises as `call`."""
        with self._closing():
            found: _Stream[R] = _Stream(calling(cast(Any, method), request, timeout=left_s()))
            try:
                while (response := found.read()) is not None:
                    yield response
            finally:
                self.discard(found)

    async def upload(self, method: "StreamUnaryMultiCallable[Q, R]", messages: Iterable[Q]) -> R:
        """Send messages; return the answer. Raises as `call`."""
        with self._closing():
            return cast(R, calling(cast(Any, method), iter(messages), timeout=left_s()))

    async def begin(
        self, method: "UnaryStreamMultiCallable[Q, R]", request: Q, on_end: Callable[[OpenCall[R]], object]
    ) -> tuple[R, OpenCall[R]]:
        """Start a call of two messages; return the first one. Raises as `call`."""
        self._forget_left_over()
        with self._closing():
            found: _Stream[R] = _Stream(calling(cast(Any, method), request, timeout=left_s()))
            first = found.read()
        assert first is not None, "the server answers before it ends the call"
        return first, BlockingOpenCall(self, found, on_end)

    def converse(self, method: "StreamStreamMultiCallable[Q, R]") -> Conversation[Q, R]:
        """Start a call with messages both ways. Raises ClientClosedError, ForkError."""
        with self._closing():
            return BlockingConversation(cast(Any, method), self._closing, left_s)

    def steps(self, step: Callable[[], Awaitable[bool]]) -> Steps:
        """Return what makes these steps, in the threads that wait."""
        return BlockingSteps(step, left_s)

    @asynccontextmanager
    async def limit(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Bound all calls of a block. Raises LimitReachedError."""
        if timeout_s is None:
            yield
            return
        token = _deadline.set(self.now() + timeout_s)
        try:
            yield
        finally:
            _deadline.reset(token)

    def now(self) -> float:
        """Return the time, in seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait. Raises LimitReachedError."""
        limit_s = left_s()
        # The length of a backoff: the server sends nothing that could end it.
        time.sleep(seconds if limit_s is None else min(seconds, limit_s))
        if limit_s is not None and limit_s <= seconds:
            raise LimitReachedError

    def shut(self) -> None:
        """Close the connection. Calls under way in other threads raise ClientClosedError."""
        self.is_closed = True
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None and not forks.is_broken():
            self._forget_left_over()
            calling(connection[0].close)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """As `_converting`; also turn what gRPC raises at a limit, or for a closed channel."""
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

    def discard(self, stream: "_Stream[Any]") -> None:
        """End a stream that is not being read. May be called by a finalizer, in any thread."""
        stream.cancel()
        self.put_aside(stream)

    def put_aside(self, stream: "_Stream[Any]") -> None:
        """Have gRPC forget a stream that has ended, or was cancelled, with the next call: its end is on its way."""
        if stream.is_kept:
            self._left_over.append(stream)

    def _forget_left_over(self) -> None:
        while self._left_over:
            with suppress(IndexError):  # another thread took it
                self._left_over.popleft().forget()


class _Stream(Generic[R]):
    """The messages of one call. gRPC keeps a call, about 18 KB, until its caller has taken all its events."""

    def __init__(self, call: Any) -> None:
        forks.use(call)
        self._call = call
        self._is_interrupted = False

    def read(self) -> R | None:
        """Wait for the next message; None at the end. Raises grpc.RpcError."""
        try:
            return cast("R | None", calling(next, self._call, None))
        except grpc.RpcError:
            raise
        except BaseException:
            # By a signal; gRPC has cancelled the call and forgotten it.
            self._is_interrupted = True
            raise

    def cancel(self) -> None:
        """Have the next, or the present, `read` raise grpc.RpcError."""
        if not forks.is_broken():  # there it is the parent's
            calling(self._call.cancel)

    @property
    def is_kept(self) -> bool:
        """Whether gRPC keeps the call."""
        return bool(self._call._state.due) and not (self._is_interrupted or forks.is_broken())

    def forget(self) -> None:
        """Take the last events of a call that has ended or was cancelled. gRPC has no public way to do this."""
        while self.is_kept:
            calling(self._call._consume_next_event)


def _connect(dialled: Security) -> tuple[grpc.Channel, Stubs]:
    forks.check_process()
    options = [*options_for(dialled), (ChannelOptions.SingleThreadedUnaryStream, 1)]
    if dialled.credentials is None:
        channel = grpc.insecure_channel(dialled.address, options=options)
    else:
        channel = grpc.secure_channel(dialled.address, dialled.credentials, options=options)
    forks.use(channel)
    return channel, Stubs(channel, dialled.token)


def left_s() -> float | None:
    """Return how much of the innermost limit is left, in seconds; None where there is none."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class BlockingOpenCall(OpenCall[R], Generic[R]):
    """The rest of a call, read by the first thread that asks for it."""

    def __init__(self, channel: BlockingChannel, stream: _Stream[R], on_end: Callable[[OpenCall[R]], object]) -> None:
        self._channel = channel
        self._stream: _Stream[R] | None = stream
        self._on_end = on_end
        self._last: R | None = None
        self._reading = threading.Lock()

    async def last(self) -> R | None:
        """Wait for the last message. Raises LimitReachedError, after which the call is over."""
        limit_s = left_s()
        if not self._reading.acquire(timeout=-1 if limit_s is None else limit_s):
            raise LimitReachedError
        try:
            if self._stream is not None:
                self._last = self._read(self._stream, limit_s)
            return self._last
        finally:
            self._end()
            self._reading.release()

    def _read(self, stream: _Stream[R], limit_s: float | None) -> R | None:
        timer = None
        if limit_s is not None:
            # A call that has begun takes no deadline any more.
            timer = threading.Timer(limit_s, stream.cancel)
            timer.daemon = True
            timer.start()
        try:
            last = stream.read()
        except grpc.RpcError:
            if left_s() == 0:
                raise LimitReachedError from None
            return None
        else:
            # The server ends the call with this message: nothing is to be cancelled.
            self._stream = None
            self._channel.put_aside(stream)
            self._on_end(self)
            return last
        finally:
            if timer is not None:
                timer.cancel()

    def abandon(self) -> None:
        """End the call; a thread that reads it finds it broken."""
        if self._reading.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._reading.release()
        elif (stream := self._stream) is not None:
            stream.cancel()

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            self._channel.discard(stream)
            self._on_end(self)
