"""Owns the delay before a process that died is started again.

Rule: a process that cannot even start is not started in a tight loop.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """A delay that doubles from `min_s` to `max_s`, and begins anew after a process that lived longer than `max_s`."""

    min_s: float
    max_s: float
    _delay_s: float = 0.0

    def after(self, lived_s: float) -> float:
        """Return the delay after a process that lived for so long."""
        self._delay_s = self.min_s if lived_s > self.max_s else min(self.max_s, max(self.min_s, self._delay_s * 2))
        return self._delay_s
