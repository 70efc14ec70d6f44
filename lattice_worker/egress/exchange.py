"""One forwarded request of HTTP, and its answer.

Rule: h11 parses both and writes them anew, so that no bytes pass that the server could parse in another way than the
proxy. There is one request a connection, so that no unchecked request follows.
"""

import asyncio
from urllib.parse import urlsplit

import h11

from lattice_worker import background
from lattice_worker.egress import tally
from lattice_worker.egress.dialling import Refusal
from lattice_worker.egress.servers import authority
from lattice_worker.egress.streams import Peer

MAX_HEAD_BYTES = 64 * 1024
HTTP_PORT = 80
# Of one hop, and not passed on.
HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te", b"trailer", b"upgrade"}
)


def target_of(request: h11.Request) -> tuple[str, int, bytes]:
    """Return the server and the path of a request to a proxy, as `http://NAME:PORT/PATH`. Raises ValueError."""
    found = urlsplit(request.target.decode("ascii"))
    if found.scheme != "http" or not found.netloc or "@" in found.netloc:
        raise ValueError("a proxy takes CONNECT, and requests for http://NAME/")
    host, port = authority(found.netloc, HTTP_PORT)
    path = found.path or "/"
    return host, port, (f"{path}?{found.query}" if found.query else path).encode()


class Exchange:
    """One request of a client, of which `data` was read."""

    def __init__(self, client: Peer, data: bytes = b"") -> None:
        self._client = client
        self.connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        if data:
            self.connection.receive_data(data)

    async def request(self) -> h11.Request:
        """Return the head of the request. Raises h11.ProtocolError."""
        event = await _next(self.connection, self._client)
        if not isinstance(event, h11.Request):
            raise h11.RemoteProtocolError("the connection ended before a request")
        return event

    def checked(self, request: h11.Request, host: str, port: int) -> h11.Request:
        """Return the request to send to a server. Raises Refusal, h11.ProtocolError when it names another one."""
        path = request.target
        if not path.startswith(b"/"):
            try:
                *server, path = target_of(request)
            except ValueError as error:
                raise Refusal(tally.MALFORMED, str(error)) from None
            if server != [host, port]:
                raise Refusal(tally.NAME_DIFFERS, f"the request is for {server[0]}:{server[1]}, and not for {host}")
        named = [value for name, value in request.headers if name == b"host"]
        try:
            if [authority(value.decode("ascii"), HTTP_PORT) for value in named] != [(host, port)]:
                raise ValueError
        except ValueError:
            raise Refusal(tally.NAME_DIFFERS, f"the request's Host is {named[:2]!r}, and not {host}:{port}") from None
        dropped = HOP | {
            part.strip().lower()
            for name, value in request.headers
            if name == b"connection"
            for part in value.split(b",")
        }
        headers = [(name, value) for name, value in request.headers if name not in dropped]
        return h11.Request(method=request.method, target=path, headers=[*headers, (b"connection", b"close")])

    async def run(self, server: Peer, request: h11.Request) -> None:
        """Send the request to a server, and the answer to the client."""
        upstream = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        await server.send(upstream.send(request) or b"")
        sending = background.start(self._send_body(server, upstream), lambda _: server.end())
        try:
            # A server may answer before it has read the whole request.
            await self._pass_answer(server, upstream)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        self._client.end()

    async def _send_body(self, server: Peer, upstream: h11.Connection) -> None:
        """Send the body of the request, or as much of it as the client sends and the server takes."""
        try:
            while isinstance(event := await _next(self.connection, self._client), h11.Data | h11.EndOfMessage):
                await server.send(upstream.send(event) or b"")
                if isinstance(event, h11.EndOfMessage):
                    return
        except (OSError, h11.ProtocolError):
            pass
        # It answers a part of a body, or closes the connection; an answer that it has begun is passed on.
        server.end()

    async def _pass_answer(self, server: Peer, upstream: h11.Connection) -> None:
        while True:
            event = await _next(upstream, server)
            match event:
                case h11.InformationalResponse(status_code=101) | h11.ConnectionClosed():
                    return
                case h11.Response():
                    kept = [(name, value) for name, value in event.headers if name not in HOP]
                    event = h11.Response(
                        status_code=event.status_code,
                        headers=[*kept, (b"connection", b"close")],
                        reason=event.reason,
                    )
            await self._client.send(self.connection.send(event) or b"")
            if isinstance(event, h11.EndOfMessage):
                return


async def _next(connection: h11.Connection, peer: Peer) -> h11.Event:
    """Return the next event of a side."""
    while not isinstance(event := connection.next_event(), h11.Event):
        if event is h11.PAUSED:
            return h11.ConnectionClosed()
        connection.receive_data(await peer.receive())
    return event
