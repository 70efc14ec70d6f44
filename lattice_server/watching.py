"""Owns the watching of files that are read again when they change. Rule: nothing polls, and no half is read."""

from collections.abc import AsyncIterator
from pathlib import Path


async def changes(path: Path) -> AsyncIterator[None]:
    """Yield at first, and whenever a file may have changed: written, replaced, removed, or given other rights.

    The folder is watched, since a file that is replaced is another file. A write is seen when the writer closes the
    file. It is over when the folder is gone. Raises OSError when the folder cannot be watched.
    """
    import asyncinotify  # `lattice start --worker` runs without the packages of the server

    mask = asyncinotify.Mask
    wanted = mask.CLOSE_WRITE | mask.MOVED_TO | mask.MOVED_FROM | mask.DELETE | mask.ATTRIB
    path = path.absolute()
    with asyncinotify.Inotify() as inotify:
        inotify.add_watch(path.parent, wanted)
        # What changed before the watch began.
        yield
        async for event in inotify:
            if mask.IGNORED in event.mask:
                return
            # What a link leads to may change with any other name of the folder.
            if event.name is None or event.name.name == path.name or path.is_symlink():
                yield
