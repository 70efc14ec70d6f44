"""Owns the files of the head's artifacts. Rule: an id is a file name of this folder and nothing else.

Workers on the same machine share the folder: they map the files of clients, and clients read theirs. A large file that
is dropped becomes a spare, to be written again under another name. No file changes while it is open; see `SpareKeeper`.
"""

import asyncio
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from lattice_server.core.errors import ExhaustedError, NotFoundError
from lattice_server.engine.stores.spare_keeper import SpareKeeper
from lattice_server.engine.stores.store_folder import MIB, linked, made, remove, room

UPLOADS = "uploads"
CHUNK_BYTES = 1024 * 1024
_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


class ArtifactFiles:
    """A folder of artifacts; reads and writes run off the event loop.

    The folder lies in `parent`; when that is empty, in a place with enough room. `total_bytes` is the size of its file
    system. Spares take at most `spare_limit_bytes`. Raises StoreError.
    """

    def __init__(self, parent: str, spare_limit_bytes: int) -> None:
        self.folder, self._lock = made(parent)
        self._on_disk = linked(self.folder)
        self._uploads = self.folder / UPLOADS
        self._uploads.mkdir()
        self.total_bytes = room(self.folder)[1]
        self._spares = SpareKeeper(self.folder, min(spare_limit_bytes, self.total_bytes // 4))

    async def read(self, artifact_id: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of an artifact from `offset` on, in chunks of 1 MiB. Raises NotFoundError."""
        path = self._path(artifact_id)
        with await asyncio.to_thread(self._open, path) as file:
            file.seek(offset)
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk

    def new_upload(self) -> Path:
        """Return the path of a file for an upload that is arriving."""
        return self._uploads / uuid4().hex

    def create(self, path: Path) -> FileIO:
        """Create the file of an upload. Raises ExhaustedError, PAYLOAD_TOO_LARGE."""
        try:
            return FileIO(path, "x")
        except OSError as error:
            raise self._full(error) from error

    def append(self, file: FileIO, chunk: bytes, digest: "hashlib._Hash") -> None:
        """Append a chunk to an upload; spares make room for it. Raises ExhaustedError, PAYLOAD_TOO_LARGE."""
        digest.update(chunk)
        left = memoryview(chunk)
        while left:
            try:
                left = left[file.write(left) :]
            except OSError as error:
                if not self._spares.delete_all():
                    raise self._full(error) from error

    def exists(self, artifact_id: str) -> bool:
        """Whether there is a file of an artifact."""
        return self._path(artifact_id).exists()

    def place(self, upload: Path, artifact_id: str) -> None:
        """Make the file of an upload that has arrived the file of an artifact."""
        upload.rename(self._path(artifact_id))

    def drop(self, artifact_id: str) -> None:
        """Delete the file of an artifact, or make it a spare; an artifact of another node has none here."""
        if not _ID.fullmatch(artifact_id):
            return
        path = self.folder / artifact_id
        try:
            if not self._spares.keep(path):
                remove(path)
        except FileNotFoundError:  # It lies elsewhere.
            return

    def close(self) -> None:
        """Delete the folder, and the one on disk."""
        self._spares.close()
        own = [(self.folder, self._lock)]
        for folder, lock in own if self._on_disk is None else [*own, self._on_disk]:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def _full(self, error: OSError) -> ExhaustedError:
        free, total = room(self.folder)
        sizes = f"{free // MIB} of {total // MIB} MiB are free there"
        return ExhaustedError(
            "PAYLOAD_TOO_LARGE",
            f"the store of large values in {self.folder} cannot take it: {error.strerror}; {sizes}",
            metadata={"folder": str(self.folder), "free_bytes": str(free), "total_bytes": str(total)},
        )

    def _open(self, path: Path) -> BinaryIO:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise missing(path.name) from None
        # A file that was dropped between the lookup of its name and the opening may be written anew.
        try:
            is_same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            file.close()
            raise missing(path.name)
        return file

    def _path(self, artifact_id: str) -> Path:
        if not _ID.fullmatch(artifact_id):
            raise missing(artifact_id)
        return self.folder / artifact_id


def missing(artifact_id: str) -> NotFoundError:
    """Return the error for an artifact that is not here, or not within the caller's reach."""
    return NotFoundError("ARTIFACT_NOT_FOUND", f"there is no artifact {artifact_id!r}, or it is no longer kept")
