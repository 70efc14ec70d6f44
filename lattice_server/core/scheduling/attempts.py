"""Owns the ends of attempts: success, failure, a lost worker, a cancellation.

Rule: only a lease that was alone on its node can be charged with the loss of the worker; after a loss each of the tasks
runs alone on its node. A batch that crashed is retried in halves, until one member has failed alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lattice_server.core.messages import AttemptFailed, AttemptSucceeded, LeaseMessage, LeaseReturned, StopLease
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.scheduling.lease_reports import LeaseReports
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.live_tasks import BISECTED, LiveTasks
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Task


@dataclass(slots=True, eq=False)
class Attempts:
    """The attempts that workers run, and the decision what becomes of their tasks."""

    _registry: NodeRegistry
    _placer: Placer
    _reports: LeaseReports
    _tasks: LiveTasks
    _numbers: Iterator[int]
    _emit: Callable[[StopLease], None]

    def succeed(self, event: AttemptSucceeded, now: float) -> None:
        """Take the success of one member of a lease."""
        found = self._reports.started(event, _began_at(event), now)
        if found is None:
            self._refuse_unready(event, now)
            return
        lease, task = found
        if event.item == 0:
            # An attempt cannot have run for longer than its worker had the lease.
            self._placer.learn(task, min(max(0.0, event.duration_s), now - lease.sent_at))
        ended_at = lease.time_of(event.at, now)
        self._reports.end_member(lease, task, now)
        self._tasks.succeed(task, event, now, ended_at)

    def fail(self, event: AttemptFailed, now: float) -> None:
        """Take the failure of one member of a lease; a crash is that of all members."""
        self._refuse_unready(event, now)
        lease = self._reports.find(event)
        task = None if lease is None else lease.member(event.item)
        if lease is None or task is None:
            return
        kind = event.failure.kind
        if kind is FailureKind.WORKER_LOST:
            self.lose(self._registry.nodes[lease.slot.node_id], [lease], event.failure, now)
            return
        if kind is not FailureKind.CANCELLED:
            self._reports.note_start(lease, now, _began_at(event))
        if kind in BISECTED and len(lease.tasks) > 1:
            self._bisect(self._reports.dissolve(lease, now), event.failure, now)
            return
        self._reports.end_member(lease, task, now)
        self._tasks.fail(task, event.failure, now, lease.time_of(event.at, now))

    def take_returned(self, event: LeaseReturned, now: float) -> None:
        """Queue the members of a lease that its worker returns."""
        lease = self._reports.find(event)
        if lease is None:
            return
        if lease.started_at is None:
            for task in lease.members():
                # No attempt began, so the number is used again.
                task.attempt -= 1
        why = event.reason or "the worker gave the task back after it had started"
        self.requeue(lease, Failure(FailureKind.WORKER_LOST, why), now)

    def requeue(self, lease: Lease, failure: Failure, now: float) -> None:
        """Release a lease that ended through no fault of its members, and queue them without charging them."""
        for task in self._reports.dissolve(lease, now):
            if lease.started_at is None:
                self._tasks.requeue(task, now)
            else:
                self._tasks.retry_uncharged(task, failure, now)

    def lose(self, node: Node, lost: Sequence[Lease], failure: Failure, now: float) -> None:
        """Take the loss of leases of a node whose worker will not end them."""
        held = [lease for lease in self._placer.table.of_node(node) if not lease.slot.is_service]
        # A lease that waits for its input cannot have begun.
        running = [lease for lease in held if not (lease.slot.is_parked or lease.slot.is_over)]
        is_alone = len(running or held) == 1 and not held[0].waits_for_input
        for lease in lost:
            if lease.slot.is_service:
                # Its owner starts another one. Alone on a node it would keep all others out for ever.
                self._reports.note_start(lease, now)
                for task in self._reports.dissolve(lease, now):
                    self._tasks.fail(task, failure, now)
                continue
            for task in lease.members():
                task.shape, task.cohort = self._registry.exclusive(task.shape), 0
            if not is_alone or lease.slot.is_over or (running and lease.slot.is_parked):
                self.requeue(lease, failure, now)
                continue
            # It is charged even if its start was not reported in time.
            self._reports.note_start(lease, now)
            members = self._reports.dissolve(lease, now)
            if len(lease.tasks) > 1:
                self._bisect(members, failure, now)
            else:
                self._tasks.fail(members[0], failure, now)

    def end_early(self, task: Task, failure: Failure, now: float) -> None:
        """End a task; one that a worker runs ends when the worker reports it."""
        if task.ending is not None:
            return
        task.ending = failure
        if not task.lease_id:
            self._tasks.end(task)
            return
        lease = self._placer.table.leases[task.lease_id]
        if lease.is_ending:
            self._emit(StopLease(self._registry.nodes[lease.slot.node_id].session_id, lease.lease_id))
        else:
            # The call continues for the other members; its outputs for this one are ignored.
            self._reports.end_member(lease, task, now)
            self._tasks.end(task)

    def end_overdue(self, now: float) -> None:
        """End the tasks whose total time limit has passed."""
        for task in self._tasks.timed_out(now):
            limit_s = task.ready.spec.total_timeout_s
            self.end_early(task, Failure(FailureKind.TIMEOUT, f"the task took longer than {limit_s:g} s in all"), now)

    def _refuse_unready(self, event: LeaseMessage, now: float) -> None:
        """Requeue a lease that cannot have ended, because its input was not there."""
        lease = self._reports.find(event)
        if lease is not None and lease.waits_for_input:
            failure = Failure(FailureKind.WORKER_LOST, "the worker reported the end of a task that had no inputs yet")
            self.requeue(lease, failure, now)

    def _bisect(self, members: list[Task], failure: Failure, now: float) -> None:
        """Retry the members of a batch that crashed in two halves."""
        middle = (len(members) + 1) // 2
        for half in (members[:middle], members[middle:]):
            cohort = next(self._numbers)
            for task in half:
                if task.ending is None:
                    task.cohort = cohort
                self._tasks.retry_uncharged(task, failure, now)


def _began_at(event: AttemptSucceeded | AttemptFailed) -> float | None:
    """Return when an attempt began, computed from its end."""
    return None if event.at is None else event.at - max(0.0, event.duration_s)
