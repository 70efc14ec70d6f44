"""One end of a connection that the proxy passes on, and the passing on of bytes.

Rule: no more is read than the other side takes.
"""

import asyncio
import contextlib
import json
import socket
from types import TracebackType
from typing import Self

from lattice_worker.egress import tally
from lattice_worker.egress.dialling import Refusal
from lattice_worker.egress.tally import Access

PIECE_BYTES = 64 * 1024
STATUS = {
    tally.NOT_LISTED: "403 Forbidden",
    tally.ADDRESS_REFUSED: "403 Forbidden",
    tally.NAME_DIFFERS: "403 Forbidden",
    tally.MALFORMED: "400 Bad Request",
}
REFUSE_S = 5.0


class Peer:
    """A connected socket, closed at the end of its block."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._access: Access | None = None
        self._has_sent = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()

    def count_into(self, access: Access) -> None:
        """Count the bytes that are sent and received from now on."""
        self._access = access

    async def receive(self) -> bytes:
        """Return the bytes that come next; empty at the end."""
        data = await self._loop.sock_recv(self._sock, PIECE_BYTES)
        if self._access is not None:
            self._access.received_bytes += len(data)
        return data

    async def send(self, data: bytes) -> None:
        """Send bytes, as fast as they are taken."""
        self._has_sent = True
        await self._loop.sock_sendall(self._sock, data)
        if self._access is not None:
            self._access.sent_bytes += len(data)

    def end(self) -> None:
        """Send nothing more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer a request that is refused, unless an answer has begun."""
        if self._has_sent:
            return
        status = STATUS.get(refusal.verdict, "502 Bad Gateway")
        body = json.dumps({"error": {"code": refusal.verdict, "message": str(refusal)}}).encode()
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"X-Lattice-Network: {refusal.verdict}\r\nConnection: close\r\n\r\n"
        )
        async with asyncio.timeout(REFUSE_S):
            await self.send(head.encode() + body)
            self.end()
            # Read the rest of the client's bytes, or the kernel would reset the connection before the client reads the
            # answer.
            while await self.receive():
                pass


async def relay(one: Peer, other: Peer) -> None:
    """Pass bytes both ways until both sides have ended, or one fails."""
    passing = [asyncio.ensure_future(_pass(one, other)), asyncio.ensure_future(_pass(other, one))]
    try:
        await asyncio.gather(*passing)
    finally:
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)


async def _pass(source: Peer, target: Peer) -> None:
    while data := await source.receive():
        await target.send(data)
    target.end()
