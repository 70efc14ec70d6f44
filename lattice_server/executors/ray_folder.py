"""Owns the folder in which a Ray of this server keeps its sockets, logs and records.

Rule: none of them lies where the user's own Ray keeps its own, and none is left when the server ends.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lattice_server.engine.stores.locked_folders import delete_unlocked, lock

PREFIX = "lattice-ray-"
# Ray adds `session_DATE_TIME_PID/sockets/plasma_store`; the path of a socket has at most 107 bytes.
MAX_PARENT_BYTES = 22
MIN_FREE_BYTES = 64 * 1024 * 1024
# How long after its creation a folder may be unlocked.
NEW_S = 10.0
LOG = "driver.log"


class RayFolder:
    """A folder that is locked until it is closed. Raises OSError when no place is suitable."""

    def __init__(self) -> None:
        self.path = _make()
        self._lock = lock(self.path)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _make() -> Path:
    tried = []
    for parent in _parents():
        why = _unfit(parent)
        if not why:
            delete_unlocked(Path(parent).glob(f"{PREFIX}*"), NEW_S)
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
