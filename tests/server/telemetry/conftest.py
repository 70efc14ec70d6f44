"""A port for programs that cannot pick one themselves."""

import socket

import pytest


@pytest.fixture
def unused_port() -> int:
    """Return a port of the loopback interface on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port
