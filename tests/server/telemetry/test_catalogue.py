"""The list of metrics: the golden file, the page, and the metrics that a server exports."""

import re
from pathlib import Path

from lattice_server.telemetry.catalogue import INSTRUMENTS, Kind
from lattice_server.telemetry.listing import lines, table

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent / "metrics.txt"
FORBIDDEN = ("run", "attempt", "lease", "session", "worker", "id")


def test_catalogue_is_the_golden_file() -> None:
    # A name that was released never changes its meaning: a dashboard refers to it.
    assert "\n".join(lines()) + "\n" == GOLDEN.read_text()


def test_page_has_the_table_of_the_catalogue() -> None:
    page = (ROOT / "docs" / "telemetry.md").read_text()
    assert page.endswith("\n".join(table()) + "\n")


def test_names_are_unique_and_follow_the_conventions() -> None:
    names = [instrument.name for instrument in INSTRUMENTS]
    assert len(set(names)) == len(names)
    for instrument in INSTRUMENTS:
        assert re.fullmatch(r"(lattice|rpc|process)(\.[a-z_]+)+", instrument.name)
        # They are appended for Prometheus.
        assert not re.search(r"(total|seconds|bytes|count)$", instrument.name) or instrument.unit.startswith("{")
        assert instrument.unit in {"s", "By"} or re.fullmatch(r"\{[a-z_]+\}", instrument.unit)
        assert not set(FORBIDDEN) & {label.split(".")[-1] for label in instrument.labels}
        assert instrument.description.endswith(".")


def test_buckets_rise_when_an_instrument_is_a_histogram() -> None:
    for instrument in INSTRUMENTS:
        assert bool(instrument.bounds) == (instrument.kind is Kind.HISTOGRAM)
        assert list(instrument.bounds) == sorted(set(instrument.bounds))
