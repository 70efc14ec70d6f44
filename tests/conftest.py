"""Owns the rules of all tests.

With LATTICE_REQUIRE_ALL=1, as in CI, a skip is a failure, unless it waits for a GPU. `make test` runs several
processes; `lattice stop` of one finds no server of another.
"""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import leftovers
from tests.examples import share

# Hundreds of Python processes are started; each would compile Lattice where the environment keeps byte code from disk.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Modules and tests are kept to the end: collections of garbage begin with the first test.
gc.disable()

# Tests serve in their own process, which starts workers: see `lattice_server/__init__.py`. Read when gRPC is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# No test asserts how fast something is.
hypothesis.settings.register_profile("lattice", deadline=None, max_examples=share(2000))
hypothesis.settings.load_profile("lattice")

# Where tests kill servers and workers, whose folders stay until the next one starts.
KILLS = {"e2e", "worker", "sandbox", "containers"}
REQUIRE_ALL = os.environ.get("LATTICE_REQUIRE_ALL") == "1"


@pytest.fixture(scope="session", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of its own for temporary files, and for the pid files that `lattice stop` reads."""
    tmp_path_factory.getbasetemp()  # It stays where pytest keeps the folders of failed tests.
    # A short path: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="lt-") as folder, pytest.MonkeyPatch.context() as patch:
        own = Path(folder)
        own.chmod(0o1777)
        (own / leftovers.RUN).mkdir(0o700)
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("XDG_RUNTIME_DIR", str(own / leftovers.RUN))
        patch.setenv("XDG_DATA_HOME", str(own / leftovers.RUN))
        yield own
        left = leftovers.left(own)
    assert not left, f"the tests of this process left {left}"


@pytest.fixture(autouse=True)
def _no_store_is_left(request: pytest.FixtureRequest, _own_folder: Path) -> Iterator[None]:
    """Have each server delete its folders; a killed one cannot: see KILLS."""
    before = leftovers.folders(_own_folder)
    yield
    if not KILLS & {*request.path.parts}:
        left = leftovers.unlocked(_own_folder) - before
        assert not left, f"no server has {left} any more"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for that of a socket in it."""
    with tempfile.TemporaryDirectory(prefix="lattice-t-") as folder:
        yield Path(folder)


def pytest_configure() -> None:
    """Have Ctrl-C reach the programs that tests start: a shell starts background jobs with the signal ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
    gc.freeze()  # Also the little garbage of the imports, which would take half a second to find.


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
