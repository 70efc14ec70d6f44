"""Owns calls that a thread reads while it blocks. Rule: gRPC's memory of a call is released by the next call."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, cast

import grpc

from lattice_client.transport import forks
from lattice_client.transport.channel import LimitReachedError, OpenCall
from lattice_client.transport.interrupts import calling

R = TypeVar("R")

# The time at which the innermost `BlockingChannel.limit` of this thread ends, on the clock of `time.monotonic`.
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def left_s() -> float | None:
    """Return the seconds left of the innermost limit of this thread; None without a limit."""
    ends_at = deadline.get()
    return None if ends_at is None else max(0.0, ends_at - time.monotonic())


class MessageStream(Generic[R]):
    """The responses of one call. gRPC keeps a call, about 18 KB, until all its events were consumed."""

    def __init__(self, call: Any) -> None:
        forks.use(call)
        self._call = call
        self._is_interrupted = False

    def read(self) -> R | None:
        """Wait for the next response; None at the end of the stream. Raises grpc.RpcError."""
        try:
            return cast("R | None", calling(next, self._call, None))
        except grpc.RpcError:
            raise
        except BaseException:
            # A signal handler raised it; gRPC has cancelled and released the call.
            self._is_interrupted = True
            raise

    def cancel(self) -> None:
        """Cancel the call: the next `read`, or the one in progress, raises grpc.RpcError."""
        if not forks.is_broken():  # the call belongs to the parent process
            calling(self._call.cancel)

    @property
    def is_kept(self) -> bool:
        """Whether gRPC still keeps the call."""
        return bool(self._call._state.due) and not (self._is_interrupted or forks.is_broken())

    def release(self) -> None:
        """Consume the last events of an ended or cancelled call. gRPC has no public method for this."""
        while self.is_kept:
            calling(self._call._consume_next_event)


class UnreleasedCalls:
    """Calls that nothing reads any more, and that gRPC still keeps. For any thread."""

    def __init__(self) -> None:
        self._streams: deque[MessageStream[Any]] = deque()

    def cancel(self, stream: MessageStream[Any]) -> None:
        """Cancel a call that is not being read, and release it later. May be called by a finalizer."""
        stream.cancel()
        self.add(stream)

    def add(self, stream: MessageStream[Any]) -> None:
        """Release an ended or cancelled call later: its last event has not arrived yet."""
        if stream.is_kept:
            self._streams.append(stream)

    def release(self) -> None:
        """Release all of them."""
        while self._streams:
            with suppress(IndexError):  # another thread took it
                self._streams.popleft().release()


class BlockingOpenCall(OpenCall[R], Generic[R]):
    """A call of two messages, whose last message is read by the first thread that waits for it."""

    def __init__(
        self, stream: MessageStream[R], unreleased: UnreleasedCalls, on_end: Callable[[OpenCall[R]], object]
    ) -> None:
        self._stream: MessageStream[R] | None = stream
        self._unreleased = unreleased
        self._on_end = on_end
        self._last: R | None = None
        self._reading = threading.Lock()

    async def last(self) -> R | None:
        """Wait for the last message. Raises LimitReachedError, which ends the call."""
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

    def _read(self, stream: MessageStream[R], limit_s: float | None) -> R | None:
        timer = None
        if limit_s is not None:
            # The deadline of a started call cannot be changed.
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
            # The server ends the call with this message, so that it need not be cancelled.
            self._stream = None
            self._unreleased.add(stream)
            self._on_end(self)
            return last
        finally:
            if timer is not None:
                timer.cancel()

    def abandon(self) -> None:
        """Cancel the call; a thread that waits for its last message gets None."""
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
            self._unreleased.cancel(stream)
            self._on_end(self)
