"""Serves `ArtifactService`: values too large to travel inline."""

import contextlib
from collections.abc import AsyncIterator

from lattice.v1 import artifact_pb2, artifact_pb2_grpc

from lattice_server.core.errors import ExhaustedError, NotFoundError, invalid_field
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.workers.artifact_transfer import Transfers
from lattice_server.rpc import callers
from lattice_server.rpc.assigned_artifacts import AssignedArtifacts
from lattice_server.rpc.chunking import UPLOAD_CHUNK_BYTES
from lattice_server.rpc.convert.payloads import artifact_to_proto
from lattice_server.rpc.handlers import Context
from lattice_server.tokens import Scope

MAX_OFFSET = 1 << 62  # Beyond any file, and below the limit of the operating system.


class ArtifactServicer(artifact_pb2_grpc.ArtifactServiceServicer):
    """The `ArtifactService`."""

    def __init__(self, store: ArtifactStore, transfers: Transfers, assigned: AssignedArtifacts) -> None:
        self._store = store
        self._transfers = transfers
        self._assigned = assigned

    async def ReadArtifact(  # type: ignore[override]  # the stubs know only handlers that yield
        self, request: artifact_pb2.ReadArtifactRequest, context: Context
    ) -> None:
        """Stream the bytes of an artifact."""
        if not 0 <= request.offset <= MAX_OFFSET:
            raise invalid_field("offset", f"must be from 0 to {MAX_OFFSET}")
        self._check(request.artifact_id)
        async with contextlib.aclosing(self._transfers.read(request.artifact_id, request.offset)) as chunks:
            async for data in chunks:
                # Not yielded: grpcio leaves the generator of a call that was cancelled to the garbage collector.
                await context.write(artifact_pb2.ReadArtifactResponse(data=data))

    async def WriteArtifact(
        self,
        request_iterator: AsyncIterator[artifact_pb2.WriteArtifactRequest],
        context: Context,
    ) -> artifact_pb2.WriteArtifactResponse:
        """Store an artifact that inputs may then refer to."""
        artifact = await self._store.write(_whole(request_iterator), callers.reach().tenant)
        return artifact_pb2.WriteArtifactResponse(artifact=artifact_to_proto(artifact))

    def _check(self, artifact_id: str) -> None:
        """Raise NotFoundError for an artifact that the caller may not read."""
        caller = callers.caller()
        if Scope.READ not in caller.credential.scopes:
            if not self._assigned.may_read(caller.subject, artifact_id):
                text = f"no lease of this worker has an input {artifact_id!r}"
                raise NotFoundError("ARTIFACT_NOT_FOUND", text)
        elif not (reach := callers.reach()).is_any and not self._assigned.may_read(caller.subject, artifact_id):
            self._store.check([artifact_id], reach)


async def _whole(requests: AsyncIterator[artifact_pb2.WriteArtifactRequest]) -> AsyncIterator[bytes]:
    """Yield the bytes of an upload. Raises InvalidError when they are not as many as its first message says.

    grpcio may end the messages of a broken call like those of a complete one.
    """
    expected, received = None, 0
    async for request in requests:
        if received == 0 and request.HasField("size_bytes"):
            expected = request.size_bytes
        data = _data(request)
        received += len(data)
        yield data
    if expected is not None and received != expected:
        raise invalid_field("size_bytes", f"{expected} bytes were announced, and {received} received")


def _data(request: artifact_pb2.WriteArtifactRequest) -> bytes:
    """Return the bytes of one part of an upload. Raises ExhaustedError."""
    if len(request.data) > UPLOAD_CHUNK_BYTES:
        text = f"data: {len(request.data)} bytes in one message, the limit is {UPLOAD_CHUNK_BYTES}; send it in parts"
        raise ExhaustedError("PAYLOAD_TOO_LARGE", text, metadata={"field": "data"})
    return request.data
