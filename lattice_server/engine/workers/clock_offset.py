"""Owns the offset of a worker's clock from the server's. Rule: a time of the worker is never later than its message."""

import math

WINDOW = 16  # Messages after which an older estimate no longer counts: a clock may be set.


class WorkerClock:
    """Times on one worker's clock as times on this server's monotonic clock, in seconds.

    The time between the sending and the receipt of a message is the difference of the clocks and the message's delay.
    The least such time of the last messages has the least delay in it, so it is taken for the difference.
    """

    def __init__(self) -> None:
        self._least = math.inf
        self._least_before = math.inf
        self._count = 0

    def note(self, time_s: float, received_at: float) -> None:
        """Note a message received at `received_at` that tells a time of the worker no later than its sending."""
        if self._count == WINDOW:
            self._least_before, self._least, self._count = self._least, math.inf, 0
        self._count += 1
        self._least = min(self._least, received_at - time_s)

    def at(self, time_s: float) -> float:
        """Return a time of the worker; at least one message must have been noted."""
        return time_s + min(self._least, self._least_before)
