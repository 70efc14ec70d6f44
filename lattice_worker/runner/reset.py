"""Making a process ready for the next task: what a task changed of the process is put back, what it left behind ends.

Rule: modules stay imported, and what they set up when they were loaded stays; what a task changed while it ran does not
reach the next one. The list is in docs/tasks.md. Costs microseconds when nothing was changed, so each check here
compares one cheap fact.
"""

import contextlib
import ctypes
import gc
import locale
import logging
import operator
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SIGNALS = [number for number in range(1, 32) if number not in {signal.SIGKILL, signal.SIGSTOP}]
TIMERS = tuple(map(int, (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)))
LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_CPU)
REAP_S = 0.5
SEED_BYTES = 32
# These tell at a fraction of the cost of what wraps them, which makes enum members and exceptions of each answer.
_getsignal: Callable[[int], Any] = sys.modules["_signal"].getsignal
_sigmask: Callable[[int, tuple[int, ...]], Any] = sys.modules["_signal"].pthread_sigmask
_setitimer: Callable[[int, float], Any] = sys.modules["_signal"].setitimer
_setlocale: Callable[..., str] = sys.modules["_locale"].setlocale
_libc = ctypes.CDLL(None)
_ANY_CHILD = (os.P_ALL, 0, None, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # Zero: there are children, -1: none.


class Baseline:
    """The state of this process that tasks find."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.main: ModuleType = sys.modules["__main__"]
        # Above the descriptors that programs count on; not inherited.
        self._streams = [os.dup(descriptor) for descriptor in range(3)]
        self._handlers: list[Any] = []
        self.capture()

    def capture(self) -> None:
        """Take the process as it is now for what tasks shall find."""
        self._cwd = os.getcwd()
        self._environ = os.environ
        self._environment = dict(os.environ._data)  # type: ignore[attr-defined]  # as bytes: compared at each task
        self._umask = os.umask(0o22)
        os.umask(self._umask)
        self._handlers = list(map(_getsignal, SIGNALS))
        self._objects = (sys.stdin, sys.stdout, sys.stderr, sys.displayhook, sys.excepthook)
        self._filters = list(warnings.filters)
        self._showwarning = warnings.showwarning
        self._recursion_limit = sys.getrecursionlimit()
        self._locale = _setlocale(locale.LC_ALL)
        root = logging.root
        self._logging = (root.level, list(root.handlers), list(root.filters), root.disabled, root.manager.disable)
        self._limits = [resource.getrlimit(number) for number in LIMITS]
        self._collects = gc.isenabled()
        self._threads = set(threading.enumerate())
        self._modules = len(sys.modules)

    def quiet(self) -> None:
        """Stop what could interrupt this process's own code: timers, signal handlers, trace functions; end children,
        and write out what C libraries hold back. Never raises."""
        for _ in range(100):  # A handler that was due may raise here, once for each signal.
            try:
                self._quiet()
            except BaseException:
                continue
            break
        if _libc.waitid(*_ANY_CHILD) == 0:
            end_children()
        _libc.fflush(None)

    def _quiet(self) -> None:
        sys.settrace(None)
        sys.setprofile(None)
        for timer in TIMERS:
            _setitimer(timer, 0)
        if not _same(list(map(_getsignal, SIGNALS)), self._handlers):
            for number, handler in zip(SIGNALS, self._handlers, strict=True):
                if _getsignal(number) is not handler and handler is not None:
                    signal.signal(number, handler)

    def make_ready(self) -> str:
        """Put back what the task changed; return why this process can run no other task, nothing when it can."""
        if reason := self._unfit():
            return reason
        try:
            self._restore()
        except BaseException as error:
            return f"{type(error).__name__}: what the task changed cannot be put back"
        return ""

    def _unfit(self) -> str:
        if sys.modules.get("__main__") is not self.main:
            return "the module __main__ was replaced"
        for thread in threading.enumerate():
            if not thread.daemon and thread not in self._threads:
                return f"thread {thread.name!r} is still running"
        if self._modules != len(sys.modules) and self._changed_environment():
            # Whether the modules or the task changed it cannot be told, and the modules would not change it again.
            return "modules were imported while the environment was changed"
        return ""

    def _restore(self) -> None:
        """Put back what the task changed. Raises an error where that is impossible."""
        for descriptor, saved in enumerate(self._streams):
            os.dup2(saved, descriptor)
        if _working_directory() != self._cwd:
            os.chdir(self._cwd)
        if self._changed_environment():
            self._restore_environment()
        os.umask(self._umask)
        _sigmask(signal.SIG_SETMASK, ())
        sys.stdin, sys.stdout, sys.stderr, sys.displayhook, sys.excepthook = self._objects
        threading.settrace(None)
        threading.setprofile(None)
        if not _same(warnings.filters, self._filters):
            filters: Any = warnings.filters  # A list, whatever its stub says.
            filters[:] = self._filters
            warnings._filters_mutated()  # type: ignore[attr-defined]
        warnings.showwarning = self._showwarning
        if sys.getrecursionlimit() != self._recursion_limit:
            sys.setrecursionlimit(self._recursion_limit)
        if _setlocale(locale.LC_ALL) != self._locale:
            _setlocale(locale.LC_ALL, self._locale)
        self._restore_logging()
        for number, limits in zip(LIMITS, self._limits, strict=True):
            if resource.getrlimit(number) != limits:
                resource.setrlimit(number, limits)
        if gc.isenabled() != self._collects:
            (gc.enable if self._collects else gc.disable)()
        self._modules = len(sys.modules)
        reseed()

    def _changed_environment(self) -> bool:
        return os.environ is not self._environ or os.environ._data != self._environment  # type: ignore[attr-defined]

    def _restore_environment(self) -> None:
        os.environ = self._environ  # noqa: B003  # the object that wraps the environment, not its content
        wanted = {os.fsdecode(name): os.fsdecode(value) for name, value in self._environment.items()}
        for name in os.environ.keys() - wanted.keys():
            del os.environ[name]
        os.environ.update(wanted)

    def _restore_logging(self) -> None:
        root = logging.root
        level, handlers, filters, disabled, disable = self._logging
        if not _same(root.handlers, handlers):
            root.handlers[:] = handlers
        if not _same(root.filters, filters):
            root.filters[:] = filters
        if root.level != level:
            root.setLevel(level)
        root.disabled = disabled
        if root.manager.disable != disable:
            logging.disable(disable)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects; comparing them for equality would call the user's methods."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # It was deleted.
        return ""


def reseed() -> None:
    """Give the generators that modules share a new seed: a task that seeded them must not decide for the next one."""
    if "random" in sys.modules:
        sys.modules["random"].seed(int.from_bytes(os.urandom(8), "little"))
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        # Given nothing it asks the system for 624 numbers, which takes 200 microseconds.
        numpy_random.seed(list(os.urandom(SEED_BYTES)))


def end_children() -> None:
    """Kill and reap every process below this one, those whose parents died included: it adopts them."""
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    if tracker is not None:
        # Told to stop, it frees what it tracks, and is started anew without a warning when it is needed.
        with contextlib.suppress(Exception):
            tracker._resource_tracker._stop()
    deadline = time.monotonic() + REAP_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            for pid in children_of(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants. Those it starts meanwhile come to this process, which adopts them."""
    for child in children_of(pid):
        kill_tree(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # A thread that ended meanwhile.
            found += map(int, path.read_text().split())
    return found
