"""A coroutine's attempt: its own state in a process and on an event loop that it shares."""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from lattice_worker.runner.frames import Channel
from lattice_worker.runner.invocation.output import Output, current


class Attempt(Output):
    """An invocation that shares its process with others.

    `executor`, `task_factory` and `exception_handler` are what its code sees as those of the event loop.
    """

    def __init__(self, channel: Channel, header: dict[str, Any]) -> None:
        super().__init__(channel, header, header["number"])
        self.main: asyncio.Task[Any] | None = None
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] | None = None
        self.generators: weakref.WeakSet[AsyncGenerator[Any, Any]] | None = None
        self.task_factory: Callable[..., Any] | None = None
        self.exception_handler: Callable[..., Any] | None = None
        self.executor: Executor | None = None
        self._pool: Executor | None = None

    def own(self, task: "asyncio.Task[Any]") -> None:
        """Add a task of the event loop to the attempt; its function runs in the first."""
        if self.main is None:
            self.main = task
        elif self._tasks is None:
            self._tasks = weakref.WeakSet((task,))
        else:
            self._tasks.add(task)

    def tasks(self) -> "list[asyncio.Task[Any]]":
        """Return its tasks of the event loop; a task that is done is included as long as it is referenced."""
        return [task for task in (self.main, *(self._tasks or ())) if task is not None]

    def pool(self) -> Executor:
        """Return the default executor; its own, so that threads left behind by other attempts do not fill it."""
        if self.executor is None:
            self.executor = self._pool = ThreadPoolExecutor(thread_name_prefix="asyncio")
        return self.executor

    def abandon(self) -> None:
        """Run no step of it any more, and end the idle threads of its pool."""
        self.is_abandoned = True
        for task in self.tasks():
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # It would be told to another attempt.
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def here() -> Attempt | None:
    """Return the attempt whose code runs, None for Lattice's own."""
    found = current.get()
    return found if isinstance(found, Attempt) else None


def owner_of(task: "asyncio.Task[Any]", running: Iterable[Attempt]) -> Attempt | None:
    """Return the running attempt that a task of the event loop belongs to."""
    return next((attempt for attempt in running if task in attempt.tasks()), None)
