"""Owns the locks of a server's folders. Rule: a folder that no process has locked belongs to a killed server."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def lock(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed. Raises OSError when another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def delete_unlocked(folders: Iterable[Path], min_age_s: float = 0.0) -> None:
    """Delete the folders of killed servers.

    Folders younger than `min_age_s` stay: their makers may not have locked them yet.
    """
    for folder in folders:
        with suppress(OSError):
            descriptor = lock(folder)
            if not min_age_s or time.time() - folder.stat().st_mtime > min_age_s:
                shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
