"""The event loop that attempts share. Rule: an attempt that sets, stops or closes the loop does so for itself only.

Python 3.11 to 3.14 offer no way to give a coroutine a loop of its own on the thread of another one. So this one answers
by the attempt that asks: the context that its code runs in names it.
"""

import asyncio
import contextlib
import contextvars
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

from lattice_worker.runner.coroutines.attempt import Attempt, here, owner_of
from lattice_worker.runner.invocation.called import Call
from lattice_worker.runner.invocation.output import current


class Loop(asyncio.SelectorEventLoop):
    """An event loop that no attempt can stop, and on which each has its own executor, factory and handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts: set[Attempt] = set()
        self.set_task_factory(_create_task)
        self.set_exception_handler(_report)

    def run(self) -> None:
        """Run until the process ends."""
        while True:
            with contextlib.suppress(BaseException):  # Raised between two steps: it belongs to no attempt.
                self.run_forever()

    def stop(self) -> None:
        """Do nothing: other attempts run on this loop too."""

    def close(self) -> None:
        """Do nothing: other attempts run on this loop too."""

    def set_debug(self, enabled: bool) -> None:
        """Do nothing for an attempt: it would slow the others down."""
        if here() is None:
            super().set_debug(enabled)

    # Executors.

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Run a function in a thread; without an executor in one of the attempt's own."""
        if executor is None and (attempt := here()) is not None:
            executor = attempt.pool()
        return super().run_in_executor(executor, func, *args)

    def set_default_executor(self, executor: Executor) -> None:
        """Set the default executor of the attempt."""
        if (attempt := here()) is None:
            super().set_default_executor(executor)  # type: ignore[arg-type]
        elif isinstance(executor, Executor):
            attempt.executor = executor
        else:
            raise TypeError("executor must be ThreadPoolExecutor instance")

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the calls that the attempt has submitted to its default executor; it takes no more."""
        if (attempt := here()) is None:
            await super().shutdown_default_executor()
            return
        pool = attempt.pool()
        done = self.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def wait() -> None:
            pool.shutdown(wait=True)
            self.call_soon_threadsafe(finish)

        threading.Thread(target=wait, daemon=True).start()  # Not in the pool itself: it would wait for its own end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await done

    # Tasks, generators and errors.

    def set_task_factory(self, factory: Any) -> None:
        """Set the task factory of the attempt."""
        if (attempt := here()) is None:
            super().set_task_factory(factory)
        elif factory is None or callable(factory):
            attempt.task_factory = factory
        else:
            raise TypeError("task factory must be a callable or None")

    def get_task_factory(self) -> Any:
        """Return the task factory of the attempt, None for the default."""
        attempt = here()
        return super().get_task_factory() if attempt is None else attempt.task_factory

    def set_exception_handler(self, handler: Any) -> None:
        """Set the handler of errors that no code of the attempt waits for."""
        if (attempt := here()) is None:
            super().set_exception_handler(handler)
        elif handler is None or callable(handler):
            attempt.exception_handler = handler
        else:
            raise TypeError(f"A callable object or None is expected, got {handler!r}")

    def get_exception_handler(self) -> Any:
        """Return the handler of errors that no code of the attempt waits for."""
        attempt = here()
        return super().get_exception_handler() if attempt is None else attempt.exception_handler

    def call_exception_handler(self, context: Any) -> None:
        """Report an error to the attempt that it belongs to; an abandoned one is told nothing."""
        attempt = self._owner(context)
        if attempt is None:
            super().call_exception_handler(context)
        elif not attempt.is_abandoned:
            own = contextvars.copy_context()
            own.run(current.set, attempt)
            own.run(super().call_exception_handler, context)

    def _owner(self, context: dict[str, Any]) -> Attempt | None:
        found: Any = here()
        if (handle := context.get("handle")) is not None:
            found = handle._context.get(current)
        elif isinstance(task := context.get("task", context.get("future")), asyncio.Task):
            # Told where the task is freed, which is in a step of any attempt when it was garbage in a cycle.
            found = owner_of(task, self.attempts) or found
        return found if isinstance(found, Attempt) else None

    def _asyncgen_firstiter_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        super()._asyncgen_firstiter_hook(agen)  # type: ignore[misc]
        if (attempt := here()) is not None:
            if attempt.generators is None:
                attempt.generators = weakref.WeakSet()
            attempt.generators.add(agen)

    async def shutdown_asyncgens(self) -> None:
        """Close the asynchronous generators of the attempt."""
        if (attempt := here()) is None:
            await super().shutdown_asyncgens()
        elif attempt.generators:
            await asyncio.gather(*(agen.aclose() for agen in list(attempt.generators)), return_exceptions=True)


def _create_task(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **settings: Any
) -> "asyncio.Task[Any]":
    """Create a task, and note whose it is. A call of a task may stand in the place of a coroutine."""
    if isinstance(coro, Call):
        coro = coro.waited()
    context: contextvars.Context | None = settings.get("context")
    attempt = current.get() if context is None else context.get(current)
    if not isinstance(attempt, Attempt):
        return asyncio.Task(coro, loop=loop, **settings)
    if attempt.task_factory is None:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **settings)
    else:
        task = attempt.task_factory(loop, coro, **settings)
    attempt.own(task)
    return task


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    attempt = here()
    if attempt is None or attempt.exception_handler is None:
        loop.default_exception_handler(context)
    else:
        attempt.exception_handler(loop, context)


def show_own_tasks(shared: asyncio.AbstractEventLoop) -> None:
    """Have `asyncio.all_tasks` show an attempt its own tasks of the loop that it shares."""
    all_tasks = asyncio.all_tasks

    def all_tasks_here(loop: asyncio.AbstractEventLoop | None = None) -> "set[asyncio.Task[Any]]":
        """Return a set of all tasks for the loop; of the loop that attempts share, those of this attempt."""
        if loop is None:
            loop = asyncio.get_running_loop()
        if loop is not shared:
            return all_tasks(loop)
        attempt = here()
        return set() if attempt is None else {task for task in attempt.tasks() if not task.done()}

    asyncio.all_tasks = asyncio.tasks.all_tasks = all_tasks_here
