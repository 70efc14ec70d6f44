"""Owns the sessions of workers: hello, heartbeat, detach, drain and loss.

Rule: after a worker has resumed its session, or sent a heartbeat, it and the lease table agree on its leases.
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

from lattice_server.core.messages import (
    AttemptAwaits,
    CloseSession,
    DrainRequested,
    DrainWorker,
    ForgetSession,
    NodesChanged,
    RevokeLease,
    StopLease,
    WelcomeWorker,
    WorkerDetached,
    WorkerEffect,
    WorkerHeartbeat,
    WorkerHello,
    WorkerLost,
)
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.scheduling.attempts import Attempts
from lattice_server.core.scheduling.lease_reports import LeaseReports
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.live_tasks import LiveTasks
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.states import LeaseState, NodeState


@dataclass(slots=True, eq=False)
class NodeSessions:
    """The sessions in which workers serve nodes."""

    _registry: NodeRegistry
    _placer: Placer
    _reports: LeaseReports
    _attempts: Attempts
    _tasks: LiveTasks
    _numbers: Iterator[int]
    _epoch: str
    _emit: Callable[[WorkerEffect | NodesChanged], None]

    def greet(self, hello: WorkerHello, now: float) -> list[AttemptAwaits]:
        """Resume the session of a worker, or start a new one, which replaces that of another worker of the node.

        Returns the waits of the leases that the new session begins with.
        """
        self._placer.note_change()
        node = self._registry.nodes.get(hello.node_id)
        if node is not None and node.spec.worker_id == hello.worker_id:
            # Without the session id of its welcome, it has not received that.
            is_welcome = node.session_id == hello.session_id
            if is_welcome or (hello.session_id and node.replaced_session_id == hello.session_id):
                self._resume(node, hello, now, is_welcome=is_welcome)
                return []
        if node is not None:
            why = "the worker connected again and had forgotten its work"
            if node.spec.worker_id != hello.worker_id:
                # Two hosts under one node id replace each other in turn: the message tells each of the other.
                why = f"worker {hello.worker_id!r} on host {hello.hostname!r} serves node {hello.node_id!r} now"
            self._emit(CloseSession(node.session_id, "SUPERSEDED", why))
            self._lose(node, why, now)
        node = self._registry.join(hello, f"{self._epoch}-{next(self._numbers)}")
        adopted = self._tasks.claim(node, hello.held, now)
        self._welcome(node, hello, {found.lease_id for found in adopted}, is_welcome=False)
        self._emit(NodesChanged(self._registry.known()))
        if not self._registry.is_wanted(hello.worker_id):
            self._drain(node, None, now)
        session_id = node.session_id
        return [AttemptAwaits(session_id, found.lease_id, 0, *wait) for found in adopted for wait in found.waits]

    def detach(self, event: WorkerDetached, now: float) -> None:
        """Note that a session's stream broke or is silent."""
        if node := self._registry.by_session(event.session_id):
            self._registry.detach(node, now - event.silent_s)

    def compare(self, heartbeat: WorkerHeartbeat, now: float) -> None:
        """Repair differences between the leases of a worker and of the table, except for leases that are on the way."""
        node = self._registry.by_session(heartbeat.session_id)
        if node is None:
            return
        leases = self._placer.table.of_node(node)
        forgotten = []
        for lease in leases:
            if lease.lease_id in heartbeat.held_lease_ids:
                self._repeat_end(node, lease)
            elif lease.sequence <= heartbeat.assignment_sequence:
                forgotten.append(lease)
            elif now >= max(lease.sent_at, lease.repeated_at) + self._registry.session_ttl_s:
                lease.repeated_at = now
                self._emit(self._placer.table.assignment(lease))
        for lease_id in sorted(heartbeat.held_lease_ids.difference(lease.lease_id for lease in leases)):
            self._emit(StopLease(node.session_id, lease_id))
        failure = Failure(FailureKind.WORKER_LOST, "its worker no longer knew of the task")
        self._attempts.lose(node, forgotten, failure, now)

    def take_lost(self, event: WorkerLost, now: float) -> None:
        """Remove the nodes of a worker whose process has ended."""
        for node in self._registry.by_worker(event.worker_id):
            self._lose(node, event.reason, now)

    def drain(self, event: DrainRequested, now: float) -> None:
        """Have a node accept no further leases, and remove it when its leases have ended."""
        if node := self._registry.nodes.get(event.node_id):
            self._drain(node, event.deadline_s, now)

    def tick(self, now: float) -> None:
        """Remove nodes whose sessions have expired, and requeue leases of draining nodes whose deadline has passed."""
        for node in self._registry.expired(now):
            self._lose(node, "its worker did not come back", now)
        for node in self._registry.drain_overdue(now):
            node.drain_at = None
            failure = Failure(FailureKind.WORKER_LOST, f"node {node.node_id!r} was drained before the task ended")
            for lease in self._placer.table.of_node(node):
                self._attempts.requeue(lease, failure, now)

    def _welcome(self, node: Node, hello: WorkerHello, known: Set[str], *, is_welcome: bool) -> None:
        """Answer a hello; the worker continues the leases that are known."""
        kept = () if is_welcome else tuple(held for held in hello.held_lease_ids if held in known)
        dropped = tuple(held for held in hello.held_lease_ids if held not in known)
        about = (hello.worker_id, node.session_id, is_welcome, dropped, hello.greeting)
        self._emit(WelcomeWorker(*about, adopted_lease_ids=kept))

    def _resume(self, node: Node, hello: WorkerHello, now: float, *, is_welcome: bool) -> None:
        self._registry.resume(node)
        held, leases = set(hello.held_lease_ids), self._placer.table.of_node(node)
        self._welcome(node, hello, {lease.lease_id for lease in leases}, is_welcome=is_welcome)
        if node.state is NodeState.DRAINING:
            deadline_s = None if node.drain_at is None else max(0.0, node.drain_at - now)
            self._emit(DrainWorker(node.session_id, deadline_s))
        self._repeat(node, leases, held, now)
        self._reports.close_drained(node)

    def _repeat(self, node: Node, leases: list[Lease], held: Set[str], now: float) -> None:
        """Send again the messages about leases that a worker may have missed; leases it has forgotten are lost."""
        forgotten = []
        for lease in leases:
            if lease.lease_id not in held:
                if lease.started_at is not None:
                    forgotten.append(lease)
                    continue
                self._emit(self._placer.table.assignment(lease))
            self._repeat_end(node, lease)
        failure = Failure(FailureKind.WORKER_LOST, "the worker came back and had forgotten the task")
        self._attempts.lose(node, forgotten, failure, now)

    def _repeat_end(self, node: Node, lease: Lease) -> None:
        """Send again that a lease is to end, if it is."""
        if lease.is_ending:
            self._emit(StopLease(node.session_id, lease.lease_id))
        elif lease.state is LeaseState.REVOKED:
            self._emit(RevokeLease(node.session_id, lease.lease_id))

    def _drain(self, node: Node, deadline_s: float | None, now: float) -> None:
        self._placer.note_change()
        self._registry.drain(node, None if deadline_s is None else now + deadline_s)
        self._emit(NodesChanged(self._registry.known()))
        self._emit(DrainWorker(node.session_id, deadline_s))
        self._placer.pipeline.vacate(node)
        self._reports.close_drained(node)

    def _lose(self, node: Node, reason: str, now: float) -> None:
        self._placer.note_change()
        self._emit(ForgetSession(node.session_id))
        failure = Failure(FailureKind.WORKER_LOST, f"node {node.node_id!r} was lost: {reason}")
        was_draining = node.state is NodeState.DRAINING
        node.move(NodeState.REMOVED)
        leases = self._placer.table.of_node(node)
        if was_draining:
            # Its worker was to end, which is no sign of a fault of its tasks.
            self._registry.reject_worker(node.spec.worker_id)
            for lease in leases:
                self._attempts.requeue(lease, failure, now)
        else:
            self._attempts.lose(node, leases, failure, now)
        self._registry.remove(node, may_return=not was_draining)
        self._emit(NodesChanged(self._registry.known()))
