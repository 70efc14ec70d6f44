"""The bundles of modules, unpacked in a folder that the workers of a machine share.

Rule: a bundle appears whole, and is deleted by the last worker that has it, when no process imports from it any more.

A worker holds a shared lock on the folder of each bundle that it has. To forget a bundle it releases its lock, and
deletes the folder if no other worker has locked it. A worker that is killed loses its locks; the next worker that
starts deletes its bundles.
"""

import asyncio
import errno
import fcntl
import os
import shutil
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from lattice.v1 import task_pb2

from lattice_worker import background
from lattice_worker.runner.encoding.spare_files import SPARES, delete_spares

FOLDER = "bundles"
NEW_S = 10.0
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Bundles:
    """The bundles that one worker has, by digest. `retired` are the paths of those it is to forget."""

    def __init__(self, store_directory: str) -> None:
        self._folder = Path(store_directory) / FOLDER
        self._unpacking: dict[str, asyncio.Task[int]] = {}
        self._starting: Counter[str] = Counter()
        self._dropping: set[asyncio.Task[None]] = set()
        self.retired: dict[str, str] = {}

    def sweep(self) -> None:
        """Delete the bundles that no worker has: those of workers that were killed."""
        with suppress(FileNotFoundError):
            for left in self._folder.iterdir():
                # A worker makes a folder before it can lock it.
                if "-" not in left.name or time.time() - left.stat().st_mtime > NEW_S:
                    _delete(left)

    def learn(self, bundles: Iterable[task_pb2.CodeBundle]) -> None:
        """Unpack bundles, off the event loop: a worker whose heartbeats stop is taken for lost."""
        for bundle in bundles:
            self.retired.pop(self.path(bundle.digest), None)
            known = self._unpacking.get(bundle.digest)
            if known is None or _has_failed(known):
                unpacking = asyncio.to_thread(_unpack, bundle.zip, Path(self.path(bundle.digest)))
                self._unpacking[bundle.digest] = background.share(unpacking)

    def path(self, digest: str) -> str:
        """Return where a bundle is, or will be, unpacked; nothing for no bundle."""
        # Asked for each lease, and a `Path` takes longer to make than to write.
        return f"{self._folder}/{digest.removeprefix('sha256:')}" if digest else ""

    def unpacking(self, digest: str) -> "asyncio.Task[int] | None":
        """Return the task that unpacks a bundle; None when it is unpacked, or was never sent."""
        task = self._unpacking.get(digest)
        return task if task is not None and (not task.done() or _has_failed(task)) else None

    def need(self, path: str) -> None:
        """Keep a bundle until `release`: a process is started for it."""
        self._starting[path] += 1

    def release(self, path: str) -> None:
        """Note that a process that was started for a bundle has it, or has failed to start."""
        self._starting[path] -= 1
        if not self._starting[path]:
            del self._starting[path]

    @property
    def known(self) -> set[str]:
        """The digests of the bundles that this worker has."""
        return set(self._unpacking)

    def retire(self, digests: Iterable[str]) -> None:
        """Mark the bundles among these digests as to be forgotten."""
        for digest in self._unpacking.keys() & digests:
            self.retired[self.path(digest)] = digest

    def drop_unused(self, is_used: Callable[[str], bool]) -> None:
        """Delete the retired bundles that nothing uses; `is_used` tells whether a process has one."""
        for path in [path for path in self.retired if not self._starting[path] and not is_used(path)]:
            unpacking = self._unpacking.pop(self.retired.pop(path))
            # The next worker that starts deletes one that is left.
            task = background.start(_drop(unpacking, Path(path)), background.only_log)
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)

    def close(self) -> None:
        """Release all bundles, and delete each that no other worker has."""
        for digest, task in self._unpacking.items():
            if task.done() and not _has_failed(task):
                os.close(task.result())
                _delete(Path(self.path(digest)))
        self._unpacking.clear()


def _has_failed(task: "asyncio.Task[int]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def _drop(unpacking: "asyncio.Task[int]", folder: Path) -> None:
    with suppress(Exception):  # It is no archive, or there was no room for it.
        os.close(await unpacking)
    await asyncio.to_thread(_delete, folder)


def _unpack(data: bytes, folder: Path) -> int:
    """Unpack a bundle unless it is there; return the descriptor that locks it."""
    while (lock := _locked(folder, fcntl.LOCK_SH)) is None:
        aside = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        lock = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            with zipfile.ZipFile(BytesIO(data)) as archive:
                archive.extractall(aside)
            aside.rename(folder)
        except BaseException as error:
            os.close(lock)
            shutil.rmtree(aside, ignore_errors=True)
            number = error.errno if isinstance(error, OSError) else None
            # Another worker has unpacked it meanwhile, and may have deleted it again by now.
            is_there = number in {errno.EEXIST, errno.ENOTEMPTY}
            if not is_there and not (number in FULL and delete_spares(str(folder.parents[1] / SPARES))):
                raise
        else:
            break
    return lock


def _delete(folder: Path) -> None:
    """Delete a bundle that no worker has."""
    lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        return
    aside = folder.with_name(f"{folder.name.partition('-')[0]}-{uuid.uuid4().hex}")
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    os.close(lock)


def _locked(folder: Path, how: int) -> int | None:
    """Lock a folder; return the descriptor that holds the lock, or None when there is none, or another one by now."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, how)
        if os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None
