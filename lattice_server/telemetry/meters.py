"""Owns the numbers behind the metrics. Rule: counting is a few operations on plain numbers, and converts nothing.

The SDK of OpenTelemetry takes 16 µs for one value of a histogram, and a task that does nothing has six; see decision
0034. So values are counted here, and the SDK gets the totals when they are exported.
"""

import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lattice_server.core.frozen import frozen
from lattice_server.telemetry.catalogue import Instrument

Labels = tuple[str, ...]
OTHER = "_OTHER"
MAX_NAMES = 200
MAX_PENDING = 500


@dataclass(slots=True)
class Distribution:
    """The values of one series of a histogram: how many are in each bucket, and their sum."""

    counts: list[int]
    total: float = 0.0

    def with_values(self, values: Sequence[float], bounds: Sequence[float]) -> "Distribution":
        """Return the numbers with more values. A negative value counts as zero."""
        # Many at once take a fifth of the time of one after the other.
        ordered = sorted(values)
        cumulative = [0, *(bisect_right(ordered, bound) for bound in bounds), len(ordered)]
        counts = [own + cumulative[i + 1] - cumulative[i] for i, own in enumerate(self.counts)]
        return Distribution(counts, self.total + sum(ordered[bisect_left(ordered, 0.0) :]))


Value = float | Distribution


@frozen
class Reading:
    """The numbers of one instrument at one moment, by the values of its labels."""

    instrument: Instrument
    values: Mapping[Labels, Value]


class Counter:
    """Counts by labels, on one thread."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self._values: defaultdict[Labels, float] = defaultdict(int)

    def add(self, *labels: str, by: float = 1) -> None:
        """Add to the count of some labels."""
        self._values[labels] += by

    def read(self) -> Reading:
        """Return the counts."""
        return Reading(self.instrument, dict(self._values))


class Histogram:
    """Distributions by labels. One thread records; any thread reads.

    Values are kept, and counted when there are `MAX_PENDING`.
    """

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self._empty = Distribution([0] * (len(instrument.bounds) + 1))
        self._counted: dict[Labels, Distribution] = {}
        self._pending: dict[Labels, list[float]] = {}
        # So that a reader sees a value either as pending or as counted.
        self._counting = threading.Lock()

    def record(self, value: float, *labels: str) -> None:
        """Add a value to the distribution of some labels. A negative value counts as zero."""
        pending = self._pending.get(labels)
        if pending is None:
            pending = self._pending[labels] = []
        pending.append(value)
        if len(pending) >= MAX_PENDING:
            with self._counting:
                self._counted[labels] = self._with(labels, pending)
                pending.clear()

    def read(self) -> Reading:
        """Return the distributions."""
        with self._counting:
            found = {labels: self._with(labels, list(pending)) for labels, pending in list(self._pending.items())}
        return Reading(self.instrument, found)

    def _with(self, labels: Labels, values: Sequence[float]) -> Distribution:
        return self._counted.get(labels, self._empty).with_values(values, self.instrument.bounds)


class Names:
    """The values of a label that users choose: the first `MAX_NAMES` different ones; later ones are `_OTHER`."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def bounded(self, name: str) -> str:
        """Return the value of the label for a name."""
        found = self._known.get(name)
        if found is None:
            if len(self._known) >= MAX_NAMES:
                return OTHER
            found = self._known[name] = name[:100]
        return found


def totals(instrument: Instrument, values: Sequence[tuple[Labels, float]]) -> Reading:
    """Return a reading of numbers that were not counted here. Values of the same labels are added up."""
    counter = Counter(instrument)
    for labels, value in values:
        counter.add(*labels, by=value)
    return counter.read()
