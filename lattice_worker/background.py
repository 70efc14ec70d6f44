"""Tasks of the event loop that run beside their caller.

Rule: each has an owner that learns of its failure. `start` tells an owner by a call, and `share` tells the callers that
await the task. Otherwise an exception shows when the task is freed, and the part that it served is dead until then.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

OnFailure = Callable[[BaseException], object]
# The event loop itself refers to tasks only weakly.
_running: set[asyncio.Task[Any]] = set()


def start(work: Coroutine[Any, Any, T], on_failure: OnFailure) -> asyncio.Task[T]:
    """Run a coroutine whose result nothing awaits, and return its task.

    An exception that ends it is logged, and `on_failure` is called with it. A cancellation is one too unless `cancel`
    of the task requested it: a future that the coroutine awaited was cancelled.
    """
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(partial(_end, on_failure))
    return task


def share(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run a coroutine whose result or exception goes to the callers that await its task, which the caller keeps."""
    task = asyncio.get_running_loop().create_task(work)
    # Callers that left are not told, and no other part depends on it.
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task


def only_log(error: BaseException) -> None:
    """Do nothing more: nothing else depends on the task that failed."""


def _end(on_failure: OnFailure, task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if task.cancelled():
        error: BaseException | None = (
            None if task.cancelling() else asyncio.CancelledError("a future that it awaited was cancelled")
        )
    else:
        error = task.exception()
    if error is not None:
        log.error("a background task failed: %s", task.get_coro(), exc_info=error)
        on_failure(error)
