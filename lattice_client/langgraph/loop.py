"""Owns the thread whose event loop holds the streams of the runs of graphs. Rule: it runs no code of the user's."""

import asyncio
import atexit
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

# How long a cancelled call waits for the end of its attempt; the server kills the process in that time.
CANCEL_S = 2.0


class Loop:
    """An event loop in a thread of its own, which starts with the first coroutine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Start a coroutine; return the future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.started())

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the thread; nothing once it has ended."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    @property
    def is_here(self) -> bool:
        """Whether this is its thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def started(self) -> asyncio.AbstractEventLoop:
        """Return the loop, which runs."""
        with self._lock:
            if self._loop is None or self._loop.is_closed():
                # In a context of its own: the loop keeps it, and that of the caller refers to the caller's graph.
                self._loop = contextvars.Context().run(asyncio.new_event_loop)
                # A daemon, so that a program with an unfinished graph can end; `stop` is called at the exit.
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="lattice-langgraph", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
            return self._loop

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None and not loop.is_closed():
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(CANCEL_S)
        atexit.unregister(self.stop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_S / 2))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
