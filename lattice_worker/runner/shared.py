"""The state of a process that coroutines share: what they left changed is put back when none of them runs.

While several run, what one of them changes of the process the others see; only the working directory is put back as
soon as the coroutine has ended that changed it, since it may be gone by then.
"""

import asyncio
import functools
import gc
import locale
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from lattice_worker.runner.attempt import Attempt, here
from lattice_worker.runner.reset import Baseline

_setlocale: Callable[..., str] = sys.modules["_locale"].setlocale


class Shared(Baseline):
    """The state of this process that coroutines find."""

    def __init__(self, running: dict[str, Attempt]) -> None:
        self._running = running
        self._mover: Attempt | None = None
        self._is_mixed = False
        super().__init__()
        self._follow_moves()

    def capture(self) -> None:
        """Take the process as it is now for what coroutines shall find, as soon as only modules have changed it."""
        if len(self._running) > 1:
            # What the modules set up that were just loaded cannot be told from what other coroutines changed.
            self._is_mixed = True
        else:
            self._capture()

    def _capture(self) -> None:
        try:
            os.getcwd()
        except OSError:  # It was removed.
            os.chdir(self._cwd)
        self._is_mixed = False
        super().capture()
        self._inodes = self._inodes_now()
        self._policy = asyncio.get_event_loop_policy()
        self._facts = self._facts_now()

    def end(self, attempt: Attempt) -> None:
        """Leave the directory that an attempt went to which is over."""
        if self._mover is attempt:
            self._mover = None
            os.chdir(self._cwd)

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
        except BaseException as error:
            return f"{type(error).__name__}: what a coroutine changed cannot be put back"
        return ""

    def _is_as_captured(self) -> bool:
        """Whether nothing was changed. Told in the time of a few calls: it is asked after each attempt."""
        return (
            not self._changed_environment()
            and self._facts == self._facts_now()
            and all(one is other for one, other in zip(warnings.filters, self._filters, strict=False))
            and self._inodes == self._inodes_now()
        )

    @staticmethod
    def _facts_now() -> tuple[Any, ...]:
        root = logging.root
        umask = os.umask(0o22)
        os.umask(umask)
        return (
            umask,
            sys.getrecursionlimit(),
            gc.isenabled(),
            _setlocale(locale.LC_ALL),
            id(sys.stdin),
            id(sys.stdout),
            id(sys.stderr),
            id(sys.displayhook),
            id(sys.excepthook),
            id(warnings.showwarning),
            len(warnings.filters),
            root.level,
            root.disabled,
            root.manager.disable,
            list(map(id, root.handlers)),
            list(map(id, root.filters)),
            id(asyncio.get_event_loop_policy()),
        )

    @staticmethod
    def _inodes_now() -> list[int]:
        try:
            return [os.fstat(descriptor).st_ino for descriptor in (1, 2)]
        except OSError:  # Closed.
            return []

    def _follow_moves(self) -> None:
        def followed(move: Callable[[Any], None]) -> Callable[[Any], None]:
            @functools.wraps(move)
            def move_here(path: Any) -> None:
                move(path)
                self._mover = here() or self._mover

            return move_here

        os.chdir, os.fchdir = followed(os.chdir), followed(os.fchdir)  # type: ignore[assignment]
