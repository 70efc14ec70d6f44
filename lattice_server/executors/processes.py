"""Owns the processes that executors start: the command line of a worker, and the end of orphaned processes.

Rule: only processes that carry the mark of a dead worker, or belong to the session of a dead driver, are killed.

A live worker ends the processes of its tasks itself, by descent. After a worker was killed, its descendants can no
longer be found by descent, but they have inherited its mark. Ray's processes overwrite their environment, but stay in
the session in which they were started. A host on another node imports this module, so it imports little.
"""

import contextlib
import os
import sys
from collections.abc import Callable

import psutil

MARK = "LATTICE_WORKER_ID"
ROUNDS = 10
ROUND_S = 0.5


def worker_command(target: str, flags: list[str]) -> list[str]:
    """Return the command line of a worker that dials `target`, for the Python that runs here."""
    return [sys.executable, "-m", "lattice_worker", "--addr", target, *flags]


def token_flags(token: str) -> list[str]:
    """Write a token into a pipe whose reading end a worker inherits; return the flags that name it."""
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as pipe:
        # `MAX_TOKEN` fits into the buffer of a pipe, so this does not block.
        pipe.write(token)
    os.set_inheritable(reading, True)
    return ["--token-fd", str(reading)]


def end_orphans(worker_id: str) -> None:
    """Kill every process with this worker's mark, and the ones they start meanwhile. Blocks until they are gone."""
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
    except (psutil.Error, OSError):  # It ended, or belongs to another user.
        return False
