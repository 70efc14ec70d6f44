"""Ports for servers that are started later, or again.

Rule: none is in the range from which the system takes the ports of outgoing connections. Between the choice and the
start, a connection of another process could take such a port.
"""

import random
import socket
from contextlib import suppress
from pathlib import Path

FIRST = 10_000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    end = int(RANGE.read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(FIRST, end)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
