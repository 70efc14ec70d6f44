"""The agent's side of the network of one sandbox: takes its listening sockets, and has a proxy serve them.

Rule: a sandbox that is to have a network and did not hand over its listening sockets is refused.
"""

import os
import socket
from collections.abc import Callable, Sequence

from lattice_worker.egress.agent import Access, Connection, Egress
from lattice_worker.sandbox.network import endpoints, received


class SandboxNetwork:
    """The network of one sandbox; none without `servers`."""

    def __init__(self, servers: Sequence[str], egress: Egress | None) -> None:
        self._servers, self._egress = servers, egress
        self._agent: socket.socket | None = None
        self._listeners: list[int] = []
        self.connection: Connection | None = None

    def handover(self) -> socket.socket | None:
        """Return the socket over which the process sends its listening sockets; None without a network."""
        if not self._servers:
            return None
        self._agent, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._agent.setblocking(False)
        return theirs

    def missing(self) -> list[str]:
        """Take the listening sockets of a process that has sealed itself; return the missing ones, for people."""
        if self._agent is not None:
            with self._agent:
                self._listeners = received(self._agent, self._servers)
            self._agent = None
        return ["the listening sockets of its network"] if self._servers and not self._listeners else []

    def open(self, on_access: Callable[[Access], None], on_lost: Callable[[], None]) -> None:
        """Have the connections of the process served from now on."""
        if self._listeners and self._egress is not None:
            given, self._listeners = self._listeners, []
            self.connection = self._egress.open(self._servers, endpoints(self._servers), given, on_access, on_lost)

    def close(self) -> None:
        """Close the sockets of the process, unless the proxy serves them."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        for descriptor in self._listeners:
            os.close(descriptor)
        self._listeners = []
