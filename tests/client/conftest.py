"""A real server with one worker, for the tests that run something."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_client import LatticeClient, Run
from tests.client.shell import gated, greet
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


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A named pipe: a reader blocks until a writer opens it."""
    os.mkfifo(tmp_path / "gate")
    return tmp_path / "gate"


@pytest.fixture
def waiting(client: LatticeClient, gate: Path) -> Iterator[Run]:
    """A run whose first task waits at the gate, with more tasks than a small terminal has lines behind it."""
    workflow = client.create_workflow("waiting")
    first = workflow.add_task(gated, {"gate": str(gate)})
    for _ in range(20):
        workflow.add_task(greet, {"name": first.output})
    run = workflow.run()
    yield run
    client.cancel_run(run)
