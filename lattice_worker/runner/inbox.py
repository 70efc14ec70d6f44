"""The frames for a process that runs one invocation at a time. Rule: one thread reads them at any time."""

import _thread
import contextvars
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

from lattice_worker.runner.frames import EVERY_SIGNAL, Channel
from lattice_worker.runner.invocation.output import TO_RUNNING, Output
from lattice_worker.runner.surroundings.memory import allow_stack

Frame = tuple[dict[str, Any], list[bytes]]


class Inbox:
    """The frames for a process that runs one invocation at a time.

    The thread that runs invocations reads them itself, until an invocation asks something: it cannot read while it
    waits for the answer. From then on a thread reads them that runs nothing else. `running` is the newest invocation.
    """

    def __init__(self, channel: Channel) -> None:
        self.running: Output | None = None
        self._channel = channel
        self._frames = channel.frames()
        self._queue: queue.SimpleQueue[Frame | None] | None = None
        self._lock = threading.Lock()
        channel.listen = self.listen

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        found = next(self._frames, None) if self._queue is None else self._queue.get()
        if found is None:
            raise StopIteration
        return found

    def listen(self) -> None:
        """Have answers taken while an invocation runs. Called while one does, so that no other thread reads."""
        with self._lock:
            if self._queue is None:
                self._channel.wait_aside()
                allow_stack()
                self._queue = queue.SimpleQueue()
                # Not a `threading.Thread`: a task may have replaced that, or hooked into it.
                contextvars.Context().run(_thread.start_new_thread, self._read, (self._queue,))

    def _read(self, others: "queue.SimpleQueue[Frame | None]") -> None:
        # Handlers run in the main thread, which wakes up only for signals of its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, EVERY_SIGNAL)
        for header, blobs in self._frames:
            if header["kind"] not in TO_RUNNING:
                others.put((header, blobs))
            elif (running := self.running) is not None and running.header["id"] == header["id"]:
                running.take(header, blobs)
        others.put(None)
