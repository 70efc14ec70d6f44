"""Signal handlers and timers of coroutines: each belongs to the attempt that set it, and ends with it.

Rule: a handler runs in a step of its own attempt. A signal that arrives between two steps, or in a step of another
attempt, is handled in a step that is added for it: a handler that raises would else end the step that it interrupts.
"""

import asyncio
import contextvars
import functools
import signal
from collections.abc import Callable
from typing import Any

from lattice_worker.runner.coroutines.attempt import Attempt, here
from lattice_worker.runner.invocation.output import current

_set_timer, _set_signal, _get_signal = signal.setitimer, signal.signal, signal.getsignal

_armed: dict[int, Attempt] = {}  # By whom each timer was set last.
_changed: dict[int, tuple[Attempt, Any, Any]] = {}  # By signal: last setter, handler, earlier handler.


class _Handler:
    """A handler of an attempt."""

    def __init__(self, loop: asyncio.AbstractEventLoop, attempt: Attempt, call: Callable[..., Any]) -> None:
        self.attempt, self.call = attempt, call
        self._loop = loop
        self._context = contextvars.copy_context()

    def __call__(self, number: int, frame: Any) -> None:
        if here() is self.attempt:
            self.call(number, frame)
        elif not self.attempt.is_abandoned:
            self._loop.call_soon_threadsafe(self.call, number, None, context=self._context)


def keep_apart(loop: asyncio.AbstractEventLoop) -> None:
    """Have what attempts set with `signal` be theirs."""

    @functools.wraps(_set_signal)
    def signal_here(number: int, handler: Any) -> Any:
        attempt = here()
        if attempt is None:
            return _set_signal(number, handler)
        if callable(handler) and not isinstance(handler, _Handler):
            handler = _Handler(loop, attempt, handler)
        before = _set_signal(number, handler)
        _changed[number] = attempt, handler, _changed[number][2] if number in _changed else before
        return _shown(before)

    @functools.wraps(_get_signal)
    def getsignal_here(number: int) -> Any:
        return _shown(_get_signal(number))

    @functools.wraps(_set_timer)
    def setitimer_here(which: int, seconds: float, interval: float = 0.0) -> Any:
        before = _set_timer(which, seconds, interval)
        _note(which, seconds)
        return before

    @functools.wraps(signal.alarm)
    def alarm_here(seconds: int, /) -> int:
        left = alarm(seconds)
        _note(signal.ITIMER_REAL, seconds)
        return left

    alarm = signal.alarm
    signal.signal, signal.getsignal = signal_here, getsignal_here  # type: ignore[assignment]
    signal.setitimer, signal.alarm = setitimer_here, alarm_here


def _shown(handler: Any) -> Any:
    """Return a handler as the attempt knows it that set it."""
    return handler.call if isinstance(handler, _Handler) and handler.attempt is here() else handler


def _note(which: int, seconds: float) -> None:
    attempt = here()
    if attempt is not None and seconds:
        _armed[which] = attempt
    else:
        _armed.pop(which, None)


def end(attempt: Attempt, loop: asyncio.AbstractEventLoop) -> None:
    """Restore the timers and handlers that an attempt set: first the timers, whose signals may end the process."""
    handles: dict[int, asyncio.Handle] = loop._signal_handlers  # type: ignore[attr-defined]
    if not (_armed or _changed or handles):
        return
    for which in [which for which, owner in _armed.items() if owner is attempt]:
        _set_timer(which, 0)
        del _armed[which]
    for number, handle in list(handles.items()):
        if handle._context.get(current) is attempt:  # type: ignore[attr-defined]
            loop.remove_signal_handler(number)
    for number in [number for number, (owner, _, _) in _changed.items() if owner is attempt]:
        _set_signal(number, _changed.pop(number)[2])
