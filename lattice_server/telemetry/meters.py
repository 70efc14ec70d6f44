"""Owns the numbers behind the metrics. Rule: counting is a few operations on plain numbers, and converts nothing.

The SDK of OpenTelemetry takes 16 µs for one value of a histogram, and a task that does nothing has six; see decision
0034. So values are counted here, and the SDK gets the totals when they are exported.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lattice_server.telemetry.catalogue import Instrument

Labels = tuple[str, ...]
OTHER = "_OTHER"
MAX_NAMES = 200


@dataclass(slots=True)
class Distribution:
    """The values of one series of a histogram: how many are in each bucket, and their sum."""

    counts: list[int]
    total: float = 0.0

    def copy(self) -> "Distribution":
        """Return the present numbers."""
        return Distribution(list(self.counts), self.total)


Value = float | Distribution


@dataclass(frozen=True, slots=True)
class Reading:
    """The numbers of one instrument at one moment, by the values of its labels."""

    instrument: Instrument
    values: Mapping[Labels, Value]


@dataclass(slots=True, eq=False)
class Counter:
    """Counts by labels, on one thread."""

    instrument: Instrument
    _values: dict[Labels, float] = field(default_factory=dict)

    def add(self, *labels: str, by: float = 1) -> None:
        """Add to the count of some labels."""
        self._values[labels] = self._values.get(labels, 0) + by

    def read(self) -> Reading:
        """Return the counts."""
        return Reading(self.instrument, dict(self._values))


@dataclass(slots=True, eq=False)
class Histogram:
    """Distributions by labels, on one thread."""

    instrument: Instrument
    _values: dict[Labels, Distribution] = field(default_factory=dict)

    def record(self, value: float, *labels: str) -> None:
        """Add a value to the distribution of some labels. A negative value counts as zero."""
        found = self._values.get(labels)
        bounds = self.instrument.bounds
        if found is None:
            found = self._values[labels] = Distribution([0] * (len(bounds) + 1))
        value = max(value, 0.0)
        found.counts[bisect_left(bounds, value)] += 1
        found.total += value

    def read(self) -> Reading:
        """Return the distributions."""
        return Reading(self.instrument, {labels: found.copy() for labels, found in list(self._values.items())})


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
