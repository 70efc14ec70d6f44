"""Owns the lock on the folder of a journal. Rule: it goes with the process, however that ends."""

import fcntl
import os
from pathlib import Path

from lattice_server.engine.recording.journal_port import JournalLockedError


def locked(folder: Path) -> int:
    """Lock a folder for this process; return the descriptor that holds the lock. Raises JournalLockedError."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise JournalLockedError(
            f"another server, or a `lattice journal` command, uses the journal in {folder}"
        ) from error
    return descriptor
