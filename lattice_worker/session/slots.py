"""The slots of a worker and the leases in them. PURE: no clock, no I/O, no protobuf.

Rule: the leases of one slot are started one after the other, in the order in which they came.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

Work = TypeVar("Work")


class LeaseState(Enum):
    """The state of a lease on this worker."""

    UNKNOWN = "It never came, or it has ended."
    WAITING = "It waits behind other leases of its slot."
    STARTED = "It was handed to the executor, and has not ended."


@dataclass(slots=True)
class _Slot(Generic[Work]):
    started: str = ""
    waiting: dict[str, Work] = field(default_factory=dict)


class SlotTable(Generic[Work]):
    """The leases that have not ended, by slot. Methods that may start a lease return its work."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot[Work]] = {}
        self._slot_of: dict[str, int] = {}
        self._successors: dict[str, list[str]] = {}

    def leases(self) -> list[str]:
        """Return all leases, in the order in which they came."""
        return list(self._slot_of)

    def started(self) -> list[str]:
        """Return the leases that have started."""
        return [slot.started for slot in self._slots.values()]

    def only(self, lease_ids: Collection[str]) -> "SlotTable[Work]":
        """Return a table with these of the started leases, each in a slot that no assignment names."""
        found: SlotTable[Work] = SlotTable()
        for number, lease_id in enumerate((found for found in self.started() if found in lease_ids), 1):
            found._slots[-number], found._slot_of[lease_id] = _Slot(lease_id), -number
        return found

    @property
    def has_waiting(self) -> bool:
        """Whether a lease waits behind another."""
        return len(self._slot_of) > len(self._slots)

    def state(self, lease_id: str) -> LeaseState:
        """Return the state of a lease."""
        number = self._slot_of.get(lease_id)
        if number is None:
            return LeaseState.UNKNOWN
        return LeaseState.STARTED if self._slots[number].started == lease_id else LeaseState.WAITING

    def add(self, lease_id: str, slot_number: int, work: Work) -> Work | None:
        """Add a lease; return its work if it starts now. A lease that is here already is ignored."""
        if lease_id in self._slot_of:
            return None
        self._slot_of[lease_id] = slot_number
        slot = self._slots.setdefault(slot_number, _Slot())
        if slot.started or slot.waiting:
            slot.waiting[lease_id] = work
            return None
        slot.started = lease_id
        return work

    def end(self, lease_id: str) -> tuple[str, Work] | None:
        """Remove a lease; return the lease that its slot starts next, if any."""
        number = self._slot_of.pop(lease_id)
        slot = self._slots[number]
        slot.waiting.pop(lease_id, None)
        if slot.started != lease_id:
            return None
        if not slot.waiting:
            del self._slots[number]
            return None
        slot.started = next(iter(slot.waiting))
        return slot.started, slot.waiting.pop(slot.started)

    def add_successor(self, lease_id: str, successor: str) -> bool:
        """Note that `successor` needs a lease to succeed first; False when that lease is not here."""
        if lease_id not in self._slot_of:
            return False
        self._successors.setdefault(lease_id, []).append(successor)
        return True

    def take_successors(self, lease_id: str) -> list[str]:
        """Return the direct successors of a lease that have not ended, and forget that they are."""
        return [found for found in self._successors.pop(lease_id, ()) if found in self._slot_of]

    def started_before(self, lease_id: str) -> str:
        """Return the started lease of the slot of a waiting one."""
        return self._slots[self._slot_of[lease_id]].started

    def waiting_behind(self, lease_id: str) -> list[tuple[str, Work]]:
        """Return the leases that wait behind a started one, in order, with their work."""
        return list(self._slots[self._slot_of[lease_id]].waiting.items())

    def work_of(self, lease_id: str) -> Work:
        """Return the work of a waiting lease."""
        return self._slots[self._slot_of[lease_id]].waiting[lease_id]

    def check(self) -> None:
        """Assert that each lease is in its slot, and that no slot is empty."""
        found = {lease_id: n for n, slot in self._slots.items() for lease_id in (slot.started, *slot.waiting)}
        assert found == self._slot_of
        assert all(slot.started for slot in self._slots.values())
