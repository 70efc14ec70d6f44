"""Owns sending and fetching payloads. Rule: it handles encoded bytes; other modules encode and decode values."""

from collections.abc import Iterator

from lattice.v1 import artifact_pb2, payload_pb2

from lattice_client import errors
from lattice_client.convert import payloads
from lattice_client.runs.decoding import Fetched
from lattice_client.transport.channel import Channel
from lattice_client.transport.requests import made

# gRPC's text for an upload that the server ended during a write; the status that the server sent is lost then.
LOST_STATUS = "Internal error from Core"
UPLOAD_TRIES = 5


class Transfer:
    """Sends and fetches encoded values. `trust_pickles` marks them as trusted by this client, see `Fetched`."""

    def __init__(self, rpc: Channel, trust_pickles: bool) -> None:
        self._rpc = rpc
        self.trust_pickles = trust_pickles

    async def fetch(self, payload: payload_pb2.Payload, source: str = "") -> Fetched:
        """Return a payload's encoding; a large one is downloaded. `source` names the value in errors."""
        match payload.WhichOneof("content"):
            case "json":
                data: bytes | bytearray = payload.json.encode()
            case "data":
                data = payload.data
            case _:
                data = await self._download(payload.artifact.artifact_id)
        return Fetched.of(payload, data, source, self.trust_pickles)

    async def _download(self, artifact_id: str) -> bytearray:
        data = bytearray()
        request = made(artifact_pb2.ReadArtifactRequest, artifact_id=artifact_id)
        async for chunk in self._rpc.stream(self._rpc.artifacts.ReadArtifact, request):
            data += chunk.data
        return data

    async def store(self, media_type: str, data: bytes) -> payload_pb2.Payload:
        """Return the payload of an encoding; it is uploaded when it is larger than the server's inline limit.

        Raises RequestError.
        """
        limits = await self._rpc.limits()
        if len(data) <= limits.inline_payload_bytes:
            return payloads.inline(media_type, data)
        artifact = await self._upload(data, limits.upload_chunk_bytes)
        return payload_pb2.Payload(media_type=media_type, artifact=artifact)

    async def _upload(self, data: bytes, chunk_bytes: int) -> payload_pb2.Artifact:
        for _ in range(UPLOAD_TRIES):
            try:
                return (await self._rpc.upload(self._rpc.artifacts.WriteArtifact, _chunks(data, chunk_bytes))).artifact
            except errors.InternalError as error:
                if str(error) != LOST_STATUS:
                    raise
        text = f"the server at {self._rpc.target} ended an upload of {len(data)} bytes before all were sent"
        raise errors.UnavailableError(f"{text}; the server's log may name the cause")


def _chunks(data: bytes, chunk_bytes: int) -> Iterator[artifact_pb2.WriteArtifactRequest]:
    size_bytes: int | None = len(data)
    for start in range(0, len(data), chunk_bytes):
        yield artifact_pb2.WriteArtifactRequest(data=data[start : start + chunk_bytes], size_bytes=size_bytes)
        size_bytes = None
