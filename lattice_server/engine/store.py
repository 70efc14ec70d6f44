"""Owns the artifacts that lie on the head's machine. Rule: an id is a file name of this store and nothing else.

Workers on the same machine share the directory: what a client wrote, they map; what they wrote, clients read.
"""

import asyncio
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

from lattice_server.core.errors import NotFoundError

HEAD = "head"
CHUNK_BYTES = 1024 * 1024
SHARED_MEMORY = Path("/dev/shm")
_ID = re.compile(r"[0-9a-f]{32}")


class ArtifactStore:
    """A directory of artifacts; reads and writes run off the event loop."""

    def __init__(self) -> None:
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="lattice-", dir=parent))

    async def read(self, artifact_id: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of an artifact from `offset` on, in chunks of 1 MiB. Raises NotFoundError."""
        path = self._path(artifact_id)
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except FileNotFoundError:
            raise self._missing(artifact_id) from None
        with file:
            file.seek(offset)
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk

    async def write(self, chunks: AsyncIterator[bytes]) -> tuple[str, int]:
        """Store the chunks as one artifact; return its id and size in bytes."""
        artifact_id, size = uuid4().hex, 0
        path = self._path(artifact_id)
        try:
            with path.open("wb") as file:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
                    size += len(chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return artifact_id, size

    def drop(self, artifact_id: str) -> None:
        """Delete an artifact, if it is there."""
        self._path(artifact_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, artifact_id: str) -> Path:
        if not _ID.fullmatch(artifact_id):
            raise self._missing(artifact_id)
        return self.directory / artifact_id

    def _missing(self, artifact_id: str) -> NotFoundError:
        return NotFoundError("ARTIFACT_NOT_FOUND", f"there is no artifact {artifact_id!r}")
