"""Owns calls that a thread reads while it blocks. Rule: gRPC's memory of a call is released by the next call."""

import queue
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc

from lattice_client.transport import forks
from lattice_client.transport.channel import LimitReachedError, Mailbox
from lattice_client.transport.interrupts import calling

R = TypeVar("R")

# The time at which the innermost `BlockingChannel.limit` of this thread ends, on the clock of `time.monotonic`.
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def left_s() -> float | None:
    """Return the seconds left of the innermost limit of this thread; None without a limit."""
    ends_at = deadline.get()
    return None if ends_at is None else max(0.0, ends_at - time.monotonic())


def finish(work: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine whose calls block to its end."""
    with suppress(StopIteration):
        work.send(None)


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


class Unreleased(Protocol):
    """A call that ends, and that gRPC keeps until its last events are taken."""

    @property
    def is_kept(self) -> bool:
        """Whether gRPC still keeps it."""

    def release(self) -> None:
        """Take the last events."""


class UnreleasedCalls:
    """Calls that nothing reads any more, and that gRPC still keeps. For any thread."""

    def __init__(self) -> None:
        self._streams: deque[Unreleased] = deque()

    def cancel(self, stream: MessageStream[Any]) -> None:
        """Cancel a call that is not being read, and release it later. May be called by a finalizer."""
        stream.cancel()
        self.add(stream)

    def add(self, stream: Unreleased) -> None:
        """Release an ended or cancelled call later: its last event has not arrived yet."""
        if stream.is_kept:
            self._streams.append(stream)

    def release(self) -> None:
        """Release the calls, except calls that another thread is reading."""
        for _ in range(len(self._streams)):
            with suppress(IndexError):  # another thread took it
                stream = self._streams.popleft()
                stream.release()
                self.add(stream)


class BlockingMailbox(Mailbox[R], Generic[R]):
    """Items for the threads that wait for them."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[R] = queue.SimpleQueue()

    def put(self, item: R) -> None:
        """Add an item, from any thread."""
        self._items.put(item)

    def is_empty(self) -> bool:
        """Whether `get` would wait."""
        return self._items.empty()

    async def get(self) -> R:
        """Wait for an item, and take it. Raises LimitReachedError."""
        try:
            return self._items.get(timeout=left_s())
        except queue.Empty:
            raise LimitReachedError from None

    def is_here(self) -> bool:
        """Every thread may call `get`."""
        return True
