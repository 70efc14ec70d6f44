"""Real servers behind a real channel: one without workers, one with a worker."""

from collections.abc import Iterator

import pytest

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling


@pytest.fixture(scope="package")
def idle() -> Iterator[Caller]:
    """A server without workers: tasks stay queued."""
    with serving_aside(NoWorkers()) as address, calling(address) as caller:
        yield caller


@pytest.fixture(scope="package")
def busy() -> Iterator[Caller]:
    """A server with one worker of two CPUs."""
    with serving_aside() as address, calling(address) as caller:
        yield caller
