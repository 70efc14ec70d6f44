"""The store of a node: artifacts and bundles that attempts need before they start.

Rule: a file is in the store whole or not at all.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import grpc
from lattice.v1 import artifact_pb2, artifact_pb2_grpc, payload_pb2, worker_pb2

from lattice_worker import background, convert
from lattice_worker.config import HEAD_STORE
from lattice_worker.runner.encoding.spare_files import SPARES, delete_spares, opened
from lattice_worker.store.artifact_staging import ArtifactStaging
from lattice_worker.store.bundles import Bundles
from lattice_worker.store.peer_fetch import PeerFetcher
from lattice_worker.store.spare_keeper import SpareKeeper

RETRIES = 10
RETRY_S = 0.5
INLINE = frozenset({"json", "data"})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN})


class MissingError(Exception):
    """An artifact that an attempt needs cannot be fetched; the message is for people."""


class LocalStore:
    """The store of one worker. Incomplete artifacts lie in `staging`.

    Artifacts of other nodes come from `fetcher`, or else from the server's artifact service, which `connect` returns.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        staging: ArtifactStaging,
        connect: "Callable[[], artifact_pb2_grpc.ArtifactServiceAsyncStub | None]",
        fetcher: PeerFetcher | None = None,
    ) -> None:
        self.directory, self.name = directory, name
        self._staging, self._connect, self._fetcher = staging, connect, fetcher
        self.bundles = Bundles(directory)
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._unneeded: set[str] = set()
        # The server keeps those of its own store.
        self._spares = None if name == HEAD_STORE else SpareKeeper(directory)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the store while the block runs."""
        Path(self.directory, SPARES).mkdir(parents=True, exist_ok=True)
        if self._spares is not None:
            self._spares.open()
        try:
            yield
        finally:
            if self._spares is not None:
                self._spares.close()

    def missing(
        self, bundle_digest: str, assignment: worker_pb2.Assignment, upstream: convert.Outputs
    ) -> list[asyncio.Task[Any]]:
        """Return the transfers and the unpacking that an assignment has to wait for; in most cases none."""
        unpacking = self.bundles.unpacking(bundle_digest)
        waits: list[asyncio.Task[Any]] = [] if unpacking is None else [unpacking]
        for attempt in assignment.attempts:
            for binding in attempt.inputs.values():
                if binding.payload.WhichOneof("content") in INLINE:
                    continue  # As most inputs are.
                waits += [self._fetch(artifact) for artifact in self._absent(binding, upstream)]
        return waits

    def fetching(self, payloads: Iterable[payload_pb2.Payload]) -> list[asyncio.Task[Any]]:
        """Return the transfers of values that are not here yet."""
        bindings = (payload_pb2.Binding(payload=payload) for payload in payloads)
        return [self._fetch(artifact) for binding in bindings for artifact in self._absent(binding, {})]

    def drop(self, artifact_ids: Iterable[str]) -> None:
        """Delete artifacts that no task needs any more: those in transfer as soon as they arrive."""
        artifact_ids = list(artifact_ids)
        self._staging.settle(artifact_ids)
        self._unneeded.update(self._fetching.keys() & artifact_ids)
        for path in map(self._path, artifact_ids):
            # The server names it: delete files only, never a folder.
            if path.is_file() and not self._has_kept(path):
                self._staging.remove(path)

    def stored(self) -> list[str]:
        """Return the artifacts in the store and in transfer, without those whose reports may not be acknowledged.

        Of the server's own store only those in transfer: the server knows what lies there.
        """
        if self.name == HEAD_STORE:
            return list(self._fetching)
        found = {entry.name for entry in os.scandir(self.directory) if entry.is_file()}
        return [*(found - self._staging.reported - self._fetching.keys()), *self._fetching]

    def open(self, artifact_id: str) -> BinaryIO:
        """Open an artifact of this store. Raises FileNotFoundError."""
        return opened(self._path(artifact_id))

    def _has_kept(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            return self._spares is not None and self._spares.keep(path)
        return False

    def _absent(self, binding: payload_pb2.Binding, upstream: convert.Outputs) -> list[payload_pb2.Artifact]:
        match binding.WhichOneof("source"):
            case "selection":
                return self._absent(binding.selection.value, upstream)
            case "list":
                return [found for item in binding.list.items for found in self._absent(item, upstream)]
            case "map":
                return [found for item in binding.map.entries.values() for found in self._absent(item, upstream)]
            case "output":
                payload = upstream[binding.output.output]
            case _:
                payload = binding.payload
        if payload.WhichOneof("content") != "artifact" or payload.artifact.node_id == self.name:
            return []
        return [] if self._path(payload.artifact.artifact_id).exists() else [payload.artifact]

    def _fetch(self, artifact: payload_pb2.Artifact) -> asyncio.Task[None]:
        artifact_id = artifact.artifact_id
        # One that was dropped in transfer may be needed again: equal content has the same name.
        self._unneeded.discard(artifact_id)
        found = self._fetching.get(artifact_id)
        if found is None:
            found = self._fetching[artifact_id] = background.share(self._obtain(artifact))
            found.add_done_callback(lambda _: self._fetching.pop(artifact_id, None))
        return found

    async def _obtain(self, artifact: payload_pb2.Artifact) -> None:
        path = self._path(artifact.artifact_id)
        try:
            if self._fetcher is None or not await self._fetcher.bring(artifact.node_id, path, artifact.size_bytes):
                # The server knows whether it still exists, and says so.
                await self._download(artifact)
        finally:
            if artifact.artifact_id in self._unneeded:
                self._unneeded.discard(artifact.artifact_id)
                self._staging.remove(path)

    async def _download(self, artifact: payload_pb2.Artifact) -> None:
        path = self._path(artifact.artifact_id)
        part = self._staging.incoming / path.name
        is_full = False
        for attempt in range(RETRIES):
            stub = self._connect()
            try:
                if stub is None:
                    raise MissingError("the server is not connected")
                if is_full:
                    self._staging.on_disk(part)
                size = await _received(stub, artifact.artifact_id, part)
                if size == artifact.size_bytes:
                    part.rename(path)
                    return
                text = f"{size} of {artifact.size_bytes} bytes came"
            except grpc.aio.AioRpcError as error:
                text = error.details() or error.code().name
                if error.code() not in RETRIED:
                    raise MissingError(self._lost(artifact, text)) from None
            except OSError as error:
                text = f"it cannot be written to {self.directory}: {error.strerror}"
                is_full = error.errno in FULL and not delete_spares(os.path.join(self.directory, SPARES))
            except MissingError as error:
                text = str(error)
            except asyncio.CancelledError:
                # Its channel was closed along with the worker's stream; the task itself was not cancelled.
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise
                text = "the stream broke"
            finally:
                self._staging.remove(part)
            if attempt + 1 < RETRIES:
                # The node that has it, or the server, may be back in a moment; no event tells that it is.
                await asyncio.sleep(RETRY_S)
        raise MissingError(self._lost(artifact, text))

    def _lost(self, artifact: payload_pb2.Artifact, why: str) -> str:
        return f"a value of {artifact.size_bytes} bytes that lies on node {artifact.node_id!r} cannot be had: {why}"

    def _path(self, artifact_id: str) -> Path:
        return Path(self.directory) / os.path.basename(artifact_id)


async def _received(stub: "artifact_pb2_grpc.ArtifactServiceAsyncStub", artifact_id: str, part: Path) -> int:
    """Write an artifact to a file while it is read from the server; return its size."""
    with part.open("wb", buffering=0) as file:
        async for response in stub.ReadArtifact(artifact_pb2.ReadArtifactRequest(artifact_id=artifact_id)):
            # A write into memory, at most 1 MiB of it.
            left = memoryview(response.data)
            while left:
                left = left[file.write(left) :]
        return file.tell()
