"""Owns what holds for all tests.

With LATTICE_REQUIRE_ALL=1, as in CI, a skip is a failure, unless it waits for a GPU. Files run in several processes at
once: those that take minutes begin first, and `lattice stop` of one process finds no server of another.
"""

import os
import tempfile
from collections.abc import Generator, Iterator

import pytest

REQUIRE_ALL = os.environ.get("LATTICE_REQUIRE_ALL") == "1"

LONGEST = ["test_cluster_on_ray.py", "test_cluster.py", "test_ray_cluster.py", "test_ray_beside.py"]


@pytest.fixture(scope="session", autouse=True)
def _own_records() -> Iterator[None]:
    """A folder for the notes by which `lattice stop` finds what runs."""
    with tempfile.TemporaryDirectory(prefix="lattice-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


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
