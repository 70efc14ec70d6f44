"""Owns the leases of an earlier life of the server that no worker has claimed yet. Rule: each is claimed at most once.

Only leases that the journal has are adopted, by the node that they were sent to.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.messages import EarlierLease, HeldLease
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.permits import Concurrency
from lattice_server.core.scheduling.pipelining import AHEAD_S
from lattice_server.core.scheduling.placement import suits
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Task


@dataclass(slots=True, eq=False)
class Unclaimed:
    """One such lease: its running members by position. It holds a permit of its key."""

    known: EarlierLease
    concurrency: Concurrency | None
    members: dict[int, Task] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class EarlierLeases:
    """The unclaimed leases by id. Once they can be claimed, they wait as long as a detached session does."""

    _registry: NodeRegistry
    _placer: Placer
    _is_open: bool = True
    _leases: dict[str, Unclaimed] = field(default_factory=dict)
    _of: dict[Task, Unclaimed] = field(default_factory=dict)
    _deadlines: Deadlines[Unclaimed] = field(default_factory=Deadlines)

    def __contains__(self, task: object) -> bool:
        return task in self._of

    def tasks(self) -> list[Task]:
        """Return the members of all unclaimed leases."""
        return list(self._of)

    def node_of(self, task: Task) -> str:
        """Return the node on which the attempt at a member runs, if it still does."""
        return self._of[task].known.node_id

    def admit(self, task: Task, known: EarlierLease, now: float) -> bool:
        """Have a task wait for the worker that may still run its newest attempt; False without a permit for it."""
        lease = self._leases.get(known.lease_id)
        if lease is None:
            if not self._placer.permits.has_free(task.concurrency):
                return False
            lease = self._leases[known.lease_id] = Unclaimed(known, task.concurrency)
            self._placer.permits.take(task.concurrency)
            if self._is_open:
                self._deadlines.set(lease, now + self._registry.session_ttl_s)
        lease.members[known.item] = task
        self._of[task] = lease
        return True

    def open(self, now: float) -> None:
        """Have the leases wait from now on: workers can claim them."""
        self._is_open = True
        for lease in self._leases.values():
            self._deadlines.set(lease, now + self._registry.session_ttl_s)

    def discard(self, task: Task) -> None:
        """Forget a task that has ended. Its lease keeps the permit, because the attempt may still run."""
        if (lease := self._of.pop(task, None)) is not None:
            lease.members = {item: member for item, member in lease.members.items() if member is not task}

    def claim(self, node: Node, held: tuple[HeldLease, ...], now: float) -> tuple[list[HeldLease], list[Task]]:
        """Adopt the leases that the worker of a new node still has.

        Returns the adopted ones, and the tasks of the leases that the worker does not have, which must be queued.
        """
        mine = [lease for lease in self._leases.values() if lease.known.node_id == node.node_id]
        for lease in mine:
            self._take_out(lease)
        known = {lease.known.lease_id: lease for lease in mine}
        adopted = []
        for found in held:
            if found.lease_id in known and self._adopt(node, known[found.lease_id], found, now):
                adopted.append(found)
                del known[found.lease_id]
        return adopted, [task for lease in known.values() for task in lease.members.values()]

    def overdue(self, now: float) -> Iterator[Task]:
        """Take out the tasks whose workers did not come."""
        for lease in self._deadlines.due(now):
            self._take_out(lease)
            yield from lease.members.values()

    def next_deadline(self) -> float | None:
        """Return when `overdue` is due next."""
        return self._deadlines.next_at()

    def permits(self) -> list[Concurrency]:
        """Return the permits that unclaimed leases hold."""
        return [lease.concurrency for lease in self._leases.values() if lease.concurrency is not None]

    def check(self) -> None:
        """Assert that the tables agree."""
        assert set(self._deadlines) == (set(self._leases.values()) if self._is_open else set())
        members = {task: lease for lease in self._leases.values() for task in lease.members.values()}
        assert members == self._of
        assert not any(task.lease_id or task.predecessor or task.is_over for task in members)

    def _take_out(self, lease: Unclaimed) -> None:
        del self._leases[lease.known.lease_id]
        self._deadlines.discard(lease)
        self._placer.release_permit(lease.concurrency)
        for task in lease.members.values():
            del self._of[task]

    def _adopt(self, node: Node, lease: Unclaimed, held: HeldLease, now: float) -> bool:
        """Adopt a lease if the node has room for it; the members that have ended must be the last ones."""
        tasks = [lease.members[item] for item in range(len(lease.members)) if item in lease.members]
        if not tasks or len(tasks) < len(lease.members) or not suits(tasks[0].shape, node.spec):
            return False
        return self._placer.table.adopt(node, tasks, lease.known, held, 2 * AHEAD_S, now)
