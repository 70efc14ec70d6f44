"""Owns calls with messages both ways that block a thread. Rule: a thread reads only while it waits for something.

gRPC sends what is queued from a thread of its own, which runs none of this package's code.
"""

import queue
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, cast

import grpc

from lattice_client import errors
from lattice_client.transport import forks
from lattice_client.transport.channel import Conversation, LimitReachedError, Steps
from lattice_client.transport.interrupts import calling

Q = TypeVar("Q")
R = TypeVar("R")


class BlockingConversation(Conversation[Q, R], Generic[Q, R]):
    """A call that is read by one thread at a time. `left_s` says how much time the block that reads has left."""

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
        """Wait for the next message; None at the end. What ends the wait early ends the call."""
        limit_s = self._left_s()
        timer = None
        if limit_s is not None:
            # A call that has begun takes no deadline any more.
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
            # By a signal: gRPC waits for a message that nothing will take.
            self.abandon()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def abandon(self) -> None:
        """End the call, and with it the thread that sends."""
        if not forks.is_broken():  # there it is the parent's
            calling(self._call.cancel)
            self._requests.put(None)


class BlockingSteps(Steps):
    """Steps made by one of the threads that wait; the others wait for what it brings about."""

    def __init__(self, step: Callable[[], Awaitable[bool]], left_s: Callable[[], float | None]) -> None:
        self._step = step
        self._left_s = left_s
        self._turn = threading.Condition()
        self._is_stepping = False
        self._is_over = False

    async def until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until something holds."""
        while not self._is_over:
            with self._turn:
                # Looked at here: what makes it ready wakes those that wait by then.
                if is_ready():
                    return
                if self._is_stepping:
                    if not self._turn.wait(self._left_s()) and self._left_s() == 0:
                        raise LimitReachedError
                    continue
                self._is_stepping = True
            try:
                self._is_over = not await self._step()
            finally:
                self._is_stepping = False
                self.wake()

    def wake(self) -> None:
        """Have the threads that wait look again."""
        with self._turn:
            self._turn.notify_all()

    def stop(self) -> None:
        """Make no more steps."""
        self._is_over = True
