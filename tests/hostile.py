"""Functions that disturb or break their process, made from generated plans.

A plan is a list of words: things that are left behind, and last how the function ends. `KINDS` says how an attempt
may end by that last word; an empty kind is success, with the value that `VALUES` has for it.
"""

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

Plan = list[str]


class Odd(Exception):
    """An error each of whose methods fails, by the name of the method."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def _fail(self, name: str) -> None:
        if self.what == name:
            raise SystemExit(7)

    def __str__(self) -> str:
        self._fail("str")
        return "odd"

    def __repr__(self) -> str:
        self._fail("repr")
        return "Odd()"

    def __reduce__(self) -> Any:
        self._fail("reduce")
        return Odd, (self.what,)

    def __getattribute__(self, name: str) -> Any:
        if name == "__notes__":
            self._fail("notes")
            return 7 if self.what == "number" else ["a note"]
        return super().__getattribute__(name)


class Slow(Exception):
    """An error whose text takes a minute to compute."""

    def __str__(self) -> str:
        time.sleep(60)
        return ""


class Value:
    """A value that ends like a function when it is pickled."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __reduce__(self) -> Any:
        return act(self.plan)


def _circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _endless() -> Any:
    while True:
        yield 7


def _short() -> Any:
    yield 7
    return 7


def _locks() -> Any:
    yield 7
    yield threading.Lock()


def _fails() -> Any:
    yield 7
    raise Odd("str")


def _deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


def _group() -> BaseException:
    error: BaseException = ValueError("x")
    for _ in range(30):
        error = BaseExceptionGroup("group", [error, Odd("str")])
    return error


def _loop_of_causes() -> BaseException:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__context__ = two, one
    return one


def _unnamed() -> BaseException:
    class Hidden(type):
        def __getattribute__(cls, name: str) -> Any:
            if name in {"__name__", "__qualname__", "__module__"}:
                raise KeyboardInterrupt
            return super().__getattribute__(name)

    return Hidden("Unnamed", (Exception,), {})()  # type: ignore[no-any-return]


ERRORS: dict[str, Any] = {
    **{f"odd-{name}": lambda name=name: Odd(name) for name in ("str", "repr", "reduce", "notes", "number", "none")},
    "surrogate": lambda: ValueError("cut \ud83d\0\x1b[2J"),
    "huge": lambda: ValueError("x" * 5_000_000),
    "many-notes": lambda: _noted(ValueError("x"), 10_000),
    "unnamed": _unnamed,
    "slow": Slow,
    "group": _group,
    "causes": _loop_of_causes,
    "exit": lambda: SystemExit("\ud83d"),
    "interrupt": KeyboardInterrupt,
    "cancelled": asyncio.CancelledError,
    "generator": GeneratorExit,
    "stop": lambda: StopIteration(5),
    "async-stop": StopAsyncIteration,
    "recursion": RecursionError,
    "pipe": lambda: BrokenPipeError(32, "x"),
    "timeout": TimeoutError,
    "unpicklable": lambda: ValueError(threading.Lock(), lambda: 0),
}


def _noted(error: BaseException, count: int) -> BaseException:
    for number in range(count):
        error.add_note(f"note {number} \ud83d")
    return error


VALUES: dict[str, Any] = {
    "number": 7,
    "nothing": None,
    "text": "é😀\0",
    "bytes": b"\xff",
    "large": "x" * 300_000,
    "nested": {"a": [1, {"b": (2, 3)}], "\ud83d": {4}},
}
UNPICKLABLE: dict[str, Any] = {
    "lock": threading.Lock,
    "frame": sys._getframe,
    "deep": _deep,
    "value-raises": lambda: Value(["odd-str"]),
    "value-exits": lambda: Value(["exit"]),
    "value-is-interrupted": lambda: Value(["interrupt"]),
    "value-is-nothing": lambda: Value(["nothing"]),
}
# A generator is streamed, unless it is inside another value: then it cannot be pickled.
GENERATORS: dict[str, Any] = {
    "generator-object": _endless,
    "generator-ends": _short,
    "generator-locks": _locks,
    "generator-fails": _fails,
}


def _close_all() -> None:
    os.closerange(3, 200)
    time.sleep(60)


def _exit_in_thread() -> None:
    threading.Thread(target=os._exit, args=(5,)).start()
    time.sleep(60)


# Ways out that are the end of a process.
DEATHS: dict[str, Any] = {
    "_exit": lambda: os._exit(0),
    "_exit-3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exec": lambda: os.execvp("sleep", ["sleep", "600"]),
    "closes": _close_all,
    "thread-exits": _exit_in_thread,
    "value-dies": lambda: Value(["kill"]),
}


def _forked() -> None:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)


