"""Owns the tracebacks of errors that methods of the client raise. Rule: they have the caller's frames, and one of this.

The frames of the client are in the log, from level `debug` on.
"""

import asyncio
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Any, TypeVar

from lattice_client import errors

log = logging.getLogger(__name__)

C = TypeVar("C", bound=type)
E = TypeVar("E", bound=BaseException)
# The packages whose frames say nothing to a caller.
INNER = frozenset({"lattice_client", "contextlib", "grpc"})
# Modules that have no other frames than those at which a traceback is shortened.
OUTERMOST = frozenset({__name__, "lattice_client.runs.driver"})
# The errors that methods raise on purpose; all frames of other errors stay.
REFUSALS = (errors.LatticeError, TimeoutError)
# Ctrl-C is a cancellation in a coroutine, whose traceback Python shows before that of KeyboardInterrupt.
SHORTENED = (*REFUSALS, asyncio.CancelledError)


def shortened(error: E) -> E:
    """Give an error that is being handled a traceback without the frames of this package; return it."""
    kept, hidden, found = [], set(), error.__traceback__
    while found is not None:
        module = found.tb_frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in INNER:
            hidden.add(module)
        else:
            kept.append(found)
        found = found.tb_next
    if not hidden <= OUTERMOST:
        log.debug("a call failed", exc_info=error)
    outer: TracebackType | None = None
    for one in reversed(kept):
        outer = TracebackType(outer, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return error.with_traceback(outer)


def note_continues(error: BaseException, run_id: str, condition: str = "") -> None:
    """Add a note to an interrupt or a cancellation, which says that the run continues."""
    error.add_note(f"run {str(run_id)!r} continues{condition}; `lattice runs cancel {run_id}` would end it")


@contextmanager
def interruptible(run_id: str, *, is_tied: bool) -> Iterator[None]:
    """Note in a cancellation of a block that the run continues, unless it `is_tied` to its caller."""
    try:
        yield
    except asyncio.CancelledError as error:
        if not is_tied:
            note_continues(error, run_id)
        raise


def shorten(kind: C) -> C:
    """Shorten the tracebacks of the public coroutines and asynchronous generators of a class."""
    for name, method in list(vars(kind).items()):
        if name.startswith("_") and name not in {"__aenter__", "__aexit__"}:
            continue
        if inspect.iscoroutinefunction(method):
            setattr(kind, name, _coroutine(method))
        elif inspect.isasyncgenfunction(method):
            setattr(kind, name, _generator(method))
    return kind


def _coroutine(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except SHORTENED as error:
            raise shortened(error) from error.__cause__

    return called


def _generator(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def iterated(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(method(*args, **kwargs)) as items:
                async for item in items:
                    yield item
        except SHORTENED as error:
            raise shortened(error) from error.__cause__

    return iterated
