"""Makes a process ready for the next task: restores the state that a task changed, and ends its children.

Rule: modules stay imported, with the state they set up when they were loaded; changes that a task made while it ran do
not reach the next one. The list is in docs/tasks.md. Costs microseconds when nothing was changed: each setting is read
once, and compared.
"""

import asyncio.events
import ctypes
import faulthandler
import gc
import locale
import logging
import multiprocessing.context
import operator
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from lattice_worker.runner.surroundings.memory import lift_memory_limit
from lattice_worker.runner.surroundings.process_tree import ANY_CHILD, end_children

SIGNALS = [number for number in range(1, 32) if number not in {signal.SIGKILL, signal.SIGSTOP}]
TIMERS = tuple(map(int, (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)))
SEED_BYTES = 32
# The functions of C modules cost a fraction of their wrappers, which make enum members and exceptions.
_getsignal: Callable[[int], Any] = sys.modules["_signal"].getsignal
_sigmask: Callable[[int, tuple[int, ...]], Any] = sys.modules["_signal"].pthread_sigmask
_setitimer: Callable[[int, float], Any] = sys.modules["_signal"].setitimer
_setlocale: Callable[..., str] = sys.modules["_locale"].setlocale
_libc = ctypes.CDLL(None)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # It was deleted.
        return ""


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def _refuse(before: Any) -> None:
    """A process that gave up privileges cannot take them back."""
    raise PermissionError(f"it cannot become {before!r} again")


