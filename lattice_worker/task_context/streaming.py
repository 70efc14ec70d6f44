"""The streams of a running task: chunks, progress and log records. Tasks use them by `lattice_worker.context`."""

import logging
import math
import sys
from typing import Any

from lattice_worker.runner.invocation.generators import encoded_chunk
from lattice_worker.runner.invocation.output import Output, current

NO_CHUNKS = "the server takes no chunks: it is of an older version, or its `chunk_limit_bytes` is 0"


class StreamError(Exception):
    """A chunk cannot be streamed."""

    __module__ = "lattice_worker.context"


def emit(chunk: Any, *, item: int | None = None) -> None:
    """Stream a chunk of the task's output to its readers. Any thread of the task may stream.

    It waits while the server has not taken earlier chunks. In a coroutine use `emit_async`: this holds up all
    coroutines of the process meanwhile.

    Args:
        chunk: a value that can be pickled.
        item: in a batched function the position of the member that streams; nowhere else.

    Raises:
        StreamError: the server takes no chunks, or `item` is wrong.
        PayloadError: the chunk cannot be pickled, or is too large.
        RuntimeError: there is no task running here.
    """
    output, position = _streaming(item)
    output.chunks.send(position, *encoded_chunk(chunk, output))


async def emit_async(chunk: Any, *, item: int | None = None) -> None:
    """As `emit`, without blocking other coroutines."""
    output, position = _streaming(item)
    await output.chunks.send_async(position, *encoded_chunk(chunk, output))


def progress(done: float, total: float | None = None, *, item: int | None = None) -> None:
    """Say how far the task is, in a unit of its own. It never waits; of many calls a second only some are sent.

    Raises:
        StreamError: an argument is wrong.
        RuntimeError: there is no task running here.
    """
    for what, number in (("done", done), ("total", total)):
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not is_number and not (what == "total" and number is None):
            raise StreamError(f"{what} must be a finite number, not {number!r}")
    output, position = _running(item)
    if output.chunks.limit_bytes:
        output.chunks.progress(position, float(done), None if total is None else float(total))


def cancelled() -> bool:
    """Whether the attempt was cancelled, or is over: for threads of coroutines, which cancelling does not end.

    The process of a function that is no coroutine is killed when it is cancelled. Raises RuntimeError outside a task.
    """
    return _running_output().is_cancelled


def logger() -> logging.Logger:
    """Return a logger whose records are lines of the task's output. Raises RuntimeError outside a task."""
    output = _running_output()
    if output.logger is None:
        # Of no other logger, so that it and its settings end with the attempt.
        output.logger = logging.Logger("lattice.task", logging.INFO)
        handler = _Lines()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        output.logger.addHandler(handler)
    found: logging.Logger = output.logger
    return found


class _Lines(logging.StreamHandler[Any]):
    """Writes to the present `sys.stderr`, which a task may replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def _streaming(item: object) -> tuple[Output, int]:
    output, position = _running(item)
    if not output.chunks.limit_bytes:
        raise StreamError(NO_CHUNKS)
    return output, position


def _running(item: object) -> tuple[Output, int]:
    """Return the invocation that runs here, and the position of the member that streams."""
    output = _running_output()
    header = output.header
    size = len(header["attempts"])
    if header["batched"] and (type(item) is not int or not 0 <= item < size):
        text = f"a batch is several tasks at once: give item=, the position of the one that streams, 0 to {size - 1}"
        raise StreamError(f"{text}, not {item!r}")
    if not header["batched"] and item is not None:
        raise StreamError("item is for batched functions; this task is alone")
    return output, item if isinstance(item, int) else 0


def _running_output() -> Output:
    output = current.get()
    if output is None or output.chunks.is_inherited:
        raise RuntimeError("there is no task running here; this works inside tasks, and not in processes they fork")
    return output
