"""Finds folders and processes that outlive the tests which made them. Rule: it looks at one test session's own only.

A session has a temporary folder of its own, which its processes get as TMPDIR. A folder for large values in shared
memory links to its part on disk, which lies in that temporary folder.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
PREFIXES = ("lattice-head-", "lattice-worker-", "lattice-ray-", "lattice-node-", "lattice-containers-")
RUN = "run"  # The folder for the pid files of servers and workers, and for the journals of servers without the flag.
# The folder of a user's Ray, which does not delete its logs, and those of `multiprocessing` in tasks: their processes
# are killed when their worker ends.
OTHERS = ("ray", "pymp-")
GONE_S = 30.0


def held_by(pids: Iterable[int]) -> set[Path]:
    """Return the folders that processes have locked, by their open descriptors."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    found.add(link.readlink())
    return {path for path in found if path.name.startswith(PREFIXES)}


def folders(own: Path) -> set[Path]:
    """Return the folders of all servers and workers of a session."""
    # Each test looks twice, mostly at nothing: `glob` and `resolve` of pathlib would take milliseconds.
    top = os.path.realpath(own)
    in_memory = [SHARED_MEMORY / name for name in os.listdir(SHARED_MEMORY) if name.startswith(PREFIXES)]
    found = {path for path in in_memory if _disk_of(path).startswith(f"{top}{os.sep}")}
    return found | {own / name for name in os.listdir(own) if name.startswith(PREFIXES)}


def _disk_of(folder: Path) -> str:
    """Return the whole path of a folder's part on disk; a text without one for a folder that is deleted meanwhile."""
    try:
        return os.readlink(folder / "disk")
    except OSError:
        return ""


def unlocked(own: Path) -> set[Path]:
    """Return the folders of servers and workers of a session that have ended; each locks its folders while it lives."""
    return {path for path in folders(own) if not _is_locked(path)}


def left(own: Path) -> list[str]:
    """Return the processes and folders that a session leaves. Folders of killed servers are deleted first."""
    processes = [process for process in psutil.process_iter() if _temporary_folder(process) == str(own)]
    found = [f"process {process.pid}: {_command(process)}" for process in psutil.wait_procs(processes, GONE_S)[1]]
    for path in unlocked(own):
        shutil.rmtree(path, ignore_errors=True)
    others = {path for path in own.iterdir() if not path.name.startswith((RUN, *OTHERS))}
    return found + sorted(map(str, others | folders(own)))


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return not folder.exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _temporary_folder(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return "" if process.pid == os.getpid() else str(process.environ().get("TMPDIR", ""))
    return ""


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