# How a setting of this process is read, and set.
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (_working_directory, os.chdir),
    (_umask, os.umask),
    (partial(_setlocale, locale.LC_ALL), partial(_setlocale, locale.LC_ALL)),
    *(
        (partial(resource.getrlimit, kind), partial(resource.setrlimit, kind))
        for kind in (
            resource.RLIMIT_NOFILE,
            resource.RLIMIT_AS,
            resource.RLIMIT_CPU,
            resource.RLIMIT_STACK,
            resource.RLIMIT_FSIZE,
            resource.RLIMIT_NPROC,
            resource.RLIMIT_CORE,
            resource.RLIMIT_MEMLOCK,
        )
    ),
    (partial(os.getpriority, os.PRIO_PROCESS, 0), partial(os.setpriority, os.PRIO_PROCESS, 0)),
    (partial(os.sched_getaffinity, 0), partial(os.sched_setaffinity, 0)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (sys.getswitchinterval, sys.setswitchinterval),
    (sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    (gc.isenabled, lambda collects: gc.enable() if collects else gc.disable()),
    (gc.get_threshold, lambda thresholds: gc.set_threshold(*thresholds)),
    (gc.get_debug, gc.set_debug),
    (socket.getdefaulttimeout, socket.setdefaulttimeout),
    (tracemalloc.is_tracing, lambda traces: None if traces else tracemalloc.stop()),
    (os.getresuid, _refuse),
    (os.getresgid, _refuse),
    (os.getgroups, _refuse),
)
_READERS = tuple(read for read, _ in SETTINGS)

# Names that hold an object of which this process has one.
NAMES: tuple[tuple[Any, str], ...] = (
    *((sys, name) for name in ("stdin", "stdout", "stderr", "displayhook", "excepthook", "unraisablehook")),
    *((sys, name) for name in ("breakpointhook", "path", "argv")),
    (threading, "excepthook"),
    (warnings, "showwarning"),
    (warnings, "filters"),
    (tempfile, "tempdir"),
    (asyncio.events, "_event_loop_policy"),
    (multiprocessing.context._default_context, "_actual_context"),  # the start method
)


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
        """Take the present state as the state that tasks find."""
        self._environ = os.environ
        self._environment = dict(os.environ._data)  # type: ignore[attr-defined]  # as bytes: compared at each task
        self._handlers = list(map(_getsignal, SIGNALS))
        self._settings = [read() for read in _READERS]
        self._objects = [(holder, name, getattr(holder, name)) for holder, name in NAMES]
        self._threads = set(threading.enumerate())
        self._capture_set_up()

    @property
    def cwd(self) -> str:
        """The working directory."""
        return str(self._settings[0])

    def _capture_set_up(self) -> None:
        """Take the present state of all that modules set up when they are imported."""
        root = logging.root
        self._logging = (root.level, root.disabled, root.manager.disable)
        lists: tuple[list[Any], ...] = (sys.path, sys.argv, root.handlers, root.filters)
        self._lists = [(found, list(found)) for found in lists]
        self._filters = list(warnings.filters)
        self._modules = len(sys.modules)

    def quiet(self) -> None:
        """Stop timers, signal handlers and trace functions, which could interrupt Lattice's own code; end children, and
        flush the buffers of C libraries. Never raises."""
        for _ in range(100):  # A handler that was due may raise here, once for each signal.
            try:
                self._quiet()
            except BaseException:
                continue
            break
        if _libc.waitid(*ANY_CHILD) == 0:
            end_children()
        _libc.fflush(None)

    def _quiet(self) -> None:
        sys.settrace(None)
        sys.setprofile(None)
        for timer in TIMERS:
            _setitimer(timer, 0)
        faulthandler.cancel_dump_traceback_later()
        if not same(list(map(_getsignal, SIGNALS)), self._handlers):
            for number, handler in zip(SIGNALS, self._handlers, strict=True):
                if _getsignal(number) is not handler and handler is not None:
                    signal.signal(number, handler)

    def make_ready(self) -> str:
        """Restore the state that tasks find; return why this process can run no other task, nothing when it can."""
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
        """Restore the state that tasks find. Raises an error where that is impossible."""
        for descriptor, saved in enumerate(self._streams):
            os.dup2(saved, descriptor)
        if self._changed_environment():
            self._restore_environment()
        lift_memory_limit()
        _sigmask(signal.SIG_SETMASK, ())
        signal.set_wakeup_fd(-1)
        threading.settrace(None)
        threading.setprofile(None)
        threading.stack_size(0)
        found = [read() for read in _READERS]
        if found != self._settings:
            for (_, put), now, before in zip(SETTINGS, found, self._settings, strict=True):
                if now != before:
                    put(before)
        for holder, name, before in self._objects:
            setattr(holder, name, before)
        policy = asyncio.events._event_loop_policy  # type: ignore[attr-defined]
        if (local := getattr(policy, "_local", None)) is not None:
            vars(local).clear()  # Which loop `asyncio.get_event_loop` finds in this thread.
        if self._modules != len(sys.modules):
            # Whether a module set these up or the task did cannot be told, and the module would not do so again.
            self._capture_set_up()
        self._restore_set_up()
        reseed()

    def _restore_set_up(self) -> None:
        for found, before in self._lists:
            if not same(found, before):
                found[:] = before
        if not same(warnings.filters, self._filters):
            filters: Any = warnings.filters  # A list, whatever its stub says.
            filters[:] = self._filters
            warnings._filters_mutated()  # type: ignore[attr-defined]
        root = logging.root
        level, root.disabled, disable = self._logging
        if root.level != level:
            root.setLevel(level)
        if root.manager.disable != disable:
            logging.disable(disable)

    def _changed_environment(self) -> bool:
        return os.environ is not self._environ or os.environ._data != self._environment  # type: ignore[attr-defined]

    def _restore_environment(self) -> None:
        os.environ = self._environ  # noqa: B003  # the object that wraps the environment, not its content
        wanted = {os.fsdecode(name): os.fsdecode(value) for name, value in self._environment.items()}
        for name in os.environ.keys() - wanted.keys():
            del os.environ[name]
        os.environ.update(wanted)
        time.tzset()  # It reads the environment.


def same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects; comparing them for equality would call the user's methods."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def reseed() -> None:
    """Give the generators that modules share a new seed: a task that seeded them must not decide for the next one."""
    if "random" in sys.modules:
        sys.modules["random"].seed(int.from_bytes(os.urandom(8), "little"))
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        # Given nothing it asks the system for 624 numbers, which takes 200 microseconds.
        numpy_random.seed(list(os.urandom(SEED_BYTES)))
