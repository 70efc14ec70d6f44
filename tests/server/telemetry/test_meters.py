"""Counting: labels, buckets, and the bound of names."""

import threading

import pytest

from lattice_server.telemetry.catalogue import Instrument, Kind
from lattice_server.telemetry.meters import (
    MAX_NAMES,
    MAX_PENDING,
    OTHER,
    Counter,
    Distribution,
    Histogram,
    Names,
    totals,
)

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


def test_histogram_counts_each_value_once_when_it_has_many() -> None:
    histogram = Histogram(MEASURED)
    values = [number / 100 for number in range(-10, 2 * MAX_PENDING)]
    for number, value in enumerate(values):
        histogram.record(value, "p")
        if number % 97 == 0:
            assert sum(histogram.read().values[("p",)].counts) == number + 1
    found = histogram.read().values[("p",)]
    assert found.counts == [21, 90, len(values) - 111, 0]
    assert found.total == pytest.approx(sum(value for value in values if value > 0))


def test_histogram_is_read_while_another_thread_records() -> None:
    histogram, count = Histogram(MEASURED), 20 * MAX_PENDING
    recording = threading.Thread(target=lambda: [histogram.record(1.0, "p") for _ in range(count)])
    recording.start()
    totals = []
    while recording.is_alive():
        totals += [sum(found.counts) for found in histogram.read().values.values()]
    recording.join()
    assert totals == sorted(totals)
    assert histogram.read().values == {("p",): Distribution([0, count, 0, 0], float(count))}


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
