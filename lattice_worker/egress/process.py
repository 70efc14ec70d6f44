"""The process of the proxies of one agent: `python -m lattice_worker.egress.process DESCRIPTOR NETWORKS`.

Rule: it ends when the agent closes the socket, or dies, and when a part of it fails. What sandboxes send is read here
and not in the agent.

The agent sends JSON, one object a packet: `{"open": ID, "servers": [NAME:PORT, ...], "listeners": [[HOST, PORT], ...]}`
with the listening sockets, and `{"close": ID}`. The process sends `{"first": ID, "access": ACCESS}` for the first
connection to a server, and `{"closed": ID, "accesses": [ACCESS, ...]}` once, when no connection is open any more.
"""

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lattice_worker import background
from lattice_worker.egress.addresses import Network, networks_of
from lattice_worker.egress.dialling import Dialler
from lattice_worker.egress.proxy import Listener, Proxy
from lattice_worker.egress.servers import AllowList
from lattice_worker.egress.tally import Access, Tally
from lattice_worker.sandbox import libc
from lattice_worker.sandbox.network import MAX_LISTENERS

PACKET_BYTES = 128 * 1024
THREADS = 64  # That resolve names.


def main() -> None:
    """Serve the agent until it closes the socket."""
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.socket(fileno=int(sys.argv[1])) as control:
        asyncio.run(_serve(control, networks_of(sys.argv[2])))


async def _serve(control: socket.socket, networks: Sequence[Network]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS))
    proxies = Proxies(control, networks)

    def read() -> None:
        data, descriptors, _, _ = socket.recv_fds(control, PACKET_BYTES, MAX_LISTENERS)
        if not data:
            os._exit(0)  # Threads that resolve names are not waited for.
        proxies.take(json.loads(data), descriptors)

    loop.add_reader(control, read)
    await loop.create_future()


class Proxies:
    """The proxies of the attempts that run, by the agent's ids of them."""

    def __init__(self, control: socket.socket, networks: Sequence[Network]) -> None:
        self._control, self._networks = control, networks
        self._open: dict[int, tuple[Proxy, Tally]] = {}

    def take(self, request: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Take one packet of the agent."""
        if (number := request.get("open")) is not None:
            counts = Tally(partial(self._tell_first, number))
            dialler = Dialler(AllowList(request["servers"]), self._networks)
            named = zip(descriptors, request["listeners"], strict=True)
            listeners = [Listener(_listening(descriptor), *server) for descriptor, server in named]
            self._open[number] = Proxy(listeners, dialler, counts, _give_up), counts
            return
        background.start(self._close(request["close"]), _give_up)

    async def _close(self, number: int) -> None:
        proxy, counts = self._open.pop(number)
        await proxy.close()
        self._tell({"closed": number, "accesses": [access.to_json() for access in counts.all()]})

    def _tell_first(self, number: int, access: Access) -> None:
        self._tell({"first": number, "access": access.to_json()})

    def _tell(self, message: dict[str, Any]) -> None:
        # It waits for the agent, which never waits for this process.
        with contextlib.suppress(ConnectionError):
            self._control.send(json.dumps(message).encode())


def _give_up(error: BaseException) -> None:
    """End the process, so that the agent ends the attempts that it serves."""
    os._exit(1)


def _listening(descriptor: int) -> socket.socket:
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    return sock


if __name__ == "__main__":
    main()
