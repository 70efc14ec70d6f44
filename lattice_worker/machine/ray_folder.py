"""The folder in which this machine's Ray node keeps its sockets, logs and records.

Rule: none of them lies where the user's own Ray keeps its own, and none is left when the node ends.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = "lattice-node-"
# Ray adds `session_DATE_TIME_PID/sockets/plasma_store`; the path of a socket has at most 107 bytes.
MAX_PARENT_BYTES = 21
MIN_FREE_BYTES = 64 * 1024 * 1024
# How long a folder may be there before its maker holds it.
NEW_S = 10.0
LOG = "ray.log"


class RayFolder:
    """A folder of its own, held until it is closed. Raises OSError when no place is fit for one."""

    def __init__(self) -> None:
        self.path = _make()
        self._lock = _lock(self.path)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _make() -> Path:
    tried = []
    for parent in _parents():
        why = _unfit(parent)
        if not why:
            _delete_left(parent)
            try:
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            except OSError as error:
                why = error.strerror or str(error)
        tried.append(f"{parent}: {why}")
    raise OSError(f"there is no folder for Ray's files, such as a TMPDIR with a short name ({'; '.join(tried)})")


def _parents() -> Iterator[str]:
    """Yield where temporary files may lie, the user's choice first."""
    seen = set()
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if parent not in seen:
            seen.add(parent)
            yield parent


def _unfit(parent: str) -> str:
    """Return why Ray cannot use a folder below `parent`; nothing when it can."""
    if not parent.isascii():
        return "its name is not ASCII"
    if len(parent) > MAX_PARENT_BYTES:
        return "its name is too long for sockets"
    try:
        free_bytes = shutil.disk_usage(parent).free
    except OSError as error:
        return error.strerror or str(error)
    return "" if free_bytes >= MIN_FREE_BYTES else f"only {free_bytes} bytes are free"


def _lock(path: Path) -> int:
    """Hold a folder until the descriptor returned is closed. Raises OSError when another process does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _delete_left(parent: str) -> None:
    """Delete the folders of servers that were killed."""
    for left in Path(parent).glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = _lock(left)
            if time.time() - left.stat().st_mtime > NEW_S:
                shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
