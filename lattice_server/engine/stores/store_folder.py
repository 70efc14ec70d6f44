"""Owns the choice of the folder for large values. Rule: a folder without enough room is not chosen."""

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from lattice_server.engine.stores.locked_folders import delete_unlocked, lock

SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY_BYTES = 256 * 1024 * 1024  # With less of it free, as in most containers, values are kept on disk.
PREFIX = "lattice-head-"
SOCKET = "head.sock"
SOCKET_PATH_BYTES = 107  # The longest path Linux takes for a socket.
NEW = "new-"  # Begins the name of a folder that may not be locked yet.
NEW_S = 10.0
DISK = "disk"  # In a store in memory, a link to the folder of values for which that has no room.
MIB = 1024 * 1024

log = logging.getLogger(__name__)


class StoreError(Exception):
    """No folder can hold large values; the message names the folders that were tried and the setting."""


def made(parent: str) -> tuple[Path, int]:
    """Make a folder for large values and return it with the descriptor that locks it.

    It lies in `parent`; when that is empty, in shared memory if enough of it is free, or else where temporary files go.

    Raises:
        StoreError: there is no such folder, or it cannot be written to.
    """
    if parent:
        return _made_in(Path(parent), "choose another `store_folder`")
    _delete_left(SHARED_MEMORY)
    free_bytes, _ = room(SHARED_MEMORY)
    why = f"{SHARED_MEMORY} has {free_bytes // MIB} MiB that can be used, of at least {MIN_SHARED_MEMORY_BYTES // MIB}"
    if free_bytes >= MIN_SHARED_MEMORY_BYTES:
        try:
            return _made_in(SHARED_MEMORY, "a folder on disk is used")
        except StoreError as error:
            why = str(error)
    setting = "set TMPDIR, or `store_folder` in the file that --config names, to a folder that can be written to"
    try:
        on_disk = Path(tempfile.gettempdir())
    except OSError as error:
        raise StoreError(f"there is no folder for large values: {error.strerror}; {setting}") from error
    log.warning("large values are kept in %s: %s", on_disk, why)
    return _made_in(on_disk, setting)


def linked(store: Path) -> tuple[Path, int] | None:
    """Make a folder on disk for values that a store in shared memory has no room for, and link to it from the store.

    Returns it with the descriptor that locks it; None for a store that lies elsewhere, or when there is no such folder.
    """
    if store.parent != SHARED_MEMORY:
        return None
    try:
        parent = Path(tempfile.gettempdir()).resolve()
        _delete_left(parent)
        folder, descriptor = _made_in(parent, "")
    except (OSError, StoreError) as error:
        log.warning("values fail when %s has no room for them: %s", store, error)
        return None
    (store / DISK).symlink_to(folder)
    return folder, descriptor


def remove(path: Path) -> None:
    """Delete a value; one that a store had no room for is a link to its bytes on disk, and both are deleted."""
    with suppress(OSError):
        target = path.readlink()
        if target.parent == (path.parent / DISK).resolve():
            target.unlink()
    path.unlink(missing_ok=True)


def room(folder: Path) -> tuple[int, int]:
    """Return how many bytes are free and how many there are in all where a folder lies; none when it is unusable."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return 0, 0
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def _made_in(parent: Path, remedy: str) -> tuple[Path, int]:
    _delete_left(parent)
    try:
        new = Path(tempfile.mkdtemp(prefix=f"{NEW}{PREFIX}", dir=parent))
        descriptor = lock(new)
    except OSError as error:
        raise StoreError(f"large values cannot be kept in {parent}: {error.strerror}; {remedy}") from error
    folder = parent / new.name.removeprefix(NEW)
    if len(os.fsencode(folder / SOCKET)) > SOCKET_PATH_BYTES:
        new.rmdir()
        os.close(descriptor)
        raise StoreError(f"large values cannot be kept in {parent}: its path is too long for a socket; {remedy}")
    # Only when it is locked: another server would delete it as the folder of a killed one.
    new.rename(folder)
    return folder, descriptor


def _delete_left(parent: Path) -> None:
    """Delete the folders of servers that were killed: they hold memory, and no other process deletes them."""
    delete_unlocked(parent.glob(f"{PREFIX}*"))
    delete_unlocked(parent.glob(f"{NEW}{PREFIX}*"), NEW_S)
