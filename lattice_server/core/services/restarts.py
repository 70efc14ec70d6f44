"""Owns when a service starts instances again after failures. Rule: a service that has been ready once never gives up.

The wait doubles with each failure in a row. Which part of it is taken depends on the number of the instance, so that
services that failed together are not started together, and a replay decides the same.
"""

from lattice_server.core.services.model import OWN_FAILURES, PERMANENT, ServiceFailure

FIRST_S, MAX_S = 1.0, 300.0
# An instance that was ready for this long begins the count anew.
STABLE_S = 600.0
# So many failures in a row end the attempts to start a definition that was never ready.
MAX_FAILURES = 5
_SPREAD = 0.25


class Restarts:
    """The failures in a row of one definition."""

    def __init__(self) -> None:
        self.failures = 0
        self.not_before: float | None = None
        self.given_up: ServiceFailure | None = None
        self.last: ServiceFailure | None = None
        self._has_been_ready = False

    def ready(self) -> None:
        """Note that an instance became ready."""
        self._has_been_ready = True
        self.last = None

    def has_told(self, known: int) -> bool:
        """Whether the program failed by itself, after `known` failures, and was never ready: a caller shall know."""
        is_own = self.last is not None and self.last.kind in OWN_FAILURES
        return is_own and self.failures > known and not self._has_been_ready

    def failed(self, failure: ServiceFailure, number: int, ready_s: float, now: float) -> None:
        """Note that instance `number` failed after it had been ready for `ready_s` seconds."""
        if ready_s >= STABLE_S:
            self.failures = 0
        self.failures += 1
        self.last = failure
        if not self._has_been_ready and (failure.kind in PERMANENT or self.failures >= MAX_FAILURES):
            self.given_up = failure
            self.not_before = None
            return
        wait_s = min(MAX_S, FIRST_S * 2 ** min(self.failures - 1, 16))
        # 7 and 16 have no common factor, so that numbers in a row are spread over the whole range.
        self.not_before = now + wait_s * (1 + _SPREAD * ((number * 7 % 16) / 8 - 1))

    def may_start(self, now: float) -> bool:
        """Whether an instance may be started now."""
        return self.given_up is None and (self.not_before is None or now >= self.not_before)

    def started(self) -> None:
        """Note that instances were started."""
        self.not_before = None
