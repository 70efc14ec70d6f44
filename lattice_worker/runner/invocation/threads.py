"""Context for the threads that tasks start: their output and their questions are those of the attempt.

Python runs new threads in an empty context (until 3.14, which can copy it). In a runner they run in a copy of the
context of the code that started them, and so does a call submitted to a thread pool, whose threads may serve others.
"""

import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lattice_worker.runner.invocation.output import Output, current
from lattice_worker.runner.surroundings.memory import allow_stack

T = TypeVar("T")


def in_context(output: Output, call: Callable[..., T], *args: Any) -> T:
    """Call something as part of an invocation, in a context of its own."""
    context = contextvars.copy_context()
    context.run(current.set, output)
    return context.run(call, *args)


def inherit_context() -> None:
    """Have threads and thread pools of this process run in the context they were started from."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    @functools.wraps(start)
    def start_here(self: threading.Thread) -> None:
        if current.get() is not None:
            self.run = functools.partial(contextvars.copy_context().run, self.run)  # type: ignore[method-assign]
            allow_stack()
        start(self)

    @functools.wraps(submit)  # type: ignore[arg-type]  # its own type is generic in ways that no wrapper can repeat
    def submit_here(self: ThreadPoolExecutor, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        if current.get() is not None:
            fn = functools.partial(contextvars.copy_context().run, fn)
        return submit(self, fn, *args, **kwargs)

    threading.Thread.start = start_here  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit_here  # type: ignore[assignment, method-assign]
