"""Owns the way of values to and from the server. Rule: bytes only; values are encoded and decoded elsewhere."""

from collections.abc import AsyncIterator

import grpc
from lattice.v1 import artifact_pb2, payload_pb2

from lattice_client import errors
from lattice_client.channel import Channel
from lattice_client.opening import Fetched
from lattice_client.requests import made

CHUNK_BYTES = 1024 * 1024
# What gRPC says of an upload whose call the server ended while it was written to; the server's own words are lost then.
LOST_STATUS = "Internal error from Core"
UPLOAD_TRIES = 5


class Transfer:
    """The values that a client sends and fetches."""

    def __init__(self, rpc: Channel) -> None:
        self._rpc = rpc

    async def fetch(self, payload: payload_pb2.Payload) -> Fetched:
        """Return a payload's encoding; a large one is downloaded."""
        match payload.WhichOneof("content"):
            case "json":
                return Fetched(payload.media_type, payload.json.encode())
            case "data":
                return Fetched(payload.media_type, payload.data)
            case _:
                data = await self._rpc.call(self._download(payload.artifact.artifact_id))
                return Fetched(payload.media_type, data)

    async def _download(self, artifact_id: str) -> bytearray:
        data = bytearray()
        request = made(artifact_pb2.ReadArtifactRequest, artifact_id=artifact_id)
        async for chunk in self._rpc.artifacts.ReadArtifact(request):
            data += chunk.data
        return data

    async def upload(self, data: bytes) -> payload_pb2.Artifact:
        """Store bytes on the server. Raises RequestError."""

        async def chunks() -> AsyncIterator[artifact_pb2.WriteArtifactRequest]:
            for start in range(0, len(data), CHUNK_BYTES):
                yield artifact_pb2.WriteArtifactRequest(data=data[start : start + CHUNK_BYTES])

        for _ in range(UPLOAD_TRIES):
            try:
                with self._rpc.closing():
                    return (await self._rpc.artifacts.WriteArtifact(chunks())).artifact
            except grpc.aio.AioRpcError as error:
                if error.details() != LOST_STATUS:
                    raise self._rpc.error_of(error) from None
        text = f"the server at {self._rpc.target} ended an upload of {len(data)} bytes before it had all of it"
        raise errors.UnavailableError(f"{text}; its log may say why")
