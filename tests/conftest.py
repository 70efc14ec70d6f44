"""Owns the rules of all tests.

With LATTICE_REQUIRE_ALL=1, as in CI, a skip is a failure, unless it waits for a GPU. With `-n 2
--dist loadgroup` one process has the tests of clusters, which wait most of the time, and the other has the rest.
`lattice stop` of one finds no server of the other.
"""

import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Hundreds of Python processes are started; each would compile Lattice where the environment keeps byte code from disk.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

REQUIRE_ALL = os.environ.get("LATTICE_REQUIRE_ALL") == "1"

CLUSTERS = frozenset({"test_cluster.py", "test_cluster_on_ray.py", "test_ray_cluster.py", "test_ray_beside.py"})


@pytest.fixture(scope="session", autouse=True)
def _own_records() -> Iterator[None]:
    """A folder of its own for the records of running servers and workers, which `lattice stop` reads."""
    with tempfile.TemporaryDirectory(prefix="lattice-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for that of a socket in it."""
    with tempfile.TemporaryDirectory(prefix="lattice-t-") as folder:
        yield Path(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which process a test belongs to."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("clusters" if item.path.name in CLUSTERS else "others"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the report of a skipped test into one of a failure."""
    report = yield
    is_expected = hasattr(report, "wasxfail") or item.get_closest_marker("gpu") is not None
    if REQUIRE_ALL and report.skipped and not is_expected:
        report.outcome = "failed"
        report.longrepr = _complaint(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Do the same for a module that skips itself as a whole."""
    report = yield
    if REQUIRE_ALL and report.skipped:
        report.outcome = "failed"
        report.longrepr = _complaint(report)
    return report


def _complaint(report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return f"LATTICE_REQUIRE_ALL=1 allows no skipped test. {reason}"
