"""Owns what a worker does with each command about leases, and when a lease ends. PURE: no clock, no I/O, no protobuf.

Rule: whatever comes twice, late, or in another order than it was sent, a lease that is held is run once and ends in one
last word, and one that is not held is never run.
"""

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from lattice_worker.session import Session

Work = TypeVar("Work")
Report = TypeVar("Report")
Outputs = TypeVar("Outputs")
Doable_contra = TypeVar("Doable_contra", contravariant=True)
Given_contra = TypeVar("Given_contra", contravariant=True)


MAX_SEEN = 10_000  # How many leases are remembered, so that one that comes again is known.


class Attempts(Protocol[Doable_contra, Given_contra]):
    """Runs what leases are about. Each lease that was started is told once, by `LeaseMachine.ended`."""

    def start(self, work: Doable_contra) -> None:
        """Run a lease whose turn has come."""

    def send_ahead(self, work: Doable_contra, running: str) -> bool:
        """Send a lease whose turn will come to where `running` runs; False when it has to wait."""

    def has_ahead(self, lease_id: str) -> bool:
        """Whether leases were sent to where a running one runs, to come after it."""

    def take_back(self, lease_id: str) -> bool:
        """Make sure that a lease whose turn has not come is never begun; False when it was."""

    def feed(self, lease_id: str, outputs: Given_contra) -> None:
        """Keep what a lease will need when its turn comes."""

    def stop(self, lease_id: str, kind: str, message: str) -> None:
        """End a lease that has started, as a failure of this kind."""

    def cancelled(self, work: Doable_contra) -> None:
        """Report that a lease was ended before it started, which is told by `LeaseMachine.ended` as well."""


class LeaseMachine(Generic[Work, Report, Outputs]):
    """The leases of one worker. `say` takes each report with its number, `returned` makes the one that gives a lease
    back unstarted."""

    def __init__(
        self, attempts: Attempts[Work, Outputs], say: Callable[[int, Report], None], returned: Callable[[str], Report]
    ) -> None:
        self.session: Session[Work, Report] = Session()
        self.received = 0
        self._seen: dict[str, None] = {}
        self._attempts = attempts
        self._say, self._returned = say, returned

    def welcome(self, session_id: str, resumed: bool, dropped: Iterable[str]) -> list[Report]:
        """Take the server's answer to a hello; return the reports to send again."""
        if session_id == self.session.session_id and not resumed:
            # Said twice: it is under way.
            return self.session.unacknowledged()
        for lease_id in dropped if resumed else self.session.held():
            self._drop(lease_id)
        if not resumed:
            self.session.reset(session_id)
            self.received = 0
            self._seen.clear()
        return self.session.unacknowledged()

    def assign(self, lease_id: str, slot: int, after: str, sequence: int, work: Work) -> None:
        """Take a lease; `after` is the one it needs to succeed first, if any."""
        self.received = max(self.received, sequence)
        if lease_id in self._seen:
            return
        self._seen[lease_id] = None
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        if after and not self.session.follow(lease_id, after):
            self.report(lease_id, self._returned(lease_id))
            return
        started = self.session.assign(lease_id, slot, work)
        if started is not None:
            self._attempts.start(started)
        elif not after:
            self._send_ahead(self.session.running_before(lease_id))

    def revoke(self, lease_id: str) -> None:
        """Give a lease back unless it has started."""
        if self.session.has_started(lease_id) is False and self._attempts.take_back(lease_id):
            self.report(lease_id, self._returned(lease_id))
            self.ended(lease_id, None)

    def stop(self, lease_id: str) -> None:
        """End a lease, running or not."""
        has_started = self.session.has_started(lease_id)
        if has_started is False and self._attempts.take_back(lease_id):
            self._attempts.cancelled(self.session.work_of(lease_id))
        elif has_started is not None:
            self._attempts.stop(lease_id, "cancelled", "the attempt was cancelled")

    def report(self, lease_id: str, report: Report) -> None:
        """Say something about a lease, and again until the server has it."""
        self._say(self.session.add_report(lease_id, report), report)

    def ended(self, lease_id: str, outputs: Outputs | None) -> None:
        """Note that a lease is over; `outputs` is what it gave, None when it did not succeed."""
        if self.session.has_started(lease_id) is None:
            return
        for follower in self.session.take_followers(lease_id):
            if outputs is None:
                self.revoke(follower)
            else:
                self._attempts.feed(follower, outputs)
        slot = self.session.slot_of(lease_id)
        following = self.session.end(lease_id)
        if following is None:
            return
        started = self.session.running_in(slot)
        self._attempts.start(following)
        # One that cannot even start is over by now.
        if self.session.has_started(started) and not self._attempts.has_ahead(started):
            self._send_ahead(started)

    def _drop(self, lease_id: str) -> None:
        has_started = self.session.has_started(lease_id)
        if has_started is None:
            return
        if has_started or not self._attempts.take_back(lease_id):
            self._attempts.stop(lease_id, "cancelled", "the server forgot the lease")
        if not has_started:
            self.session.end(lease_id)

    def _send_ahead(self, running: str) -> None:
        """Send what waits behind a running lease to its process, as far as it needs nothing of what is before it."""
        for lease_id in self.session.behind(running):
            if not self._attempts.send_ahead(self.session.work_of(lease_id), running):
                return
