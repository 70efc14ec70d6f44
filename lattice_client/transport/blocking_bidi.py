"""Owns bidirectional streams that block a thread. Rule: only waiting threads read a stream.

gRPC sends the queued messages from a thread of its own, which runs no code of this package.
"""

import queue
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, cast

import grpc

from lattice_client import errors
from lattice_client.transport import forks
from lattice_client.transport.channel import BidiCall, LimitReachedError, Steps
from lattice_client.transport.interrupts import calling

Q = TypeVar("Q")
R = TypeVar("R")


class BlockingBidiCall(BidiCall[Q, R], Generic[Q, R]):
    """A bidirectional stream, read by one thread at a time. `left_s` returns the seconds left of the reader's limit."""

    def __init__(
        self,
        method: Callable[..., Any],
        converting: Callable[[], AbstractContextManager[None]],
        left_s: Callable[[], float | None],
    ) -> None:
        self._converting = converting
        self._left_s = left_s
        self._requests: queue.SimpleQueue[Q | None] = queue.SimpleQueue()
        self._call = calling(method, iter(self._requests.get, None))
        forks.use(self._call)

    def send(self, message: Q) -> None:
        """Queue a message."""
        self._requests.put(message)

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
                found = cast("R | None", calling(next, self._call, None))
            if found is None:
                self._requests.put(None)
            return found
        except errors.RequestError as error:
            self._requests.put(None)
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
        """Cancel the stream, and end the thread that sends."""
        if not forks.is_broken():  # the call belongs to the parent process
            calling(self._call.cancel)
            self._requests.put(None)


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
