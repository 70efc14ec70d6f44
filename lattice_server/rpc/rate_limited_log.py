"""Limits log lines about refused calls, so that unauthenticated callers cannot fill the disk."""

import logging
import time
from collections.abc import Callable

PERIOD_S = 10.0
LINES = 20


class RateLimitedLog:
    """Writes a few lines in each period, then the number of lines it left out."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._ends_at = 0.0
        self._lines = 0

    def info(self, text: str, *values: object) -> None:
        """Write a line, unless the period has had enough of them."""
        now = self._clock()
        if now >= self._ends_at:
            if self._lines > LINES:
                self._log.info("left out %d lines like these", self._lines - LINES)
            self._ends_at, self._lines = now + PERIOD_S, 0
        self._lines += 1
        if self._lines <= LINES:
            self._log.info(text, *values)
