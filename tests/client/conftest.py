"""A real server with one worker, for the tests that run something."""

from collections.abc import Iterator

import pytest

from lattice_client import LatticeClient
from tests.server.apps import serving_aside


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    """The address of a server with a worker of two CPUs."""
    with serving_aside() as served:
        yield served


@pytest.fixture
def client(address: str) -> Iterator[LatticeClient]:
    """A client of that server."""
    with LatticeClient(address) as connected:
        yield connected