def _orphan() -> None:
    subprocess.Popen(["setsid", "sh", "-c", "sleep 600 & sleep 600"], close_fds=False)


def _write_bytes() -> None:
    with contextlib.suppress(OSError):
        os.write(1, b"\xff\xfe\x00" * 1000)


def _close_streams() -> None:
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    sys.stdout = sys.stderr = None


# Disturbances. None of them changes how the function ends, or the outcome of another task.
LEFT: dict[str, Any] = {
    "chdir": lambda: os.chdir("/"),
    "environment": os.environ.clear,
    "umask": lambda: os.umask(0o777),
    "handlers": lambda: [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)],
    "blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)),
    "child": _forked,
    "orphan": _orphan,
    "silence": _close_streams,
    "print": lambda: print("\ud83d\0\r", "x" * 70_000, end=""),
    "raw": _write_bytes,
    "daemon": lambda: threading.Thread(target=time.sleep, args=(600,), daemon=True).start(),
    "thread": lambda: threading.Thread(target=time.sleep, args=(600,)).start(),
    "seed": lambda: random.seed(5),
    "no-gc": gc.disable,
    "warnings": lambda: warnings.simplefilter("error"),
    "trace": lambda: sys.settrace(lambda *_: None),
    "main": lambda: sys.modules.update(__main__=type(sys)("__main__")),
    "hooks": lambda: (setattr(sys, "excepthook", os.abort), setattr(threading, "excepthook", os.abort)),
    "interval": lambda: signal.setitimer(signal.ITIMER_REAL, 30),
}

FAILED, PAYLOAD, CRASHED, TIMEOUT = "USER_ERROR", "PAYLOAD", "CRASHED", "TIMEOUT"
KINDS: dict[str, set[str]] = {
    **{word: {FAILED} for word in ERRORS},
    **{word: {""} for word in VALUES},
    **{word: {PAYLOAD} for word in UNPICKLABLE},
    **{word: {CRASHED} for word in DEATHS},
    "generator-object": {TIMEOUT},
    "generator-ends": {""},
    "generator-locks": {PAYLOAD},
    "generator-fails": {FAILED},
    "circle": {""},
    "memory": {"OUT_OF_MEMORY"},
    "never": {TIMEOUT},
    "fork-returns": {"", CRASHED},
    # Which of these depends on the descriptors that the garbage reaches.
    "garbage": {"INTERNAL", CRASHED, ""},
}
# A coroutine that does not give up the event loop runs out of time, and with it all others.
BLOCKING = {"never", "closes", "slow", "thread-exits"}
KINDS_ASYNC = KINDS | {word: {*KINDS[word], TIMEOUT, CRASHED} for word in BLOCKING}
# The functions of these forms return a list of what `act` returns.
KINDS_IN_LIST = KINDS | {word: {PAYLOAD} for word in GENERATORS}
KINDS_OF_FORM = {"process": KINDS, "async": KINDS_ASYNC, "batch": KINDS_IN_LIST, "map": KINDS_IN_LIST}


def act(plan: Plan) -> Any:
    """Carry out a plan."""
    *left, end = plan
    for word in left:
        LEFT[word]()
    if end in VALUES:
        return VALUES[end]
    if end in UNPICKLABLE:
        return UNPICKLABLE[end]()
    if end in GENERATORS:
        return GENERATORS[end]()
    if end in DEATHS:
        return DEATHS[end]()
    match end:
        case "circle":
            return _circle()
        case "memory":
            raise MemoryError
        case "never":
            time.sleep(600)
        case "fork-returns":
            os.fork()
            return 7
        case "garbage":
            for descriptor in range(3, 30):
                with contextlib.suppress(OSError):
                    os.write(descriptor, random.randbytes(50))
            return 7
    raise ERRORS[end]()


async def act_async(plan: Plan) -> Any:
    """Do it in a coroutine."""
    await asyncio.sleep(0)
    return act(plan)


def act_each(plan: list[Plan]) -> list[Any]:
    """Do it for each member of a batch."""
    return [act(member) for member in plan]


def act_twice(plan: Plan) -> list[Any]:
    """Do it, for an output that others are mapped over."""
    return [act(plan)] * 2


def plan_of(choice: random.Random) -> Plan:
    """Return a plan."""
    return [*choice.sample(sorted(LEFT), choice.choice([0, 0, 1, 2, 4])), choice.choice(sorted(KINDS))]


def is_expected(plan: Plan, kind: str, value: Any, form: str = "process") -> bool:
    """Whether an attempt may end with this kind of failure, or, for no kind, with this value."""
    if kind not in KINDS_OF_FORM[form][plan[-1]]:
        return False
    return bool(kind) or plan[-1] == "circle" or value == VALUES.get(plan[-1], 7)
