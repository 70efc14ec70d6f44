"""The chunks that an invocation streams, and how far it says it is.

Rule: an invocation has at most a window of chunks that the server has not acknowledged; `send` waits for room in it.
"""

import asyncio
import contextlib
import os
import threading
import time
from typing import Any

from lattice_worker.runner.encoding.values import PayloadError
from lattice_worker.runner.frames import Channel

OVER = "the attempt is over: nothing can be streamed any more"
# Progress is for people: so many reports at once, and then so many a second.
PROGRESS_BURST, PROGRESS_RATE = 20.0, 20.0


class Chunks:
    """The streamed output of one invocation; for any thread."""

    def __init__(self, channel: Channel, header: dict[str, Any]) -> None:
        self.limit_bytes: int = header.get("chunk_limit", 0)
        self._window_chunks, self._window_bytes = header.get("chunk_window", (0, 0))
        self._channel = channel
        self._name = header["id"]
        self._changed = threading.Condition()  # A reentrant lock: a signal handler may stream while its thread does.
        self._chunks = self._bytes = 0  # Sent and not acknowledged.
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._is_over = False
        self._tokens, self._tokens_at = PROGRESS_BURST, time.monotonic()

    def send(self, item: int, media_type: str, data: bytes) -> None:
        """Send a chunk. Waits for room, in this thread. Raises RuntimeError when the invocation is over."""
        with self._changed:
            while not self._try(item, media_type, data):
                self._changed.wait()

    async def send_async(self, item: int, media_type: str, data: bytes) -> None:
        """As `send`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._try(item, media_type, data):
                    return
                room = loop.create_future()
                self._waiting.append((loop, room))
            await room

    def _try(self, item: int, media_type: str, data: bytes) -> bool:
        """Send a chunk if there is room for it."""
        if self._is_over:
            raise RuntimeError(OVER)
        if len(data) > self.limit_bytes:
            text = f"a chunk takes {len(data)} bytes; chunks travel inline and may have {self.limit_bytes}"
            raise PayloadError(f"{text}: return a larger value as an output")
        is_full = self._chunks >= self._window_chunks or self._bytes + len(data) > self._window_bytes
        if is_full and self._chunks:
            self._channel.listen()
            return False
        self._chunks += 1
        self._bytes += len(data)
        self._channel.send({"kind": "chunk", "id": self._name, "item": item, "type": media_type}, [data])
        return True

    def take(self, header: dict[str, Any]) -> None:
        """Take the acknowledgement of chunks. Called by a thread that runs no code of the invocation."""
        with self._changed:
            self._chunks -= header["chunks"]
            self._bytes -= header["bytes"]
            self._wake()

    def progress(self, item: int, done: float, total: float | None) -> None:
        """Say how far the invocation is; dropped when others were sent shortly before, unless all is done."""
        with self._changed:
            now = time.monotonic()
            self._tokens = min(PROGRESS_BURST, self._tokens + (now - self._tokens_at) * PROGRESS_RATE)
            self._tokens_at = now
            if self._is_over or (self._tokens < 1 and done != total):
                return
            self._tokens -= 1
        self._channel.send({"kind": "progress", "id": self._name, "item": item, "done": done, "total": total})

    @property
    def is_inherited(self) -> bool:
        """Whether this is a process that the invocation has forked."""
        return self._channel.owner != os.getpid()

    def close(self) -> None:
        """End the invocation: what still waits gets RuntimeError."""
        with self._changed:
            self._is_over = True
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, room in waiting:
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                loop.call_soon_threadsafe(_set, room)


def _set(room: "asyncio.Future[None]") -> None:
    if not room.done():
        room.set_result(None)
