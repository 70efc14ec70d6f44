"""Large values, as files of the node's store, and the encoding of an invocation's outputs.

Rule: a value for which the store has no room lies on disk, in the folder that `disk` in the store links to, or its
invocation fails and names the store.
"""

import contextlib
import errno
import io
import mmap
import os
import uuid
from typing import Any

from lattice_worker.runner.encoding.blame import refusal
from lattice_worker.runner.encoding.pages import HugePages, fill
from lattice_worker.runner.encoding.spare_files import SPARES, claimed, delete_spares, opened
from lattice_worker.runner.encoding.values import PayloadError, encode_value

DISK = "disk"
MIB = 1024 * 1024
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_huge_pages = HugePages()


class StoreFullError(Exception):
    """Neither the store nor its folder on disk has room for a value."""


class Encoder:
    """Encodes the outputs of one invocation: small ones into the frame, as `blobs`; large ones into files of the
    runner's folder, which the frame lists as `made` and the agent moves into the store."""

    def __init__(self, header: dict[str, Any]) -> None:
        self._folder = header["folder"]
        self._store = header["store"]
        self._inline_limit = header["inline_limit"]
        self._may_reuse = header.get("may_reuse", True)
        self.as_data = header.get("as_data", False)
        self.blobs: list[bytes] = []
        self.made: list[str] = []

    def take_back(self, blobs: int = 0, made: int = 0) -> None:
        """Forget all but so many blobs and artifacts."""
        for artifact in self.made[made:]:
            remove(os.path.join(self._folder, artifact))
        del self.blobs[blobs:], self.made[made:]

    def encode(self, value: Any, name: str) -> dict[str, Any]:
        """Return a reference to the encoded value of the output of this name."""
        try:
            media_type, parts = encode_value(value, as_data=self.as_data)
        except MemoryError:
            raise
        except BaseException as error:  # SystemExit too: pickling runs code of the value's own.
            text = refusal(f"output {name!r}", value, error)
            raise PayloadError(f"{text}; return data instead, such as texts, numbers, lists or dicts") from error
        return self.store(media_type, parts)

    def store(self, media_type: str, parts: list[Any]) -> dict[str, Any]:
        """Return a reference to a value that is encoded already."""
        size = sum(len(part) for part in parts)
        if size <= self._inline_limit:
            self.blobs.append(b"".join(parts))
            return {"type": media_type, "blob": len(self.blobs) - 1}
        artifact = uuid.uuid4().hex
        self.made.append(artifact)
        self._write(os.path.join(self._folder, artifact), parts, size)
        return {"type": media_type, "artifact": artifact, "size": size}

    def _write(self, path: str, parts: list[Any], size: int) -> None:
        """Write a value where there is room for it. Raises StoreFullError."""
        for make in (self._new_or_spare, self._in_place_of_spares, self._on_disk):
            try:
                with make(path, size) as file:
                    fill(file, parts, size)
            except OSError as error:
                remove(path)
                if error.errno not in FULL:
                    raise
            else:
                return
        raise StoreFullError(f"there is no room for an output of {size} bytes: {_room(self._store, self._disk())}")

    def _new_or_spare(self, path: str, size: int) -> io.FileIO:
        return create_artifact(path, self._spares(), size) if self._may_reuse else _new(path, size)

    def _in_place_of_spares(self, path: str, _size: int) -> io.FileIO:
        delete_spares(self._spares())
        return io.FileIO(path, "x")

    def _on_disk(self, path: str, _size: int) -> io.FileIO:
        if not os.path.isdir(disk := self._disk()):
            raise OSError(errno.ENOSPC, "the store has no folder on disk")
        # The link first, so that no bytes lie on disk without one.
        os.symlink(os.path.join(disk, os.path.basename(path)), path)
        return io.FileIO(path, "w")

    def _spares(self) -> str:
        return os.path.join(self._store, SPARES)

    def _disk(self) -> str:
        return os.path.realpath(os.path.join(self._store, DISK))


def remove(path: str) -> None:
    """Delete a value, and its bytes if it is a link to them."""
    with contextlib.suppress(OSError):
        os.unlink(os.readlink(path))
    with contextlib.suppress(OSError):
        os.unlink(path)


def _room(*folders: str) -> str:
    found = []
    for folder in filter(os.path.isdir, folders):
        status = os.statvfs(folder)
        free, whole = (blocks * status.f_frsize // MIB for blocks in (status.f_bavail, status.f_blocks))
        found.append(f"{free} of {whole} MiB are free in {folder}")
    return ", ".join(found)


def create_artifact(path: str, spares: str, size: int) -> io.FileIO:
    """Return a file to write an artifact of `size` bytes to: a spare where one suits, or else a new one."""
    return claimed(path, spares, size) or _new(path, size)


def _new(path: str, size: int) -> io.FileIO:
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(io.FileIO(path, "x+"))
        _huge_pages.give(file.fileno(), size)
        undo.pop_all()
        return file


def open_artifact(path: str) -> mmap.mmap | bytes:
    """Return the bytes of an artifact. Its pages are not written while the map lives, or a copy of it in a child."""
    try:
        with opened(path) as file:
            # Private pages: the task may write to the value, and no other process sees it.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if os.fstat(file.fileno()).st_size else b""
    except FileNotFoundError:
        raise PayloadError("an input's value is no longer in the store of this node") from None
