"""Counting: labels, buckets, and the bound of names."""

import pytest

from lattice_server.telemetry.catalogue import Instrument, Kind
from lattice_server.telemetry.meters import MAX_NAMES, OTHER, Counter, Distribution, Histogram, Names, totals

COUNTED = Instrument("lattice.x", Kind.COUNTER, "{x}", ("a", "b"), "X.")
MEASURED = Instrument("lattice.y", Kind.HISTOGRAM, "s", ("a",), "Y.", (0.1, 1.0, 10.0))


def test_counter_counts_by_labels() -> None:
    counter = Counter(COUNTED)
    counter.add("p", "q")
    counter.add("p", "q", by=2)
    counter.add("p", "r")
    assert counter.read().values == {("p", "q"): 3, ("p", "r"): 1}


@pytest.mark.parametrize(
    ("value", "bucket"), [(-1, 0), (0, 0), (0.1, 0), (0.11, 1), (1.0, 1), (9, 2), (10, 2), (11, 3)]
)
def test_histogram_puts_a_value_into_the_first_bucket_whose_bound_is_not_below_it(value: float, bucket: int) -> None:
    histogram = Histogram(MEASURED)
    histogram.record(value, "p")
    counts = [0, 0, 0, 0]
    counts[bucket] = 1
    assert histogram.read().values == {("p",): Distribution(counts, max(value, 0))}


def test_reading_stays_the_same_when_more_is_recorded() -> None:
    histogram, counter = Histogram(MEASURED), Counter(COUNTED)
    histogram.record(1.0, "p")
    counter.add("p", "q")
    readings = histogram.read(), counter.read()
    histogram.record(1.0, "p")
    counter.add("p", "q")
    assert readings[0].values == {("p",): Distribution([0, 1, 0, 0], 1.0)}
    assert readings[1].values == {("p", "q"): 1}


def test_names_become_other_when_there_are_too_many() -> None:
    names = Names()
    first = [names.bounded(f"n{number}") for number in range(MAX_NAMES)]
    assert first == [f"n{number}" for number in range(MAX_NAMES)]
    assert names.bounded("one more") == OTHER
    assert names.bounded("n7") == "n7"


def test_name_is_cut_when_it_is_long() -> None:
    assert Names().bounded("x" * 1000) == "x" * 100


def test_totals_adds_values_of_the_same_labels() -> None:
    assert totals(COUNTED, [(("p", "q"), 1), (("p", "q"), 2)]).values == {("p", "q"): 3}
