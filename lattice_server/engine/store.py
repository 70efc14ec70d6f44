"""Owns the artifacts that lie on the head's machine. Rule: an id is a file name of this store and nothing else.

Workers on the same machine share the directory: what a client wrote, they map; what they wrote, clients read. A large
file that is dropped becomes a spare, to be written again under another name: pages that are there already cost a
fraction of new ones. Whoever reads a file holds a shared lock on it, and whoever takes a spare an exclusive one, so
nobody's bytes change under him (see `open_artifact` in the runner's `artifacts.py`, the other side of this).
"""

import asyncio
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from lattice_server.core.errors import NotFoundError
from lattice_server.core.model import Artifact

HEAD = "head"
SPARES = "spares"
PREFIX = "lattice-head-"
NEW_S = 10.0
CHUNK_BYTES = 1024 * 1024
MIN_SPARE_BYTES = 1024 * 1024
UPLOAD_TTL_S = 3600.0
SHARED_MEMORY = Path("/dev/shm")
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class _Holding:
    artifact: Artifact
    holders: int = 0


class ArtifactStore:
    """A directory of artifacts and who still needs them; reads and writes run off the event loop.

    It also knows who needs those that lie on other nodes; `on_drop` is told each that nobody needs any more.
    """

    def __init__(self, spare_limit_bytes: int = 512 * 1024 * 1024) -> None:
        self.on_drop: Callable[[Artifact], None] = lambda artifact: None
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        _delete_left(parent)
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = _lock(self.directory)
        self._spares = self.directory / SPARES
        self._spares.mkdir()
        self._spare_limit_bytes = spare_limit_bytes
        self._held: dict[str, _Holding] = {}

    async def read(self, artifact_id: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of an artifact from `offset` on, in chunks of 1 MiB. Raises NotFoundError."""
        path = self._path(artifact_id)
        with await asyncio.to_thread(self._open, path) as file:
            file.seek(offset)
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk

    async def write(self, chunks: AsyncIterator[bytes]) -> Artifact:
        """Store the chunks as one artifact; it is dropped after an hour in which no run and no workflow named it."""
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
        artifact = Artifact(artifact_id, size, HEAD)
        self.hold([artifact])
        asyncio.get_running_loop().call_later(UPLOAD_TTL_S, self.release, [artifact])
        return artifact

    def hold(self, artifacts: Iterable[Artifact]) -> None:
        """Keep artifacts until as many `release` as `hold` have named them."""
        for artifact in artifacts:
            self._held.setdefault(artifact.artifact_id, _Holding(artifact)).holders += 1

    def release(self, artifacts: Iterable[Artifact]) -> None:
        """Let go of artifacts; those nobody holds are dropped."""
        for artifact in artifacts:
            holding = self._held.get(artifact.artifact_id)
            if holding is None:
                continue
            holding.holders -= 1
            if holding.holders == 0:
                del self._held[artifact.artifact_id]
                self.on_drop(holding.artifact)
                self._drop(artifact.artifact_id)

    def settle(self, artifacts: Sequence[Artifact]) -> None:
        """Drop those artifacts that nobody holds."""
        self.hold(artifacts)
        self.release(artifacts)

    def unneeded(self, artifact_ids: Iterable[str]) -> list[str]:
        """Return those artifacts that nobody holds."""
        return [artifact_id for artifact_id in artifact_ids if artifact_id not in self._held]

    def held(self, artifact_id: str) -> Artifact | None:
        """Return an artifact that somebody holds, here or elsewhere."""
        holding = self._held.get(artifact_id)
        return None if holding is None else holding.artifact

    def close(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)

    def _drop(self, artifact_id: str) -> None:
        if not _ID.fullmatch(artifact_id):
            return
        path = self.directory / artifact_id
        try:
            size = path.stat().st_size
            spare = sum(entry.stat().st_size for entry in os.scandir(self._spares))
            if MIN_SPARE_BYTES <= size <= self._spare_limit_bytes - spare:
                path.rename(self._spares / artifact_id)
            else:
                path.unlink()
        except FileNotFoundError:  # a worker took the spare meanwhile, or the artifact lies elsewhere
            return

    def _open(self, path: Path) -> BinaryIO:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise self._missing(path.name) from None
        fcntl.flock(file, fcntl.LOCK_SH)
        # Dropped and written anew between the opening and the lock: not this artifact any more.
        try:
            is_same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            file.close()
            raise self._missing(path.name)
        return file

    def _path(self, artifact_id: str) -> Path:
        if not _ID.fullmatch(artifact_id):
            raise self._missing(artifact_id)
        return self.directory / artifact_id

    def _missing(self, artifact_id: str) -> NotFoundError:
        return NotFoundError("ARTIFACT_NOT_FOUND", f"there is no artifact {artifact_id!r}, or it is no longer kept")


def _lock(directory: Path) -> int:
    """Hold a directory until the descriptor returned is closed. Raises OSError when somebody else does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _delete_left(parent: Path) -> None:
    """Delete the directories of servers that were killed: they hold memory, and nobody else deletes them.

    One that is new may not be locked yet.
    """
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = _lock(left)
            if time.time() - left.stat().st_mtime > NEW_S:
                shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
