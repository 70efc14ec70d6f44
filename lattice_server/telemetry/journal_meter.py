"""Counts the commits of the journal, on its thread; the main thread reads the numbers."""

from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Counter, Histogram, Reading


class JournalMeter:
    """An observer of the journal's thread."""

    def __init__(self) -> None:
        self._commit, self._lag = Histogram(catalogue.JOURNAL_COMMIT), Histogram(catalogue.JOURNAL_LAG)
        self._records, self._bytes = Counter(catalogue.JOURNAL_RECORDS), Counter(catalogue.JOURNAL_BYTES)

    def note_commit(self, records: int, size_bytes: int, duration_s: float, lag_s: float) -> None:
        """Count a commit; see `OnCommit`."""
        self._commit.record(duration_s)
        self._lag.record(lag_s)
        self._records.add(by=records)
        self._bytes.add(by=size_bytes)

    def read(self) -> list[Reading]:
        """Return all numbers."""
        return [meter.read() for meter in (self._commit, self._lag, self._records, self._bytes)]
