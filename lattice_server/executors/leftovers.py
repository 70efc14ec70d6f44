"""Ends what the tasks of a worker that died left running. Rule: only what carries that worker's id in its environment.

A worker that is well ends them itself, by descent. When it was killed nobody knows any more who descended from it, but
what its tasks started has inherited the mark.
"""

import contextlib

import psutil

MARK = "LATTICE_WORKER_ID"
ROUNDS = 10
ROUND_S = 0.5


def end_leftovers(worker_id: str) -> None:
    """Kill every process with this worker's mark, and what those start meanwhile. Blocks until they are gone."""
    for _ in range(ROUNDS):
        found = [process for process in psutil.process_iter() if _is_of(process, worker_id)]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=ROUND_S)


def _is_of(process: psutil.Process, worker_id: str) -> bool:
    try:
        return process.environ().get(MARK) == worker_id
    except (psutil.Error, OSError):  # it ended, or is somebody else's
        return False
