"""The network of a sandbox whose task may connect to some servers: a loopback with listening sockets, and no route.

Rule: the sockets are made in the sandbox's own network namespace and handed to the agent, so that a connection in the
sandbox ends at a proxy outside of it. Nothing else leads out.

Programs reach the proxy by the usual variables. Programs that ignore these find each server that is listed by its name
in `/etc/hosts`: the name has an address of the loopback, and a listening socket that stands for that server alone.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

PROXY_ADDRESS, PROXY_PORT = "127.0.0.1", 3128
HANDOVER = 6  # The descriptor of the socket to the agent, over which the listening sockets go; see `runner.zygote`.
BACKLOG = 128
MAX_SERVERS = 64
MAX_LISTENERS = MAX_SERVERS + 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
NAMES_A_BLOCK = 250

URL = f"http://{PROXY_ADDRESS}:{PROXY_PORT}"
# The sandbox's own servers are reached without the proxy.
DIRECT = "localhost,127.0.0.1,::1"
# `grpc_proxy` is read by gRPC, `NODE_USE_ENV_PROXY` has Node.js read the others.
VARIABLES = {
    **{
        spelled: URL
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
        for spelled in (name, name.upper())
    },
    "no_proxy": DIRECT,
    "NO_PROXY": DIRECT,
    "NODE_USE_ENV_PROXY": "1",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A listening socket of the sandbox. `host` is the server that it stands for; empty for the proxy."""

    address: str
    port: int
    host: str = ""


def endpoints(servers: Sequence[str]) -> list[Endpoint]:
    """Return the listening sockets for the servers of a policy, the proxy's first.

    A server that is listed by `*.NAME` is reached by the proxy only.
    """
    addresses: dict[str, str] = {}
    found = [Endpoint(PROXY_ADDRESS, PROXY_PORT)]
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host.startswith("*."):
            index = len(addresses)
            address = addresses.setdefault(host, f"127.1.{index // NAMES_A_BLOCK}.{index % NAMES_A_BLOCK + 1}")
            found.append(Endpoint(address, int(port), host))
    return found


def hosts(servers: Sequence[str]) -> dict[str, str]:
    """Return the addresses of the servers of a policy in the sandbox, by name."""
    return {each.host: each.address for each in endpoints(servers) if each.host}


def hosts_file(servers: Sequence[str]) -> str:
    """Return the text of `/etc/hosts` in the sandbox."""
    lines = [("127.0.0.1", "localhost"), ("::1", "localhost")]
    lines += [(address, name) for name, address in hosts(servers).items()]
    return "".join(f"{address}\t{name}\n" for address, name in lines)


def hand_over(servers: Sequence[str]) -> None:
    """Make the listening sockets in this process's network namespace, and send them to the agent."""
    _start_loopback()
    made: list[socket.socket] = []
    try:
        for endpoint in endpoints(servers):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            made.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((endpoint.address, endpoint.port))
            sock.listen(BACKLOG)
        with socket.socket(fileno=HANDOVER) as agent:
            socket.send_fds(agent, [b"x"], [sock.fileno() for sock in made])
    finally:
        for sock in made:
            sock.close()


def received(agent: socket.socket, servers: Sequence[str]) -> list[int]:
    """Return the descriptors of the listening sockets that `hand_over` sent; none when it did not.

    `agent` does not block.
    """
    try:
        _, descriptors, _, _ = socket.recv_fds(agent, 1, MAX_LISTENERS)
    except BlockingIOError:
        return []
    if len(descriptors) != len(endpoints(servers)):
        for descriptor in descriptors:
            os.close(descriptor)
        return []
    return descriptors


def interfaces() -> list[str]:
    """Return the network interfaces of this process."""
    with open("/proc/self/net/dev") as file:
        return [line.split(":")[0].strip() for line in file if ":" in line]


def _start_loopback() -> None:
    """Turn the loopback on, unless it is on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(sock, SIOCGIFFLAGS, request), 16)
        if not flags & IFF_UP:
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
