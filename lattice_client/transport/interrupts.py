"""Owns Ctrl-C while gRPC is called from the main thread. Rule: it leaves no lock of gRPC's held.

Python raises KeyboardInterrupt between any two instructions, so also inside `threading.Condition`, where gRPC takes and
releases the lock of a channel. The lock then stays held, and every other thread waits for it for ever. There the
interrupt is delivered again a moment later. Code that is at the same instruction then waits there, with its lock in
order, and is interrupted.
"""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

AGAIN_S = 0.005
# What wraps these makes enum members of each argument and answer, at the cost of a good part of a call.
_getsignal: Callable[[int], Any] = sys.modules["_signal"].getsignal
_setsignal: Callable[[int, Any], Any] = sys.modules["_signal"].signal
_SIGINT = int(signal.SIGINT)


class _Deferring:
    """A handler of SIGINT in the place of another one."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler
        self._deferred_at: tuple[int, int] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        at = None if frame is None else (id(frame), frame.f_lasti)
        is_waiting, self._deferred_at = at == self._deferred_at, at
        if frame is not None and frame.f_code.co_filename == threading.__file__ and not is_waiting:
            # Not a `threading.Thread`: to start one takes locks that the interrupted code may hold.
            _thread.start_new_thread(_interrupt_again, ())
            return None
        return self._handler(number, frame)


def _interrupt_again() -> None:
    time.sleep(AGAIN_S)  # The interrupted code needs some instructions until its lock is in order.
    main = threading.main_thread().ident
    assert main is not None, "it runs"
    signal.pthread_kill(main, signal.SIGINT)


def calling(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that enters gRPC; return its result."""
    if threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)
    handler = _getsignal(_SIGINT)
    if not callable(handler) or isinstance(handler, _Deferring):
        return function(*args, **kwargs)
    _setsignal(_SIGINT, _Deferring(handler))
    try:
        return function(*args, **kwargs)
    finally:
        _setsignal(_SIGINT, handler)
