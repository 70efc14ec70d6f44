"""The state of a process that coroutines share: changes they left are undone when none of them runs.

While several run, each sees the changes of the others. Only the working directory is restored as soon as the coroutine
that changed it has ended, since the directory may be deleted by then.
"""

import asyncio
import functools
import gc
import locale
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from lattice_worker.runner.coroutines.attempt import Attempt, here
from lattice_worker.runner.surroundings.reset import Baseline, same


class Shared(Baseline):
    """The state of this process that coroutines find."""

    def __init__(self, running: dict[str, Attempt]) -> None:
        self._running = running
        self._mover: Attempt | None = None
        self.is_changed = False  # Set by others too that find something changed.
        self._is_mixed = False
        super().__init__()
        self._wrap_moves()
        # These cannot be asked as cheaply as they can be wrapped.
        os.umask = self._noting(os.umask)
        locale.setlocale = self._noting(locale.setlocale)
        signal.pthread_sigmask = self._noting(signal.pthread_sigmask)
        resource.setrlimit = self._noting(resource.setrlimit)

    def capture(self) -> None:
        """Take the process as it is now for what coroutines shall find, as soon as only modules have changed it."""
        if len(self._running) > 1:
            # Changes by the modules just loaded cannot be told from changes by other coroutines.
            self._is_mixed = True
        else:
            self._capture()

    def _capture(self) -> None:
        try:
            os.getcwd()
        except OSError:  # It was removed.
            os.chdir(self.cwd)
        self._is_mixed = False
        super().capture()
        self.is_changed = False
        self._policy = asyncio.get_event_loop_policy()
        self._facts = self._facts_now()

    def end(self, attempt: Attempt) -> None:
        """Leave the directory that an attempt went to which is over."""
        if self._mover is attempt:
            self._mover = None
            os.chdir(self.cwd)

    def put_back(self) -> str:
        """Put back what coroutines changed, when none runs; return why that is impossible, nothing when it is not."""
        try:
            if self._is_mixed:
                self._capture()
            elif not self._is_as_captured():
                if self._modules != len(sys.modules):
                    # Modules were imported, which may have changed the environment, and would not change it again.
                    self._environ, self._environment = os.environ, dict(os.environ._data)  # type: ignore[attr-defined]
                self._restore()
                asyncio.set_event_loop_policy(self._policy)
                self.is_changed = False
        except BaseException as error:
            return f"{type(error).__name__}: what a coroutine changed cannot be put back"
        return ""

    def _is_as_captured(self) -> bool:
        """Whether nothing was changed. Told in the time of a few calls: it is asked after each attempt."""
        root = logging.root
        return not (
            self.is_changed
            or self._facts != self._facts_now()
            or (root.level, root.disabled, root.manager.disable) != self._logging
            or not same(warnings.filters, self._filters)
            or not all(same(found, before) for found, before in self._lists)
            or self._changed_environment()
        )

    @staticmethod
    def _facts_now() -> list[Any]:
        return [
            sys.getrecursionlimit(),
            gc.isenabled(),
            id(sys.stdin),
            id(sys.stdout),
            id(sys.stderr),
            id(warnings.showwarning),
            id(asyncio.get_event_loop_policy()),
        ]

    def _noting(self, change: Callable[..., Any]) -> Any:
        @functools.wraps(change)
        def change_here(*args: Any, **settings: Any) -> Any:
            self.is_changed = True
            return change(*args, **settings)

        return change_here

    def _wrap_moves(self) -> None:
        def wrapped(move: Callable[[Any], None]) -> Callable[[Any], None]:
            @functools.wraps(move)
            def move_here(path: Any) -> None:
                move(path)
                self._mover = here() or self._mover

            return move_here

        os.chdir, os.fchdir = wrapped(os.chdir), wrapped(os.fchdir)  # type: ignore[assignment]
