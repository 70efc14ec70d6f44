"""Owns the reports of workers about leases: when a lease starts, and when it is released.

Rule: a report counts only if the session that sent it has the lease.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lattice_server.core.messages import AttemptReport, CloseSession, LeaseMessage, TaskStarted
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Task
from lattice_server.core.states import LeaseState, NodeState, SessionState


@dataclass(slots=True, eq=False)
class LeaseReports:
    """The leases that workers have, as far as their reports tell."""

    _registry: NodeRegistry
    _placer: Placer
    _emit: Callable[[TaskStarted | CloseSession], None]

    def find(self, report: LeaseMessage) -> Lease | None:
        """Return the lease that a report is about; None when the session does not have it."""
        lease = self._placer.table.leases.get(report.lease_id)
        if lease is None or self._registry.nodes[lease.slot.node_id].session_id != report.session_id:
            return None
        return lease

    def started(self, report: AttemptReport, at: float | None, now: float) -> tuple[Lease, Task] | None:
        """Return the lease and its member that a report is about; None when there is none that has not ended.

        The report shows that the lease has started, at `at` unless an earlier report said so. A lease that waits for
        its input cannot have started.
        """
        lease = self.find(report)
        if lease is None or lease.waits_for_input or not 0 <= report.item < len(lease.tasks):
            return None
        if lease.started_at is None:
            self.note_start(lease, now, at)
        task = lease.member(report.item)
        return None if task is None else (lease, task)

    def note_start(self, lease: Lease, now: float, at: float | None = None) -> None:
        """Note that a lease has started, unless that is known; at `at` if that is not now."""
        if lease.started_at is not None:
            return
        lease.move(LeaseState.STARTED)
        told_at = lease.time_of(at, now)
        lease.started_at = now if told_at is None else told_at
        node = self._registry.nodes[lease.slot.node_id]
        where = (node.node_id, node.spec.node_ip, lease.slot.gpu_indices)
        for item, task in enumerate(lease.tasks):
            if item not in lease.ended:
                # A task with a predecessor is never queued.
                times = (task.waiting_since or lease.sent_at, lease.sent_at)
                self._emit(TaskStarted(*task.named, *where, lease.started_at, lease.lease_id, item, *times))

    def end_member(self, lease: Lease, task: Task, now: float) -> None:
        """Note that one member of a lease has ended; with the last one the lease is released."""
        if self._placer.table.end_member(lease, task):
            self._release(lease, now)

    def dissolve(self, lease: Lease, now: float) -> list[Task]:
        """Release a lease and return the members that had not ended."""
        members = list(lease.members())
        for task in members:
            self._placer.table.end_member(lease, task)
        self._release(lease, now)
        return members

    def close_drained(self, node: Node) -> None:
        """Remove a draining node and close its session, once it has no leases and is connected."""
        if node.state is NodeState.DRAINING and node.session is SessionState.CONNECTED and not node.slots:
            self._registry.remove(node, may_return=False)
            self._emit(CloseSession(node.session_id, "DRAINED", "the node was drained"))

    def _release(self, lease: Lease, now: float) -> None:
        self._placer.release(lease, now)
        self.close_drained(self._registry.nodes[lease.slot.node_id])
