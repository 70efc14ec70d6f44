"""Owns what a worker holds and what it has to say. PURE: no clock, no I/O, no protobuf.

Rule: leases of one slot run one after the other; a lease that follows another never outlives its failure; a report
stays in the outbox until it is acknowledged.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Work = TypeVar("Work")
Report = TypeVar("Report")


@dataclass(slots=True)
class _Slot(Generic[Work]):
    running: str = ""
    waiting: dict[str, Work] = field(default_factory=dict)


class Session(Generic[Work, Report]):
    """One session of the worker. Methods that may start work return what to start."""

    def __init__(self) -> None:
        self.session_id = ""
        self._slots: dict[int, _Slot[Work]] = {}
        self._slot_of: dict[str, int] = {}
        self._followers: dict[str, list[str]] = {}
        self._outbox: deque[tuple[int, str, Report]] = deque()
        self._last_sequence = 0
        self._marks = (0, 0)

    def held(self) -> list[str]:
        """Return all leases, started or not, and those with reports the server may not have."""
        return list(dict.fromkeys([*self._slot_of, *(lease_id for _, lease_id, _ in self._outbox)]))

    @property
    def has_waiting(self) -> bool:
        """Whether leases wait behind others."""
        return len(self._slot_of) > len(self._slots)

    def running(self) -> list[str]:
        """Return the leases that have started."""
        return [slot.running for slot in self._slots.values() if slot.running]

    def slot_of(self, lease_id: str) -> int:
        """Return the slot of a lease that is held."""
        return self._slot_of[lease_id]

    def running_in(self, slot_number: int) -> str:
        """Return the lease that has started in a slot; empty when none has."""
        slot = self._slots.get(slot_number)
        return "" if slot is None else slot.running

    def assign(self, lease_id: str, slot_number: int, work: Work) -> Work | None:
        """Take a lease; return its work if it starts now. A lease held already is ignored."""
        if lease_id in self._slot_of:
            return None
        self._slot_of[lease_id] = slot_number
        slot = self._slots.setdefault(slot_number, _Slot())
        if slot.running or slot.waiting:
            slot.waiting[lease_id] = work
            return None
        slot.running = lease_id
        return work

    def follow(self, lease_id: str, after: str) -> bool:
        """Note that a lease held needs `after` to succeed first; False when `after` is not held, so cannot."""
        if after not in self._slot_of:
            return False
        self._followers.setdefault(after, []).append(lease_id)
        return True

    def take_followers(self, lease_id: str) -> list[str]:
        """Return the leases still held that follow a lease directly, and forget that they do."""
        return [follower for follower in self._followers.pop(lease_id, ()) if follower in self._slot_of]

    def end(self, lease_id: str) -> Work | None:
        """Forget a lease that ended; return the work its slot starts next."""
        number = self._slot_of.pop(lease_id)
        slot = self._slots[number]
        slot.waiting.pop(lease_id, None)
        if slot.running != lease_id:
            return None
        slot.running = ""
        for next_id, work in slot.waiting.items():
            slot.running = next_id
            del slot.waiting[next_id]
            return work
        del self._slots[number]
        return None

    def has_started(self, lease_id: str) -> bool | None:
        """Whether a lease has started; None when it is not held."""
        number = self._slot_of.get(lease_id)
        return None if number is None else self._slots[number].running == lease_id

    def behind(self, lease_id: str) -> list[str]:
        """Return the leases that wait in the slot of a lease that has started, in order."""
        return list(self._slots[self._slot_of[lease_id]].waiting)

    def running_before(self, lease_id: str) -> str:
        """Return the lease that has started in the slot of one that waits."""
        return self._slots[self._slot_of[lease_id]].running

    def work_of(self, lease_id: str) -> Work:
        """Return the work of a lease that is held and has not started."""
        return self._slots[self._slot_of[lease_id]].waiting[lease_id]

    def add_report(self, lease_id: str, report: Report) -> int:
        """Put a report about a lease into the outbox; return its number."""
        self._last_sequence += 1
        self._outbox.append((self._last_sequence, lease_id, report))
        return self._last_sequence

    def acknowledge(self, sequence: int) -> list[Report]:
        """Forget reports up to `sequence` and return them."""
        done = []
        while self._outbox and self._outbox[0][0] <= sequence:
            done.append(self._outbox.popleft()[2])
        return done

    def overdue(self) -> list[Report]:
        """Return the reports that were there when this was called before last and are still not acknowledged."""
        late = [report for sequence, _, report in self._outbox if sequence <= self._marks[0]]
        self._marks = (self._marks[1], self._last_sequence)
        return late

    def unacknowledged(self) -> list[Report]:
        """Return the reports to send again after a reconnect."""
        return [report for _, _, report in self._outbox]

    def reset(self, session_id: str) -> None:
        """Begin a new session that holds nothing."""
        self.__init__()  # type: ignore[misc]  # a new session is a new object in all but identity
        self.session_id = session_id
