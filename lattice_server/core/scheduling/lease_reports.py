"""Owns what workers hold: the leases reports are about, their start, and their release. Part of `dispatch`.

Rule: a report counts only for a lease that the session it comes from still holds.
"""

from collections.abc import Callable

from lattice_server.core.messages import CloseSession, TaskStarted
from lattice_server.core.scheduling.node_registry import Fleet
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Lease, Task


class Holding:
    """The leases in the hands of workers."""

    def __init__(self, fleet: Fleet, placer: Placer, emit: Callable[[TaskStarted | CloseSession], None]) -> None:
        self._fleet = fleet
        self._placer = placer
        self._leases = placer.table.leases
        self._emit = emit

    def find(self, session_id: str, lease_id: str) -> Lease | None:
        """Return a lease that a session holds."""
        lease = self._leases.get(lease_id)
        if lease is None or self._fleet.nodes[lease.slot.node_id].session_id != session_id:
            return None
        return lease

    def started(
        self, session_id: str, lease_id: str, item: int, at: float | None, now: float
    ) -> tuple[Lease, Task] | None:
        """Return the member of a lease that a report is about, which has started by that; None when there is none.

        Only a lease whose tasks have all their inputs can have started; it did at `at` unless its start is known.
        """
        lease = self.find(session_id, lease_id)
        if lease is None or lease.tasks[0].follows is not None or not 0 <= item < len(lease.tasks):
            return None
        if lease.started_at is None:
            self.note_start(lease, now, at)
        task = lease.member(item)
        return None if task is None else (lease, task)

    def note_start(self, lease: Lease, now: float, at: float | None = None) -> None:
        """Note that a lease has started, unless that is known; at `at` if that is not now."""
        if lease.started_at is not None:
            return
        started_at = lease.time_of(at, now)
        lease.started_at = now if started_at is None else started_at
        node = self._fleet.nodes[lease.slot.node_id]
        where = (node.node_id, node.node_ip, lease.slot.gpu_indices)
        for task in lease.members():
            self._emit(TaskStarted(*task.named, *where, started_at))

    def leave(self, lease: Lease, task: Task, now: float) -> None:
        """Note that one member of a lease is over; with the last one the lease is released."""
        task.lease_id = ""
        lease.ended.add(lease.tasks.index(task))
        if len(lease.ended) == len(lease.tasks):
            self._release(lease, now)

    def dissolve(self, lease: Lease, now: float) -> list[Task]:
        """Release a lease and return the members that had not ended."""
        members = list(lease.members())
        for task in members:
            task.lease_id = ""
        self._release(lease, now)
        return members

    def let_go(self, node: Node) -> None:
        """Close the session of a node that is drained, once it holds nothing any more and can be told so."""
        is_known = node.node_id in self._fleet.nodes
        if is_known and node.is_draining and node.detached_at is None and not node.slots:
            self._fleet.remove(node, may_return=False)
            self._emit(CloseSession(node.session_id, "DRAINED", "the node was drained"))

    def _release(self, lease: Lease, now: float) -> None:
        self._placer.release(lease, now)
        self.let_go(self._fleet.nodes[lease.slot.node_id])
