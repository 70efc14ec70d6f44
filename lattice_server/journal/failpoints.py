"""Owns the named points at which a test kills the process or fails a call. Rule: without a test they do nothing.

`LATTICE_FAILPOINTS` has one or more of `NAME=ACTION` or `NAME=ACTION@N`, separated by commas: the action is done the
N-th time the point is reached. Actions are `kill` (SIGKILL to the own process), `error` (an OSError with EIO) and
`full` (one with ENOSPC).
"""

import errno
import os
import signal
from collections import Counter

VARIABLE = "LATTICE_FAILPOINTS"
NAMES = frozenset(
    {
        "file.before_write",
        "file.before_sync",
        "file.before_rename",
        "file.after_rename",
        "file.before_unlink",
        "file.after_unlink",
        "commit.before_begin",
        "commit.before_commit",
        "commit.after_commit",
        "commit.after_acknowledge",
        "chores.before_delete",
        "chores.after_delete",
        "chores.before_checkpoint",
        "chores.after_checkpoint",
        "chores.before_vacuum",
        "chores.before_sweep",
        "open.before_migrate",
        "open.before_migrated",
        "open.before_epoch",
        "open.after_epoch",
        "close.before",
    }
)
ERRORS = {"error": errno.EIO, "full": errno.ENOSPC}
ACTIONS = frozenset({"kill", *ERRORS})


class Failpoints:
    """The action of each point, and how often each point was reached while any action was set."""

    def __init__(self, settings: str = "") -> None:
        self.is_active = False
        self.reached: Counter[str] = Counter()
        self._actions: dict[str, tuple[str, int]] = {}
        self.set(settings)

    def set(self, settings: str, *, counts: bool = False) -> None:
        """Replace all actions; with `counts` points are counted also when no action is set. Raises ValueError."""
        self._actions = {}
        for setting in filter(None, settings.split(",")):
            name, _, rest = setting.partition("=")
            action, _, number = rest.partition("@")
            if name not in NAMES or action not in ACTIONS:
                raise ValueError(f"{VARIABLE}: there is no failpoint {name!r} or no action {action!r}")
            self._actions[name] = action, int(number or 1)
        self.reached.clear()
        self.is_active = counts or bool(self._actions)

    def reach(self, name: str) -> None:
        """Do the action of a point. Raises OSError."""
        assert name in NAMES, name
        self.reached[name] += 1
        action, number = self._actions.get(name, ("", 0))
        if self.reached[name] != number:
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]))


FAILPOINTS = Failpoints(os.environ.get(VARIABLE, ""))


def failpoint(name: str) -> None:
    """Mark a border of an effect."""
    if FAILPOINTS.is_active:
        FAILPOINTS.reach(name)
