"""The proxy of one attempt: takes its connections, and forwards TLS and HTTP to the listed servers.

Rule: a connection reaches a server only after its name was found in the list, and TLS or HTTP named the same server.
Data from the sandbox is hostile: each step has a limit of size and of time, and a slow side slows the other.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import h11

from lattice_worker import background
from lattice_worker.egress import tally
from lattice_worker.egress.dialling import Dialler, Refusal
from lattice_worker.egress.exchange import Exchange, target_of
from lattice_worker.egress.server_name import HANDSHAKE, HelloError, HelloReader
from lattice_worker.egress.servers import authority
from lattice_worker.egress.streams import Peer, relay
from lattice_worker.egress.tally import Tally

# Of one attempt, at once; more wait until they are accepted.
MAX_CONNECTIONS = 64
HEAD_S = 10.0  # For a request's head, or a hello.
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket in the network of a sandbox. `host` is the server it stands for; empty for the proxy."""

    sock: socket.socket
    host: str = ""
    port: int = 0


class Proxy:
    """Serves the listeners of one attempt, until it is closed. `on_failure` is called when it accepts no more."""

    def __init__(
        self, listeners: Sequence[Listener], dialler: Dialler, counts: Tally, on_failure: background.OnFailure
    ) -> None:
        self._listeners, self._dialler, self._counts = listeners, dialler, counts
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self._serving: set[asyncio.Task[None]] = set()
        self._accepting = [background.start(self._accept(listener), on_failure) for listener in listeners]

    async def close(self) -> None:
        """End all connections."""
        tasks = [*self._accepting, *self._serving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.sock.close()

    async def _accept(self, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._free.acquire()
            try:
                sock, _ = await loop.sock_accept(listener.sock)
            except OSError:  # The connection was given up meanwhile, or descriptors have run out.
                self._free.release()
                await asyncio.sleep(0.1)  # The kernel says again at once that one waits.
                continue
            except BaseException:
                self._free.release()
                raise
            # An error of one connection is no other's.
            task = background.start(self._serve(sock, listener), background.only_log)
            self._serving.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._free.release()

    async def _serve(self, sock: socket.socket, listener: Listener) -> None:
        with contextlib.suppress(OSError, h11.ProtocolError, TimeoutError):
            async with Peer(sock) as client:
                try:
                    if listener.host:
                        await self._serve_server(client, listener.host, listener.port, b"")
                    else:
                        await self._serve_proxy(client)
                except Refusal as refusal:
                    await client.refuse(refusal)

    async def _serve_proxy(self, client: Peer) -> None:
        """Take a request to the proxy: `CONNECT NAME:PORT`, or a request for `http://NAME/`."""
        exchange = Exchange(client)
        try:
            async with asyncio.timeout(HEAD_S):
                request = await exchange.request()
                if request.method == b"CONNECT":
                    host, port = authority(request.target.decode("ascii"))
                else:
                    host, port, _ = target_of(request)
        except (TimeoutError, ValueError, h11.ProtocolError) as error:
            message = f"no request to a proxy: {str(error) or f'not complete within {HEAD_S:g} s'}"
            self._counts.note("", 0, tally.MALFORMED, message)
            raise Refusal(tally.MALFORMED, message) from None
        if request.method == b"CONNECT":
            rest, _ = exchange.connection.trailing_data
            await self._serve_server(client, host, port, rest, ESTABLISHED)
            return
        with self._counting(host, port):
            self._dialler.check(host, port)
            request = exchange.checked(request, host, port)
            sock, address = await self._dialler.dial(host, port)
        async with Peer(sock) as server:
            server.count_into(self._counts.note(host, port, tally.ALLOWED, "", address))
            await exchange.run(server, request)

    async def _serve_server(self, client: Peer, host: str, port: int, data: bytes, greeting: bytes = b"") -> None:
        """Serve a connection that is meant for one server, of which `data` was read. It is answered by `greeting`."""
        with self._counting(host, port):
            sock, address = await self._dialler.dial(host, port)
        async with Peer(sock) as server:
            if greeting:
                await client.send(greeting)
            exchange, request = None, None
            with self._counting(host, port):
                async with _limited():
                    data = data or await client.receive()
                    if not data:
                        raise Refusal(tally.MALFORMED, "closed before anything was sent")
                    if data[0] == HANDSHAKE:
                        data = await _checked_hello(client, host, data)
                    else:
                        exchange = Exchange(client, data)
                        request = exchange.checked(await exchange.request(), host, port)
            server.count_into(self._counts.note(host, port, tally.ALLOWED, "", address))
            if exchange is not None and request is not None:
                await exchange.run(server, request)
            else:
                await server.send(data)
                await relay(client, server)

    @contextlib.contextmanager
    def _counting(self, host: str, port: int) -> Iterator[None]:
        """Count the refusal that the block raises."""
        try:
            yield
        except h11.ProtocolError as error:
            message = f"neither TLS nor a request: {error}"
            self._counts.note(host, port, tally.MALFORMED, message)
            raise Refusal(tally.MALFORMED, message) from None
        except Refusal as refusal:
            self._counts.note(host, port, refusal.verdict, refusal.message, refusal.address)
            raise


async def _checked_hello(client: Peer, host: str, data: bytes) -> bytes:
    """Return the bytes of a TLS hello that begins with `data`. Raises Refusal when it names another server."""
    reader, part = HelloReader(), data
    try:
        while (name := reader.feed(part)) is None:
            if not (part := await client.receive()):
                raise HelloError("closed within the first TLS message")
            data += part
    except HelloError as error:
        raise Refusal(tally.MALFORMED, str(error)) from None
    if name != host:
        raise Refusal(tally.NAME_DIFFERS, f"TLS asks for {name[:100] or 'no server'!r}, and not for {host!r}")
    return data


@contextlib.asynccontextmanager
async def _limited() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(HEAD_S):
            yield
    except TimeoutError:
        raise Refusal(tally.MALFORMED, f"neither TLS nor a request within {HEAD_S:g} s") from None
