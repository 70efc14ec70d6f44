"""Owns the delivery of a stream's messages to the threads that wait for them.

Rule: one of the waiting threads reads the stream for all of them. A message for the reader itself crosses no thread.
When the reader leaves, it appoints another waiting thread, by an item in that thread's mailbox.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar, cast

from lattice_client.transport.blocking_calls import BlockingMailbox, finish, left_s
from lattice_client.transport.channel import Delivery, Mailbox

R = TypeVar("R")
Box = BlockingMailbox[Any]
_APPOINTED = object()


class BlockingDelivery(Delivery):
    """Delivers by `step`; see `Channel.delivery`.

    A thread with a time limit cannot read, because a read cannot be ended without the stream. The first such thread has
    one more thread read, until the end of the stream.
    """

    def __init__(self, step: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        self._step = step
        self._lock = threading.Lock()
        # The reader. Set by `setdefault`, so that it is known who reads when a signal handler raises at any point.
        self._reader: dict[None, tuple[Box, int]] = {}
        # The waiting threads that may read, in order.
        self._waiting: OrderedDict[Box, None] = OrderedDict()
        self._has_thread = False

    async def get(self, box: Mailbox[R | None]) -> R | None:
        """Wait for an item of a mailbox, and take it. Raises LimitReachedError."""
        own, me = cast(Box, box), (cast(Box, box), threading.get_ident())
        may_read = left_s() is None
        if not may_read:
            self._start_thread()
        try:
            while True:
                if may_read:
                    self._waiting[own] = None
                reader = self._reader.setdefault(None, me) if may_read else None
                if reader is me:
                    self._waiting.pop(own, None)
                    await self._read_for(own)
                elif reader is not None and reader[1] == me[1]:
                    return None  # A signal handler that this thread called while it read: it would wait for itself.
                if (found := await own.get()) is not _APPOINTED:
                    return cast("R | None", found)
        finally:
            self._leave(own, me)

    async def _read_for(self, box: Box) -> None:
        """Read until a mailbox has an item."""
        while box.is_empty():
            if not await self._step() and box.is_empty():
                box.put(None)

    def _leave(self, box: Box, me: tuple[Box, int]) -> None:
        self._waiting.pop(box, None)
        if self._reader.get(None) is me:
            del self._reader[None]
        # Also when this thread was appointed, and got its item before it could read.
        if None not in self._reader:
            with suppress(KeyError):  # No thread waits.
                self._waiting.popitem(last=False)[0].put(_APPOINTED)

    def _start_thread(self) -> None:
        with self._lock:
            has_thread, self._has_thread = self._has_thread, True
        if not has_thread:
            work = self.get(BlockingMailbox())
            threading.Thread(target=finish, args=[work], name="lattice-answers", daemon=True).start()
