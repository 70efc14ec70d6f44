"""Owns running the coroutines of the asyncio client over calls that block. Rule: no other thread and no loop is used.

Over a `BlockingChannel` a coroutine never suspends: it runs to its end in the thread of the caller.
"""

import logging
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar

from lattice_client import errors
from lattice_client.runs.api import RunApi
from lattice_client.transport import forks
from lattice_client.transport.interrupts import calling

log = logging.getLogger(__name__)

T = TypeVar("T")
_END = object()
# The packages whose frames say nothing to a caller.
INNER = frozenset({"lattice_client", "contextlib", "grpc"})


def blocking(coroutine: Coroutine[Any, Any, T], run_id: str = "") -> T:
    """Run a coroutine over a `BlockingChannel`; return its result. Raises ClientClosedError, ForkError.

    With a `run_id`, KeyboardInterrupt has a note that the run continues. An error of this package has no frames of the
    coroutine in its traceback; they are in the log, from level `debug` on.
    """
    try:
        forks.check_process()
        if sys.is_finalizing():
            # Modules that gRPC needs may be unloaded by now.
            raise errors.ClientClosedError("the interpreter is shutting down: no call can be made any more")
        # Once for all calls of gRPC within it.
        calling(coroutine.send, None)
    except StopIteration as done:
        found: T = done.value
        return found
    except KeyboardInterrupt as error:
        if run_id:
            error.add_note(f"run {str(run_id)!r} continues; `lattice runs cancel {run_id}` would end it")
        raise error.with_traceback(None) from None
    except (errors.LatticeError, TimeoutError) as error:
        log.debug("a call failed", exc_info=True)
        raise error.with_traceback(_outer(error.__traceback__)) from error.__cause__
    finally:
        coroutine.close()
    raise AssertionError("a call that blocks never suspends")


def _outer(found: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this package: with those of the user's functions that it called."""
    kept = []
    while found is not None:
        if found.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in INNER:
            kept.append(found)
        found = found.tb_next
    outer: TracebackType | None = None
    for one in reversed(kept):
        outer = TracebackType(outer, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return outer


def iterate(api: RunApi, source: AsyncIterator[T], run_id: str, timeout: float | None) -> Iterator[T]:
    """Yield the items of an asynchronous iterator over a `BlockingChannel`. Raises TimeoutError."""
    iterator = aiter(source)
    channel = api.channel
    ends_at = None if timeout is None else channel.now() + timeout

    async def step() -> Any:
        left_s = None if ends_at is None else ends_at - channel.now()
        async with api.reader.limited(run_id, left_s, allowed_s=timeout):
            return await anext(iterator, _END)

    while (item := blocking(step(), run_id)) is not _END:
        yield item
