"""Files of dropped values that are written again: pages that exist already cost a fraction of new ones.

Rule: a file is written again only when no other process has it open or maps it. The kernel tells, by granting a write
lease. A reader makes sure that the file which it opened still has the name by which it looked it up: a file that it
looked up before it was dropped, and opened after it was granted, is no longer its value.

The worker and the server put files into the folder, in stores in memory only; see `SpareKeeper`.
"""

import contextlib
import fcntl
import io
import os
import signal
from typing import BinaryIO

SPARES = "spares"
MIN_SPARE_BYTES = 1024 * 1024


def is_unused(descriptor: int) -> bool:
    """Whether no other open file and no mapping is of the file that is open here; False where the kernel cannot tell.

    The file must be in tmpfs: overlayfs does not count mappings whose file was closed.
    """
    try:
        # A reader that opens the file meanwhile breaks the lease: the signal for that, by default, ends a process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True


def claimed(path: str, spares: str, size: int) -> io.FileIO | None:
    """Move a spare that suits a value of `size` bytes to `path`, and return it to be written to; None without one."""
    for spare in os.scandir(spares) if size >= MIN_SPARE_BYTES else ():
        try:
            if not size // 2 <= spare.stat(follow_symlinks=False).st_size <= size * 2:
                continue
            # One writer gets it, and no other process knows its new name.
            os.rename(spare.path, path)
        except FileNotFoundError:  # Another writer took it, or it was deleted.
            continue
        file = io.FileIO(path, "r+")
        if is_unused(file.fileno()):
            return file
        file.close()
        os.unlink(path)
    return None


def delete_spares(spares: str) -> bool:
    """Delete all spares, to make room; return whether there were any."""
    has_deleted = False
    with contextlib.suppress(FileNotFoundError):  # There is no folder, or no longer.
        for spare in os.scandir(spares):
            with contextlib.suppress(FileNotFoundError):  # A writer took it.
                os.unlink(spare.path)
                has_deleted = True
    return has_deleted


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a value for reading. Raises FileNotFoundError."""
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(open(path, "rb"))
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError(f"{os.fspath(path)} was dropped")
        undo.pop_all()
        return file
