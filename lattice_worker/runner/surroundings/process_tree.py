"""The descendants of a process, and how they are ended."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

REAP_S = 0.5
MAX_LISTINGS = 20
ANY_CHILD = (os.P_ALL, 0, None, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # For `waitid`: 0 there are children, -1 none.


def end_children() -> None:
    """Kill and reap every process below this one, those whose parents died included: it adopts them."""
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    if tracker is not None:
        # It frees the resources it tracks when it stops, and is started again when it is needed.
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
    found = _listed_children(pid)
    # The kernel leaves a child out when another one, or a thread that had children, ends while it lists them.
    for _ in range(MAX_LISTINGS):
        before, found = found, _listed_children(pid)
        if found == before:
            break
    return found


def _listed_children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # The process ended meanwhile, after its folder was found.
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # A thread that ended meanwhile.
                found += map(int, path.read_text().split())
    return found
