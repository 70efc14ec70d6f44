"""Connections to servers that are listed. Rule: a name is resolved once, and the address that was judged is dialled."""

import asyncio
import socket
from collections.abc import Callable, Sequence

from lattice_worker.egress import addresses, tally
from lattice_worker.egress.addresses import Network
from lattice_worker.egress.servers import AllowList

RESOLVE_S = 10.0
CONNECT_S = 10.0
MAX_RESOLVING = 4  # Of one attempt, at once: each takes a thread that other attempts need too.


class Refusal(Exception):
    """A connection is refused, or failed."""

    def __init__(self, verdict: str, message: str, address: str = "") -> None:
        super().__init__(message)
        self.verdict, self.message, self.address = verdict, message, address


class Dialler:
    """Connects to servers for one attempt. `networks` are the inner networks that the operator allows."""

    def __init__(
        self,
        servers: AllowList,
        networks: Sequence[Network],
        own: Callable[[], set[str]] = addresses.own_addresses,
    ) -> None:
        self._servers, self._networks, self._own = servers, networks, own
        self._resolving = asyncio.Semaphore(MAX_RESOLVING)

    def check(self, host: str, port: int) -> None:
        """Raise Refusal when a server is not listed."""
        if not self._servers.allows(host, port):
            raise Refusal(tally.NOT_LISTED, f"the task does not list {host}:{port}")

    async def dial(self, host: str, port: int) -> tuple[socket.socket, str]:
        """Return a connection to a server, and its address. Raises Refusal."""
        self.check(host, port)
        found = await self._resolve(host, port)
        own = self._own()
        refusals = {address: addresses.refusal(address, self._networks, own) for _, address in found}
        permitted = [(family, address) for family, address in found if not refusals[address]]
        if not permitted:
            first = found[0][1]
            raise Refusal(tally.ADDRESS_REFUSED, f"{host}: {refusals[first]}", first)
        error: OSError | None = None
        for family, address in permitted:
            try:
                return await _connected(family, address, port), address
            except OSError as failure:
                error = failure
        address = permitted[-1][1]
        raise Refusal(tally.UNREACHABLE, f"{host}:{port} does not answer: {error}", address) from error

    async def _resolve(self, host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        loop = asyncio.get_running_loop()
        try:
            async with self._resolving, asyncio.timeout(RESOLVE_S):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise Refusal(tally.UNRESOLVED, f"{host} cannot be resolved: {error or 'no answer'}") from None
        return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


async def _connected(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(CONNECT_S):
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise OSError(f"no answer within {CONNECT_S:g} s") from None
        raise
    return sock
