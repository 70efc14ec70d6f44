"""Watches files that are read again when they change. Rule: nothing polls, and no file is read half written."""

from collections.abc import AsyncIterator
from pathlib import Path


async def changes(path: Path) -> AsyncIterator[None]:
    """Yield at once, and whenever a file may have been written, replaced, removed, or given other rights.

    The folder is watched, since a replaced file is another file. A write counts when the writer closes the file.
    The iterator ends when the folder is removed. Raises OSError when the folder cannot be watched.
    """
    import asyncinotify  # `lattice start --worker` runs without the packages of the server

    mask = asyncinotify.Mask
    wanted = mask.CLOSE_WRITE | mask.MOVED_TO | mask.MOVED_FROM | mask.DELETE | mask.ATTRIB
    path = path.absolute()
    with asyncinotify.Inotify() as inotify:
        inotify.add_watch(path.parent, wanted)
        # The file may have changed before the watch began.
        yield
        async for event in inotify:
            if mask.IGNORED in event.mask:
                return
            # The target of a link may change with any other name in the folder.
            if event.name is None or event.name.name == path.name or path.is_symlink():
                yield
