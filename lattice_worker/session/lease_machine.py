"""The machine of a worker's leases: commands of the server, starts and ends. PURE: no clock, no I/O, no protobuf.

Rule: a lease runs at most once and ends once, also when commands arrive twice, late, or out of order.

What happens to a lease, by its state:

| command or event  | unknown           | waiting                            | started               |
|-------------------|-------------------|------------------------------------|-----------------------|
| assign            | waits, or starts  | ignored                            | ignored               |
| revoke            | ignored           | taken back and returned            | ignored               |
| stop              | ignored           | taken back and reported cancelled  | executor stops it     |
| dropped           | ignored           | taken back, nothing is reported    | executor stops it     |
| ended             | ignored           | removed                            | removed, next starts  |

A waiting lease that was pipelined may have begun in its runner: then it cannot be taken back, and is stopped as if it
had started. A lease whose predecessor fails is revoked.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Generic, Protocol, TypeVar

from lattice_worker.session.report_queue import ReportQueue
from lattice_worker.session.slots import LeaseState, SlotTable

Work = TypeVar("Work")
Report = TypeVar("Report")
Outputs = TypeVar("Outputs")
Work_contra = TypeVar("Work_contra", contravariant=True)
Outputs_contra = TypeVar("Outputs_contra", contravariant=True)

MAX_SEEN = 10_000  # How many leases are remembered, so that one that is assigned again is ignored.


class Executor(Protocol[Work_contra, Outputs_contra]):
    """Runs leases. It calls `LeaseMachine.ended` once for each lease that it was told to start."""

    def start(self, work: Work_contra) -> None:
        """Run a lease that is next in its slot."""

    def send_ahead(self, work: Work_contra, running: str) -> bool:
        """Pipeline a lease behind the running one; False when it has to wait until it is started."""

    def has_ahead(self, lease_id: str) -> bool:
        """Whether leases are pipelined behind a running one."""

    def take_back(self, lease_id: str) -> bool:
        """Make sure that a lease that has not started is never begun; False when it has begun in its runner."""

    def feed(self, lease_id: str, outputs: Outputs_contra) -> None:
        """Take the outputs of a lease's predecessor: some are its inputs."""

    def stop(self, lease_id: str, kind: str, message: str) -> None:
        """End a lease as a failure of this kind."""

    def cancelled(self, work: Work_contra) -> None:
        """Report that a lease was cancelled before it started, and call `LeaseMachine.ended`."""


class LeaseMachine(Generic[Work, Report, Outputs]):
    """The leases of one worker in one session.

    `say` takes each report with its number; `returned` makes the report that returns a lease unstarted.
    """

    def __init__(
        self, executor: Executor[Work, Outputs], say: Callable[[int, Report], None], returned: Callable[[str], Report]
    ) -> None:
        self.session_id = ""
        self.received = 0  # The number of the last assignment.
        self.reports: ReportQueue[Report] = ReportQueue()
        self.slots: SlotTable[Work] = SlotTable()
        self._seen: dict[str, None] = {}
        self._executor = executor
        self._say, self._returned = say, returned

    def held(self) -> list[str]:
        """Return the leases that have not ended, and those with reports that are not acknowledged."""
        return list(dict.fromkeys([*self.slots.leases(), *self.reports.leases()]))

    def holds(self, lease_id: str) -> bool:
        """Whether a lease has not ended."""
        return self.slots.state(lease_id) is not LeaseState.UNKNOWN

    def adoptable(self) -> dict[str, bool]:
        """Return the leases that another life of the server may continue, and of each whether it has ended."""
        ended = {lease_id: True for lease_id in self.reports.leases() if not self.holds(lease_id)}
        return ended | dict.fromkeys(self.slots.started(), False)

    def welcome(
        self, session_id: str, resumed: bool, dropped: Iterable[str], adopted: Collection[str] = ()
    ) -> list[Report]:
        """Take the server's answer to a hello; return the reports to send again.

        A session that is not resumed begins with the leases that the server has adopted.
        """
        if resumed:
            for lease_id in dropped:
                self._drop(lease_id)
        elif session_id != self.session_id:  # Otherwise the same answer came twice.
            self._begin(session_id, adopted)
        return self.reports.unacknowledged()

    def assign(self, lease_id: str, slot: int, predecessor: str, sequence: int, work: Work) -> None:
        """Take a lease. `predecessor` is the lease that has to succeed first, if any."""
        self.received = max(self.received, sequence)
        if lease_id in self._seen:
            return
        self._seen[lease_id] = None
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        if predecessor and not self.slots.add_successor(predecessor, lease_id):
            self.report(lease_id, self._returned(lease_id))
            return
        started = self.slots.add(lease_id, slot, work)
        if started is not None:
            self._executor.start(started)
        elif not predecessor:
            self._send_ahead(self.slots.started_before(lease_id))

    def revoke(self, lease_id: str) -> None:
        """Return a lease unless it has started."""
        if self.slots.state(lease_id) is LeaseState.WAITING and self._executor.take_back(lease_id):
            self.report(lease_id, self._returned(lease_id))
            self.ended(lease_id, None)

    def stop(self, lease_id: str) -> None:
        """End a lease, started or not."""
        state = self.slots.state(lease_id)
        if state is LeaseState.WAITING and self._executor.take_back(lease_id):
            self._executor.cancelled(self.slots.work_of(lease_id))
        elif state is not LeaseState.UNKNOWN:
            self._executor.stop(lease_id, "cancelled", "the attempt was cancelled")

    def report(self, lease_id: str, report: Report) -> None:
        """Send a report about a lease, until the server has acknowledged it."""
        self._say(self.reports.add(lease_id, report), report)

    def ended(self, lease_id: str, outputs: Outputs | None) -> None:
        """Note that a lease has ended, with its outputs if it succeeded."""
        if not self.holds(lease_id):
            return
        for successor in self.slots.take_successors(lease_id):
            if outputs is None:
                self.revoke(successor)
            else:
                self._executor.feed(successor, outputs)
        if (following := self.slots.end(lease_id)) is not None:
            next_id, work = following
            self._executor.start(work)
            # A lease that cannot be started has ended by now.
            if self.holds(next_id) and not self._executor.has_ahead(next_id):
                self._send_ahead(next_id)

    def _begin(self, session_id: str, adopted: Collection[str]) -> None:
        """Begin a session with these leases and the reports about them."""
        for lease_id in self.held():
            if lease_id not in adopted:
                self._drop(lease_id)
        reports = self.reports.items()
        self.session_id, self.received = session_id, 0
        self.reports, self.slots = ReportQueue(), self.slots.only(adopted)
        self._seen.clear()
        for lease_id, report in reports:
            if lease_id in adopted:
                self.report(lease_id, report)

    def _drop(self, lease_id: str) -> None:
        """End a lease that the server has given up."""
        state = self.slots.state(lease_id)
        if state is LeaseState.WAITING and self._executor.take_back(lease_id):
            self.slots.end(lease_id)
        elif state is not LeaseState.UNKNOWN:
            self._executor.stop(lease_id, "cancelled", "the server forgot the lease")
            if state is LeaseState.WAITING:
                # It had begun in its runner. Stopped, it can be forgotten.
                self._executor.take_back(lease_id)
                self.slots.end(lease_id)

    def _send_ahead(self, running: str) -> None:
        """Pipeline the leases that wait behind a running one, up to the first that cannot be."""
        for _, work in self.slots.waiting_behind(running):
            if not self._executor.send_ahead(work, running):
                return
