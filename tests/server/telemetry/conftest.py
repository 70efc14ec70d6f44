"""A port for programs that cannot pick one themselves."""

import pytest

from tests.ports import free_port


@pytest.fixture
def unused_port() -> int:
    """Return a port of the loopback interface on which nothing listens."""
    return free_port()
