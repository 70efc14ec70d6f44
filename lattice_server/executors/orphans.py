"""Ends what somebody who died left running. Rule: only what carries the mark of the dead, or is of their session.

A worker that is well ends what its tasks started by itself, by descent. When it was killed nobody knows any more who
descended from it, but what its tasks started has inherited the mark. Ray's processes write their names over their
environment, but stay in the session in which they were started.
"""

import contextlib
import os
from collections.abc import Callable

import psutil

MARK = "LATTICE_WORKER_ID"
ROUNDS = 10
ROUND_S = 0.5


def end_leftovers(worker_id: str) -> None:
    """Kill every process with this worker's mark, and what those start meanwhile. Blocks until they are gone."""
    _end(lambda process: process.environ().get(MARK) == worker_id)


def end_session(leader: int) -> None:
    """Kill every process of the session that process `leader` began, but not the caller. Blocks until they are gone."""
    _end(lambda process: os.getsid(process.pid) == leader and process.pid != os.getpid())


def _end(is_left: Callable[[psutil.Process], bool]) -> None:
    for _ in range(ROUNDS):
        found = [process for process in psutil.process_iter() if _is_one(process, is_left)]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=ROUND_S)


def _is_one(process: psutil.Process, is_left: Callable[[psutil.Process], bool]) -> bool:
    try:
        return is_left(process) and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # it ended, or is somebody else's
        return False
