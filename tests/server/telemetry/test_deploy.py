"""The dashboard and the alerts: each query names metrics, labels and values that exist."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_server.core.messages import ForgetSession
from lattice_server.core.model import FailureKind
from lattice_server.telemetry import catalogue
from lattice_server.telemetry.catalogue import INSTRUMENTS, Kind
from lattice_server.telemetry.prometheus import sample_name
from lattice_server.telemetry.run_meter import RunMeter

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
ALERTS = DEPLOY / "prometheus-alerts.yml"
TESTS = DEPLOY / "prometheus-alerts.test.yml"
NAME = re.compile(r"\b(?:lattice|rpc|process)_[a-z_]+\b")
LABELS = re.compile(r"((?:lattice|rpc|process)_[a-z_]+)\{([^}]*)\}")
BY = re.compile(r"by \(([^)]*)\)")
# Prometheus adds them to each series.
OF_TARGETS = {"job", "instance"}
SUFFIXES = ("_bucket", "_sum", "_count")


def samples() -> dict[str, set[str]]:
    """Return the labels of each sample of the catalogue."""
    found: dict[str, set[str]] = {}
    for instrument in INSTRUMENTS:
        labels = {label.replace(".", "_") for label in instrument.labels}
        suffixes = SUFFIXES if instrument.kind is Kind.HISTOGRAM else ("",)
        for suffix in suffixes:
            found[sample_name(instrument) + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def panel_queries() -> Iterator[str]:
    """Yield the queries of the dashboard."""
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def queries() -> Iterator[str]:
    """Yield the queries of the dashboard and of the alerts."""
    yield from panel_queries()
    yield from re.findall(r"expr: (?:>-\n)?(.*?)\n +(?:for|labels):", ALERTS.read_text(), re.DOTALL)


def test_each_query_names_metrics_and_labels_of_the_catalogue() -> None:
    known, all_queries = samples(), list(queries())
    assert len(all_queries) > 30
    for query in all_queries:
        labels_of_names = re.sub(r"by \([^)]*\)|\{[^}]*\}", "", query)
        named = set(NAME.findall(labels_of_names))
        assert named <= known.keys(), query
        for by in BY.findall(query):
            grouped = {label.strip() for label in by.split(",")} - OF_TARGETS
            assert grouped <= set().union(*(known[name] for name in named)), query
        for name, labels in LABELS.findall(query):
            assert set(re.findall(r"(\w+)=", labels)) <= known[name] | OF_TARGETS, query


def test_kinds_of_failures_in_alerts_exist() -> None:
    kinds = set(re.findall(r'failure_kind="(\w+)"', ALERTS.read_text()))
    assert len(kinds) == 2
    assert kinds <= {kind.value for kind in FailureKind}


def test_event_of_a_lost_worker_in_alerts_is_the_one_that_is_counted() -> None:
    meter = RunMeter()
    meter.perform(ForgetSession("s"))
    (counted,) = [reading.values for reading in meter.read() if reading.instrument is catalogue.SESSIONS]
    found = re.findall(r'lattice_worker_sessions_total\{event="(\w+)"\}', ALERTS.read_text())
    assert found
    assert {(event,) for event in found} == counted.keys()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="scripts/install_missing.sh prometheus")
@pytest.mark.exhaustive
@pytest.mark.parametrize("check", [("check", ALERTS), ("test", TESTS)])
def test_promtool_accepts_the_alerts_and_their_tests(check: tuple[str, Path]) -> None:
    command = ["promtool", check[0], "rules", check[1].name]
    checked = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
