"""The steps of the event loop that attempts share: each is charged to its attempt, and leaves nothing in the next."""

import asyncio
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from lattice_worker.runner.coroutines.attempt import Attempt, here
from lattice_worker.runner.invocation.output import current

STEP, ALONE = 0, 1  # The marks: whose step runs, and who alone ran since all that was written was read; 0 for none.


def mark_steps(marks: memoryview, loop: asyncio.AbstractEventLoop) -> None:
    """Have each step of the event loop name the invocation it belongs to, and run none of one that was abandoned."""
    run = asyncio.Handle._run

    is_forked = is_traced = False

    def note_fork() -> None:
        nonlocal is_forked
        is_forked = True

    os.register_at_fork(after_in_child=note_fork)

    def wrapped(trace: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(trace)
        def trace_here(function: Any) -> None:
            nonlocal is_traced
            is_traced = is_traced or here() is not None
            trace(function)

        return trace_here

    settrace, setprofile = sys.settrace, sys.setprofile
    sys.settrace, sys.setprofile = wrapped(settrace), wrapped(setprofile)

    def run_marked(self: asyncio.Handle) -> None:
        nonlocal is_traced
        attempt: Attempt | None = self._context.get(current)  # type: ignore[attr-defined]
        if attempt is None or is_forked:
            run(self)
        elif attempt.is_abandoned:
            pass
        elif self._loop is not loop:  # type: ignore[attr-defined]  # One that an attempt runs in a thread of its own.
            run(self)
        else:
            before = marks[STEP]  # None, unless an attempt runs the loop inside of its step, as nest_asyncio does.
            marks[STEP] = attempt.number
            try:
                run(self)
            except (SystemExit, KeyboardInterrupt):
                pass  # The task that raised it has it as its exception; the loop is not to end of it.
            finally:
                if is_traced:  # It would be called, and could raise an error, in the steps of others.
                    is_traced = False
                    for unset in (setprofile, settrace):
                        try:
                            unset(None)
                        except BaseException:  # Raised by the function itself, which is unset by that.
                            continue
                if is_forked:
                    os._exit(0)  # The task came back in both processes. This one would take the other's events.
                marks[STEP] = before

    asyncio.Handle._run = run_marked  # type: ignore[method-assign]
