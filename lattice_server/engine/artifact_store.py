"""Owns the artifacts that lie on the head's machine. Rule: an id is a file name of this store and nothing else.

The id of an upload is the digest of its content: equal content is one file, and a request that names it is the same
request, however often it is uploaded.

Workers on the same machine share the directory: what a client wrote, they map; what they wrote, clients read. A large
file that is dropped becomes a spare, to be written again under another name: pages that are there already cost a
fraction of new ones. Whoever reads a file holds a shared lock on it, and whoever takes a spare an exclusive one, so
nobody's bytes change under him (see `open_artifact` in the runner's `artifacts.py`, the other side of this).
"""

import asyncio
import fcntl
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from lattice_server.core.errors import ExhaustedError, NotFoundError
from lattice_server.core.model import Artifact
from lattice_server.core.tenancy import Reach
from lattice_server.engine.store_folder import MIB, linked, made, remove, room
from lattice_server.engine.uploads import Name, Uploads
from lattice_server.engine.usage import Bound

GIB = 1024 * MIB
HEAD = "head"
SPARES = "spares"
UPLOADS = "uploads"
CHUNK_BYTES = 1024 * 1024
MIN_SPARE_BYTES = 1024 * 1024
UPLOAD_BOUND = Bound(8 * GIB, share=0.5)
UPLOAD_TTL_S = 600.0
_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


@dataclass(slots=True)
class _Holding:
    """An artifact, and how many runs, workflows and uploads of each tenant hold it."""

    artifact: Artifact
    holders: Counter[str] = field(default_factory=Counter)


