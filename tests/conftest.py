"""Owns one rule for all tests: with LATTICE_REQUIRE_ALL=1, as in CI, a skip is a failure, unless it waits for a GPU."""

import os
from collections.abc import Generator

import pytest

REQUIRE_ALL = os.environ.get("LATTICE_REQUIRE_ALL") == "1"


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
