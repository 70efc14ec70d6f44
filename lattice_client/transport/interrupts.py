"""Owns Ctrl-C while the main thread calls gRPC. Rule: an interrupt leaves no lock of gRPC held.

Python raises KeyboardInterrupt between any two instructions, also inside `threading.Condition`, where gRPC takes and
releases the lock of a channel. The lock would then stay held, and every other thread would wait for it for ever. An
interrupt there is delivered again when the call returns, or a moment later. Code that is then still at the same
instruction is waiting without the lock, and is interrupted.
"""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

AGAIN_S = 0.005
# The functions of `signal` convert each argument and result to an enum, which takes long compared with a call.
_getsignal: Callable[[int], Any] = sys.modules["_signal"].getsignal
_setsignal: Callable[[int, Any], Any] = sys.modules["_signal"].signal
_SIGINT = int(signal.SIGINT)


class _Deferring:
    """A handler of SIGINT that calls another one, or delays the signal."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler
        self._delayed: list[None] = []  # A signal to deliver again; who takes it delivers it.
        self._deferred_at: tuple[int, int] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        at = None if frame is None else (id(frame), frame.f_lasti)
        is_waiting, self._deferred_at = at == self._deferred_at, at
        if frame is not None and frame.f_code.co_filename == threading.__file__ and not is_waiting:
            # Not a `threading.Thread`: starting one takes locks that the interrupted code may hold.
            self._delayed.append(None)
            _thread.start_new_thread(self._deliver_again, ())
            return None
        return self._handler(number, frame)

    def take(self) -> bool:
        """Return whether a signal is to be delivered again; the caller does that."""
        with suppress(IndexError):
            self._delayed.pop()
            return True
        return False

    def _deliver_again(self) -> None:
        time.sleep(AGAIN_S)  # The interrupted code releases or takes its lock within some instructions.
        if self.take():
            _interrupt_main_thread()


def _interrupt_main_thread() -> None:
    main = threading.main_thread().ident
    assert main is not None, "the main thread is running"
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


def calling(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that calls gRPC; return its result. Calls within calls cost little."""
    if threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)
    handler = _getsignal(_SIGINT)
    if not callable(handler) or isinstance(handler, _Deferring):
        return function(*args, **kwargs)
    deferring = _Deferring(handler)
    _setsignal(_SIGINT, deferring)
    try:
        return function(*args, **kwargs)
    finally:
        _setsignal(_SIGINT, handler)
        if deferring.take():
            _interrupt_main_thread()
