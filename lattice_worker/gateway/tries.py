"""Owns which instances one request was passed to without an answer, and what follows. Rule: pure.

An instance that says that it does not serve now was tried. One to which the connection failed or broke is lost, or will
be: the server learns of it later than the request did, and starts another one.
"""

from collections.abc import Collection

from lattice_worker.gateway.routing import Target

MAX_SENT = 3


class ElsewhereError(Exception):
    """An instance did not answer; another one may.

    It `is_lost` if the connection failed or broke. The request `was_sent` if the instance may have had it.
    """

    def __init__(self, why: str, *, is_lost: bool, was_sent: bool = True) -> None:
        super().__init__(why)
        self.is_lost, self.was_sent = is_lost, was_sent


class Tries:
    """The tries of one request. Times are of one clock; a lost instance is waited for `lost_s` seconds at most."""

    def __init__(self, lost_s: float) -> None:
        self._lost_s = lost_s
        self._lost: dict[Target, float] = {}
        self._refusing: set[Target] = set()
        self._sent = 0
        self.why = ""

    @property
    def failed(self) -> Collection[Target]:
        """The instances that are not to be tried again."""
        return self._lost.keys() | self._refusing

    @property
    def are_over(self) -> bool:
        """Whether no other instance is to be tried: the request itself may end each of them."""
        return self._sent >= MAX_SENT

    @property
    def lost_until(self) -> float | None:
        """Until when the server may learn of the loss of an instance; None when none is lost."""
        return max(self._lost.values(), default=None)

    def note(self, target: Target, error: ElsewhereError, now: float) -> None:
        """Take the end of a try."""
        self.why = str(error)
        self._sent += error.was_sent
        if error.is_lost:
            self._lost[target] = now + self._lost_s
        else:
            self._refusing.add(target)

    def keep(self, targets: Collection[Target]) -> None:
        """Forget the instances that take no requests any more; one that does so later is tried again."""
        self._lost = {target: until for target, until in self._lost.items() if target in targets}
        self._refusing &= set(targets)
