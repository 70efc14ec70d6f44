"""Owns bidirectional streams that block a thread. Rule: only waiting threads read a stream."""

import queue
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, cast

import grpc

from lattice_client import errors
from lattice_client.transport import forks
from lattice_client.transport.blocking_calls import UnreleasedCalls
from lattice_client.transport.channel import BidiCall, LimitReachedError, Steps
from lattice_client.transport.direct_call import DirectCall
from lattice_client.transport.interrupts import calling
from lattice_client.transport.stubs import SignedCall

Q = TypeVar("Q")
R = TypeVar("R")


class ThreadedCall(Generic[Q, R]):
    """A stream of gRPC's, whose messages cross two of its threads, for versions of gRPC without `DirectCall`."""

    is_kept = False

    def __init__(self, method: Any) -> None:
        self._requests: queue.SimpleQueue[Q | None] = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None))
        self.send = self._requests.put

    def read(self) -> R | None:
        """Wait for the next message; None at the end of the stream. Raises grpc.RpcError."""
        return cast("R | None", next(self._call, None))

    def cancel(self) -> None:
        """End the stream, and the thread that sends."""
        self._call.cancel()
        self._requests.put(None)

    def release(self) -> None:
        """Do nothing: gRPC's threads take all events."""


def _started(method: SignedCall) -> DirectCall[Q, R] | ThreadedCall[Q, R]:
    try:
        return DirectCall(method.method, method.headers)
    except (AttributeError, TypeError):
        return ThreadedCall(method)


class BlockingBidiCall(BidiCall[Q, R], Generic[Q, R]):
    """A bidirectional stream, read by one thread at a time. `left_s` returns the seconds left of the reader's limit.

    What gRPC keeps of an abandoned stream is added to `unreleased`.
    """

    def __init__(
        self,
        method: SignedCall,
        converting: Callable[[], AbstractContextManager[None]],
        left_s: Callable[[], float | None],
        unreleased: UnreleasedCalls,
    ) -> None:
        self._converting = converting
        self._left_s = left_s
        self._unreleased = unreleased
        self._call: DirectCall[Q, R] | ThreadedCall[Q, R] = calling(_started, method)
        forks.use(self._call)

    def send(self, message: Q) -> None:
        """Send a message, after those before it."""
        calling(self._call.send, message)

    async def read(self) -> R | None:
        """Wait for the next message; None at the end of the stream. An error, a limit or a signal ends the stream."""
        limit_s = self._left_s()
        timer = None
        if limit_s is not None:
            # The deadline of a started call cannot be changed.
            timer = threading.Timer(limit_s, self.abandon)
            timer.daemon = True
            timer.start()
        try:
            with self._converting():
                found = calling(self._call.read)
            if found is None:
                self.abandon()
            return found
        except errors.RequestError as error:
            self.abandon()
            if error.code is grpc.StatusCode.CANCELLED and limit_s is not None and self._left_s() == 0:
                raise LimitReachedError from None
            raise
        except BaseException:
            # A signal handler raised it; gRPC would still wait for the next message.
            self.abandon()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def abandon(self) -> None:
        """Cancel the stream."""
        if not forks.is_broken():  # the call belongs to the parent process
            calling(self._call.cancel)
            self._unreleased.add(self._call)


class BlockingSteps(Steps):
    """Steps that one of the waiting threads makes, while the other waiting threads wait for their effects."""

    def __init__(self, step: Callable[[], Awaitable[bool]], left_s: Callable[[], float | None]) -> None:
        self._step = step
        self._left_s = left_s
        self._changed = threading.Condition()
        self._is_stepping = False
        self._is_over = False

    async def until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until a condition is true or the last step was made."""
        while not self._is_over:
            with self._changed:
                # Checked with the lock, so that a `wake` after the check finds this thread waiting.
                if is_ready():
                    return
                if self._is_stepping:
                    if not self._changed.wait(self._left_s()) and self._left_s() == 0:
                        raise LimitReachedError
                    continue
                self._is_stepping = True
            try:
                self._is_over = not await self._step()
            finally:
                self._is_stepping = False
                self.wake()

    def wake(self) -> None:
        """Have every waiting thread check its condition again."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Make no further step."""
        self._is_over = True
