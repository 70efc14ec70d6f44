"""The checks of a program: whether its own processes listen, whether they answer, how many connections they serve."""

import asyncio
import http.client
import socket
from pathlib import Path

import psutil

LISTEN, ESTABLISHED = "0A", "01"  # As /proc/net/tcp writes the states of connections.


class CheckError(Exception):
    """A check failed; its text says why."""


async def check(host: str, port: int, path: str, timeout_s: float) -> None:
    """Connect to a program, and with a path ask for it by HTTP. Raises CheckError."""
    await asyncio.to_thread(_check, host, port, path, timeout_s)


def _check(host: str, port: int, path: str, timeout_s: float) -> None:
    try:
        if not path:
            socket.create_connection((host, port), timeout_s).close()
            return
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            status = connection.getresponse().status
        finally:
            connection.close()
    except ConnectionRefusedError as error:
        raise CheckError(f"it does not listen on port {port}") from error
    except (OSError, http.client.HTTPException) as error:
        raise CheckError(f"{host}:{port}{path} does not answer: {type(error).__name__}: {error}") from error
    if not 200 <= status < 400:
        raise CheckError(f"{host}:{port}{path} answers with status {status}")


def check_owner(pid: int, port: int) -> None:
    """Raise CheckError unless a process of the tree below `pid` listens on a port; another one may have taken it."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.Error as error:
        raise CheckError(f"the program has ended: {error}") from error
    for process in tree:
        try:
            found = process.net_connections(kind="tcp")
        except psutil.Error:
            continue  # It ended meanwhile.
        if any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found):
            return
    raise CheckError(f"another program listens on port {port}")


def connections_to(port: int) -> int:
    """Return how many connections to a port of this machine are open; the kernel's table costs less than psutil's."""
    count = 0
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_ = line.split()
            count += state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port
    return count
