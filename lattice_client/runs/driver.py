"""Owns running the coroutines of the asyncio client over calls that block. Rule: no other thread and no loop is used.

Over a `BlockingChannel` a coroutine never suspends: it runs to its end in the thread of the caller.
"""

import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from lattice_client import errors
from lattice_client.runs.api import RunApi
from lattice_client.runs.ids import RunId
from lattice_client.runs.tracebacks import REFUSALS, note_continues, shortened
from lattice_client.transport import forks
from lattice_client.transport.interrupts import calling
from lattice_client.transport.requests import check_wait

T = TypeVar("T")
_END = object()


def blocking(coroutine: Coroutine[Any, Any, T], run_id: str = "") -> T:
    """Run a coroutine over a `BlockingChannel`; return its result. Raises ClientClosedError, ForkError.

    With a `run_id`, KeyboardInterrupt has a note that the run continues, unless the run ends with its caller. An error
    of this package has no frames of the coroutine in its traceback; they are in the log, from level `debug` on.
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
        if run_id and not (isinstance(run_id, RunId) and run_id.ends_with_caller):
            note_continues(error, run_id)
        raise error.with_traceback(None) from None
    except REFUSALS as error:
        raise shortened(error) from error.__cause__
    finally:
        coroutine.close()
    raise AssertionError("a call that blocks never suspends")


def iterate(api: RunApi, source: AsyncIterator[T], run_id: str, timeout: float | None) -> Iterator[T]:
    """Yield the items of an asynchronous iterator over a `BlockingChannel`. Raises TimeoutError, TypeError."""
    iterator = aiter(source)
    channel = api.channel
    check_wait(timeout)
    ends_at = None if timeout is None else channel.now() + timeout

    async def step() -> Any:
        left_s = None if ends_at is None else ends_at - channel.now()
        async with api.reader.limited(run_id, left_s, allowed_s=timeout):
            return await anext(iterator, _END)

    while (item := blocking(step(), run_id)) is not _END:
        yield item
