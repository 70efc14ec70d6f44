"""A worker that the tests of this package share."""

from collections.abc import Iterator

import pytest

from tests.worker.shared import SharedWorker


@pytest.fixture(scope="package")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """A worker of two CPUs for scenarios that do not depend on a new one."""
    shared = SharedWorker(tmp_path_factory.mktemp("worker"))
    yield shared
    shared.close()