class ArtifactStore:
    """A directory of artifacts and who still needs them; reads and writes run off the event loop.

    It also knows who needs those that lie on other nodes; `on_drop` is told each that nobody needs any more. The
    directory lies in `folder`, or where there is room when that is empty; `total_bytes` is the size of its file system.
    Raises StoreError.
    """

    def __init__(
        self,
        folder: str = "",
        spare_limit_bytes: int = 512 * MIB,
        upload_bound: Bound = UPLOAD_BOUND,
        upload_ttl_s: float = UPLOAD_TTL_S,
    ) -> None:
        self.on_drop: Callable[[Artifact], None] = lambda artifact: None
        self.directory, self._lock = made(folder)
        self._on_disk = linked(self.directory)
        self._spares, self._uploads = self.directory / SPARES, self.directory / UPLOADS
        self._spares.mkdir()
        self._uploads.mkdir()
        self.total_bytes = room(self.directory)[1]
        self.uploads = Uploads(upload_bound, upload_ttl_s, lambda artifact, tenant: self.release([artifact], tenant))
        self._spare_limit_bytes = min(spare_limit_bytes, self.total_bytes // 4)
        self._held: dict[str, _Holding] = {}

    async def read(self, artifact_id: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of an artifact from `offset` on, in chunks of 1 MiB. Raises NotFoundError."""
        path = self._path(artifact_id)
        with await asyncio.to_thread(self._open, path) as file:
            file.seek(offset)
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk

    async def write(self, chunks: AsyncIterator[bytes], tenant: str = "") -> Artifact:
        """Store the chunks as one artifact of a tenant.

        It is dropped when no run and no workflow has named it within the time that uploads wait.

        Raises:
            ExhaustedError: the store has no room for it, or the tenant has uploaded as much as it may.
        """
        draft, digest, size = self._uploads / uuid4().hex, hashlib.sha256(), 0
        try:
            with self._created(draft) as file:
                async for chunk in chunks:
                    self.uploads.receive(tenant, len(chunk))
                    size += len(chunk)
                    await asyncio.to_thread(self._append, file, chunk, digest)
            artifact = self._admit(draft, Artifact(digest.hexdigest(), size, HEAD), tenant)
        finally:
            self.uploads.forget(tenant, size)
            draft.unlink(missing_ok=True)
        self.uploads.wait(tenant, artifact)
        return artifact

    def take(self, artifacts: Sequence[Artifact], tenant: str = "", uploader: str | None = None) -> list[Name]:
        """As `hold`, for a run or a workflow of a tenant: uploads that it names wait no longer.

        `uploader` is the tenant that uploaded what the caller did; by default it is `tenant` too. Its uploads are
        returned, and go on counting as such until they are given to `uploads.release`.
        """
        uploader = tenant if uploader is None else uploader
        self.hold(artifacts, tenant)
        held, named = self.uploads.take(uploader, artifacts)
        self.release(named, uploader)
        return held

    def hold(self, artifacts: Iterable[Artifact], tenant: str = "") -> None:
        """Keep artifacts for a tenant until as many `release` as `hold` have named them."""
        for artifact in artifacts:
            self._held.setdefault(artifact.artifact_id, _Holding(artifact)).holders[tenant] += 1

    def release(self, artifacts: Iterable[Artifact], tenant: str = "") -> None:
        """Let go of artifacts; those nobody holds are dropped."""
        for artifact in artifacts:
            holding = self._held.get(artifact.artifact_id)
            if holding is None:
                continue
            holding.holders[tenant] -= 1
            if holding.holders[tenant] <= 0:
                del holding.holders[tenant]
            if not holding.holders:
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

    def check(self, artifact_ids: Iterable[str], reach: Reach) -> None:
        """Raise NotFoundError unless artifacts are held by tenants within reach."""
        for artifact_id in artifact_ids:
            holding = self._held.get(artifact_id)
            if holding is None or not (reach.is_any or reach.tenant in holding.holders):
                raise self._missing(artifact_id)

    def close(self) -> None:
        """Delete the directory, and the one on disk."""
        own = [(self.directory, self._lock)]
        for directory, lock in own if self._on_disk is None else [*own, self._on_disk]:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)

    def _admit(self, draft: Path, artifact: Artifact, tenant: str) -> Artifact:
        """Give what was uploaded its place, unless the same is there already, and hold it."""
        holding = self._held.get(artifact.artifact_id)
        if holding is not None and holding.artifact != artifact:
            # A node reported one of its own by this name.
            artifact = replace(artifact, artifact_id=uuid4().hex)
        path = self._path(artifact.artifact_id)
        if holding is None or not path.exists():
            draft.rename(path)
        self.hold([artifact], tenant)
        return artifact

    def _created(self, path: Path) -> FileIO:
        try:
            return FileIO(path, "x")
        except OSError as error:
            raise self._full(error) from error

    def _append(self, file: FileIO, chunk: bytes, digest: "hashlib._Hash") -> None:
        digest.update(chunk)
        left = memoryview(chunk)
        while left:
            try:
                left = left[file.write(left) :]
            except OSError as error:
                if not self._delete_spares():
                    raise self._full(error) from error

    def _delete_spares(self) -> bool:
        """Delete all spares; return whether there were any."""
        found = list(os.scandir(self._spares))
        for entry in found:
            with suppress(FileNotFoundError):  # a worker took it
                os.unlink(entry.path)
        return bool(found)

    def _full(self, error: OSError) -> ExhaustedError:
        free, total = room(self.directory)
        sizes = f"{free // MIB} of {total // MIB} MiB are free there"
        return ExhaustedError(
            "PAYLOAD_TOO_LARGE",
            f"the store of large values in {self.directory} cannot take it: {error.strerror}; {sizes}",
            metadata={"folder": str(self.directory), "free_bytes": str(free), "total_bytes": str(total)},
        )

    def _drop(self, artifact_id: str) -> None:
        if not _ID.fullmatch(artifact_id):
            return
        path = self.directory / artifact_id
        try:
            size = path.stat().st_size
            spare = sum(entry.stat().st_size for entry in os.scandir(self._spares))
            if not path.is_symlink() and MIN_SPARE_BYTES <= size <= self._spare_limit_bytes - spare:
                # Under a new name: another may be dropped by the old one while a worker takes this.
                path.rename(self._spares / uuid4().hex)
            else:
                remove(path)
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
