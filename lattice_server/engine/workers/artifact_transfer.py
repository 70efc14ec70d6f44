"""Owns the transfer of large values from their nodes to readers.

Rule: the head stores nothing of them; a slow reader slows down the node that sends.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import uuid4

from lattice_server.core.errors import LatticeError, NotFoundError, UnavailableError
from lattice_server.core.messages import SendArtifact
from lattice_server.engine.stores.artifact_store import HEAD, ArtifactStore
from lattice_server.engine.workers.sessions import Sessions

AHEAD = 4  # Chunks that are buffered for a reader.
RETRY_AFTER_S = 0.5


@dataclass(slots=True)
class _Transfer:
    size_bytes: int
    chunks: "asyncio.Queue[bytes]" = field(default_factory=lambda: asyncio.Queue(AHEAD))
    end: "asyncio.Future[LatticeError | None]" = field(default_factory=asyncio.Future)
    left: "asyncio.Future[None]" = field(default_factory=asyncio.Future)

    def finish(self, error: LatticeError | None) -> None:
        if not self.end.done():
            self.end.set_result(error)


class Transfers:
    """Reads artifacts of any node; lives on the main thread."""

    def __init__(self, store: ArtifactStore, sessions: Sessions) -> None:
        self._store = store
        self._sessions = sessions
        self._open: dict[str, _Transfer] = {}

    async def read(self, artifact_id: str, offset: int) -> AsyncGenerator[bytes]:
        """Yield the bytes of an artifact from `offset` on.

        Raises:
            NotFoundError: no node has it, or its node is gone or sends something else.
            UnavailableError: its node is not connected, or disconnected meanwhile.
        """
        artifact = self._store.held(artifact_id)
        if artifact is None or artifact.node_id == HEAD:
            async for chunk in self._store.read(artifact_id, offset):
                yield chunk
            return
        node_id = artifact.node_id
        session = self._sessions.of_node(node_id)
        if session is None:
            text = f"artifact {artifact_id!r} lay on node {node_id!r}, which is gone"
            raise NotFoundError("ARTIFACT_NOT_FOUND", text, metadata={"node_id": node_id})
        if not session.is_connected:
            raise _unavailable(node_id)
        lacking = max(0, artifact.size_bytes - offset)
        transfer_id, transfer = uuid4().hex, _Transfer(lacking)
        self._open[transfer_id] = transfer
        connection = session.connection

        def give_up() -> None:
            transfer.finish(_unavailable(node_id))

        connection.on_end.append(give_up)
        connection.send(SendArtifact(session.session_id, transfer_id, artifact_id, offset))
        try:
            async for chunk in _until_end(transfer):
                lacking -= len(chunk)
                if lacking < 0:
                    break
                yield chunk
            if lacking > 0:
                raise _broken()
            if lacking < 0:
                raise _other_value()
        finally:
            del self._open[transfer_id]
            transfer.left.set_result(None)
            with suppress(ValueError):
                connection.on_end.remove(give_up)

    async def take(self, transfer_id: str, size_bytes: int | None, chunks: AsyncIterator[bytes | None]) -> None:
        """Pass the chunks of an upload on to their reader; None stands for an artifact that the node does not have.

        `size_bytes` is the size that the node announced, if it did. Raises NotFoundError when no reader waits for them.
        """
        transfer = self._open.get(transfer_id)
        if transfer is None:
            raise NotFoundError("TRANSFER_NOT_FOUND", "no reader waits for this transfer")
        if size_bytes not in {None, transfer.size_bytes}:
            transfer.finish(_other_value())
            return
        receiving = asyncio.ensure_future(_receive(transfer, chunks))
        try:
            # The node need not send to a reader that has left.
            await asyncio.wait({receiving, transfer.left}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
        finally:
            receiving.cancel()
            transfer.finish(_broken())


async def _receive(transfer: _Transfer, chunks: AsyncIterator[bytes | None]) -> None:
    async for chunk in chunks:
        if chunk is None:
            text = "the node that should have the artifact has it no longer"
            transfer.finish(NotFoundError("ARTIFACT_NOT_FOUND", text))
            return
        await transfer.chunks.put(chunk)
    transfer.finish(None)


async def _until_end(transfer: _Transfer) -> AsyncIterator[bytes]:
    while True:
        while not transfer.chunks.empty():
            yield transfer.chunks.get_nowait()
        if transfer.end.done():
            if (error := transfer.end.result()) is not None:
                raise error
            return
        coming = asyncio.ensure_future(transfer.chunks.get())
        try:
            await asyncio.wait((coming, transfer.end), return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                yield coming.result()
        finally:
            coming.cancel()


def _broken() -> UnavailableError:
    return UnavailableError("NODE_UNAVAILABLE", "the upload broke off", retry_after_s=RETRY_AFTER_S)


def _other_value() -> NotFoundError:
    """Return the error for a value whose size differs from the reported one: it is another value."""
    return NotFoundError("ARTIFACT_NOT_FOUND", "the node has another number of bytes of it than it reported")


def _unavailable(node_id: str) -> UnavailableError:
    text = f"node {node_id!r} is not connected"
    return UnavailableError("NODE_UNAVAILABLE", text, retry_after_s=RETRY_AFTER_S)
