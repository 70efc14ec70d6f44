"""Owns the references to artifacts, and the uploads among them.

Rule: an artifact is dropped when its last reference is released. The id of an upload is the digest of its content:
equal content is one file, and a request that names it is the same request, however often it is uploaded.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from lattice_server.core.model import Artifact
from lattice_server.core.tenancy import Reach
from lattice_server.engine.stores.artifact_files import ArtifactFiles, missing
from lattice_server.engine.stores.store_folder import MIB
from lattice_server.engine.stores.uploads import Name, Uploads
from lattice_server.engine.stores.usage import Bound

GIB = 1024 * MIB
HEAD = "head"
UPLOAD_BOUND = Bound(8 * GIB, share=0.5)
UPLOAD_TTL_S = 600.0


@dataclass(slots=True)
class _Held:
    """An artifact, and how many references of runs, workflows and uploads each tenant has to it."""

    artifact: Artifact
    holders: Counter[str] = field(default_factory=Counter)


class ArtifactStore:
    """The artifacts of all nodes that something references; lives on the main thread.

    Those of the head lie in a folder of `parent`, see `ArtifactFiles`. `on_drop` is called with each artifact whose
    last reference was released.
    """

    def __init__(
        self,
        parent: str = "",
        spare_limit_bytes: int = 512 * MIB,
        upload_bound: Bound = UPLOAD_BOUND,
        upload_ttl_s: float = UPLOAD_TTL_S,
    ) -> None:
        self.on_drop: Callable[[Artifact], None] = lambda artifact: None
        self.files = ArtifactFiles(parent, spare_limit_bytes)
        self.uploads = Uploads(upload_bound, upload_ttl_s, lambda artifact, tenant: self.release([artifact], tenant))
        self._held: dict[str, _Held] = {}
        self.read, self.close = self.files.read, self.files.close

    @property
    def directory(self) -> Path:
        """The folder of the head's artifacts."""
        return self.files.folder

    async def write(self, chunks: AsyncIterator[bytes], tenant: str = "") -> Artifact:
        """Store the chunks as one artifact of a tenant.

        It is dropped when no run and no workflow has named it within the time that uploads wait.

        Raises:
            ExhaustedError: the store has no room for it, or the tenant has uploaded as much as it may.
        """
        upload, digest, size = self.files.new_upload(), hashlib.sha256(), 0
        try:
            with self.files.create(upload) as file:
                async for chunk in chunks:
                    self.uploads.receive(tenant, len(chunk))
                    size += len(chunk)
                    await asyncio.to_thread(self.files.append, file, chunk, digest)
            artifact = self._admit(upload, Artifact(digest.hexdigest(), size, HEAD), tenant)
        finally:
            self.uploads.forget(tenant, size)
            upload.unlink(missing_ok=True)
        self.uploads.wait(tenant, artifact)
        return artifact

    def take(self, artifacts: Sequence[Artifact], tenant: str = "", uploader: str | None = None) -> list[Name]:
        """Reference artifacts for a run or a workflow of a tenant; uploads among them no longer wait to be named.

        `uploader` is the tenant whose uploads the caller may name, by default `tenant`. The names of those uploads are
        returned; they count as uploads until they are given to `uploads.release`.
        """
        uploader = tenant if uploader is None else uploader
        self.hold(artifacts, tenant)
        held, named = self.uploads.take(uploader, artifacts)
        self.release(named, uploader)
        return held

    def hold(self, artifacts: Iterable[Artifact], tenant: str = "") -> None:
        """Add one reference of a tenant to each artifact."""
        for artifact in artifacts:
            self._held.setdefault(artifact.artifact_id, _Held(artifact)).holders[tenant] += 1

    def release(self, artifacts: Iterable[Artifact], tenant: str = "") -> None:
        """Release one reference of a tenant to each artifact; an artifact without references is dropped."""
        for artifact in artifacts:
            held = self._held.get(artifact.artifact_id)
            if held is None:
                continue
            held.holders[tenant] -= 1
            if held.holders[tenant] <= 0:
                del held.holders[tenant]
            if not held.holders:
                del self._held[artifact.artifact_id]
                self.on_drop(held.artifact)
                self.files.drop(artifact.artifact_id)

    def settle(self, artifacts: Sequence[Artifact]) -> None:
        """Drop the artifacts that have no reference."""
        self.hold(artifacts)
        self.release(artifacts)

    def unneeded(self, artifact_ids: Iterable[str]) -> list[str]:
        """Return the artifacts that have no reference."""
        return [artifact_id for artifact_id in artifact_ids if artifact_id not in self._held]

    def held(self, artifact_id: str) -> Artifact | None:
        """Return an artifact of any node that has a reference."""
        held = self._held.get(artifact_id)
        return None if held is None else held.artifact

    def check(self, artifact_ids: Iterable[str], reach: Reach) -> None:
        """Raise NotFoundError unless tenants within reach have a reference to each artifact."""
        for artifact_id in artifact_ids:
            held = self._held.get(artifact_id)
            if held is None or not (reach.is_any or reach.tenant in held.holders):
                raise missing(artifact_id)

    def _admit(self, upload: Path, artifact: Artifact, tenant: str) -> Artifact:
        """Place the file of an upload, unless an equal one is there already, and reference it."""
        held = self._held.get(artifact.artifact_id)
        if held is not None and held.artifact != artifact:
            # A node reported an artifact of its own by this name.
            artifact = replace(artifact, artifact_id=uuid4().hex)
        if held is None or not self.files.exists(artifact.artifact_id):
            self.files.place(upload, artifact.artifact_id)
        self.hold([artifact], tenant)
        return artifact
