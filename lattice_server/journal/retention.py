"""Owns the totals of ended runs by tenant. Rule: at every commit the totals are those of the rows."""

from dataclasses import dataclass

from lattice_server.engine.recording.journal_port import JournalRetention


@dataclass(slots=True)
class _Total:
    runs: int = 0
    kept_bytes: int = 0


class EndedTotals:
    """The number and the bytes of the ended runs of each tenant, and their bounds."""

    def __init__(self, retention: JournalRetention) -> None:
        self._retention = retention
        self.runs = 0  # Of all tenants.
        self._totals: dict[str, _Total] = {}

    def add(self, tenant: str, kept_bytes: int, runs: int = 1) -> None:
        """Count a run that has ended, or several."""
        total = self._totals.setdefault(tenant, _Total())
        total.runs += runs
        self.runs += runs
        total.kept_bytes += kept_bytes

    def remove(self, tenant: str, kept_bytes: int) -> None:
        """Count a run no longer."""
        total = self._totals[tenant]
        total.runs -= 1
        self.runs -= 1
        total.kept_bytes -= kept_bytes
        if not total.runs:
            del self._totals[tenant]

    def is_over(self, tenant: str) -> bool:
        """Whether a tenant has too much, and more than one run."""
        total = self._totals.get(tenant)
        if total is None or total.runs < 2:
            return False
        return total.runs > self._retention.runs or total.kept_bytes > self._retention.kept_bytes

    def oldest_s(self, now_s: float) -> float:
        """Return the time before which runs must have ended to be too old."""
        return now_s - self._retention.age_s
