"""Owns the rules of all tests.

With LATTICE_REQUIRE_ALL=1, as in CI, a skip is a failure, unless it waits for a GPU. `make test` runs several
processes; `lattice stop` of one finds no server of another.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.examples import share

# Hundreds of Python processes are started; each would compile Lattice where the environment keeps byte code from disk.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What is imported and collected is kept: collections of garbage begin with the first test.
gc.disable()

# Tests serve in their own process, which starts workers: see `lattice_server/__init__.py`. Read when gRPC is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# No test asserts how fast something is.
hypothesis.settings.register_profile("lattice", deadline=None, max_examples=share(2000))
hypothesis.settings.load_profile("lattice")

REQUIRE_ALL = os.environ.get("LATTICE_REQUIRE_ALL") == "1"


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a group in one process, and start the groups in their order."""
    from tests.groups import Groups

    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """In one of several processes, have what takes longest begin first."""
    yield
    if hasattr(config, "workerinput"):
        from tests.groups import rank_of

        items.sort(key=lambda item: rank_of(item.nodeid))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exempt all tests and modules from garbage collections: one that looks through them takes a quarter of a second.

    Each server in a test makes one when it starts.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


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
