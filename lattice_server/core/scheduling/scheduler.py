"""Owns what becomes of tasks handed over: waiting, running, retries, time limits, lost workers.

This is the scheduler's machine.

Rule: a task is in exactly one place: following another task, waiting in the queue, backing off, or in a lease that a
slot holds. A task in a lease may follow another as well: it was sent along with it.
"""

from collections.abc import Container, Mapping, Sequence
from itertools import count
from typing import assert_never

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.messages import (
    ArtifactsReported,
    AttemptFailed,
    AttemptLogged,
    AttemptSpawned,
    AttemptStarted,
    AttemptSucceeded,
    CancelRequested,
    CloseSession,
    DrainRequested,
    DrainWorker,
    ExplainRequested,
    ForgetSession,
    LeaseReturned,
    NodesChanged,
    NodesDescribed,
    NodesRequested,
    RevokeLease,
    SchedulerEffect,
    SchedulerEvent,
    SettleArtifacts,
    StopLease,
    TaskCancelled,
    TaskExplained,
    TaskFailed,
    TaskLogged,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TasksSpawned,
    TaskSucceeded,
    WelcomeWorker,
    WorkerDetached,
    WorkerHeartbeat,
    WorkerHello,
    WorkerLost,
)
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.run.questions import AttemptAsked, question_of
from lattice_server.core.scheduling import followers, invariants
from lattice_server.core.scheduling.explain import explain
from lattice_server.core.scheduling.lease_reports import Holding
from lattice_server.core.scheduling.node_registry import Fleet
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.permits import concurrency_of
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Lease, Task

# A batch that ended like this is halved until the member at fault is alone.
BISECTED = frozenset({FailureKind.CRASHED, FailureKind.OUT_OF_MEMORY})


class Dispatch:
    """The scheduler's machine; only the scheduler's thread touches it."""

    def __init__(self, epoch: str, session_ttl_s: float = 30.0, limits: Mapping[str, int] | None = None) -> None:
        self.tasks: dict[tuple[str, str], Task] = {}
        self._epoch = epoch
        self._numbers = count(1)
        self._effects: list[SchedulerEffect] = []
        self._fleet = Fleet(session_ttl_s)
        self._placer = Placer(self._fleet, self._numbers, epoch, self._effects.append, limits or {})
        self._table = self._placer.table
        self._leases = self._table.leases
        self._holding = Holding(self._fleet, self._placer, self._effects.append)
        self._backoff: Deadlines[Task] = Deadlines()
        self._timeouts: Deadlines[Task] = Deadlines()

    def handle_all(self, events: Sequence[SchedulerEvent], now: float) -> list[SchedulerEffect]:
        """Take events in order, then place what can be placed. One placement serves them all."""
        for event in events:
            self.take(event, now)
        return self.tick(now)

    def handle(self, event: SchedulerEvent, now: float) -> list[SchedulerEffect]:
        """Take one event, then place what can be placed."""
        return self.handle_all((event,), now)

    def tick(self, now: float) -> list[SchedulerEffect]:
        """Do what is due and place what can be placed."""
        for node in self._fleet.overdue(now):
            self._lose(node, "its worker did not come back", now)
        for node in self._fleet.outstaying(now):
            self._move_all(node, now)
        for task in self._timeouts.due(now):
            limit_s = task.ready.spec.total_timeout_s
            self._end_early(task, Failure(FailureKind.TIMEOUT, f"the task took longer than {limit_s:g} s in all"), now)
        for task in self._backoff.due(now):
            self._wait(task, now)
        self._placer.ahead.take_back(now)
        self._placer.place_queued(now)
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        due = [self._placer.next_deadline(), self._fleet.next_deadline()]
        due += [self._backoff.next_at(), self._timeouts.next_at()]
        return min((at for at in due if at is not None), default=None)

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes that are here."""
        return self._fleet.nodes

    @property
    def leases(self) -> Mapping[str, Lease]:
        """What workers hold."""
        return self._leases

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        self._fleet.check()
        self._placer.check()
        invariants.check(self.tasks, self.nodes, self._leases, self._placer.queue, self._backoff, self._timeouts)

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Take one event; its effects come with the next `tick`."""
        match event:
            case AttemptSucceeded():
                self._succeed(event, now)
            case TaskReady():
                self._admit(event, now)
            case AttemptStarted():
                self._holding.started(event.session_id, event.lease_id, event.item, event.at, now)
            case AttemptLogged():
                if found := self._holding.started(event.session_id, event.lease_id, event.item, None, now):
                    text = (event.is_error, event.text, event.is_truncated)
                    self._effects.append(TaskLogged(*found[1].named, *text))
            case AttemptFailed():
                self._take_failure(event, now)
            case LeaseReturned():
                if lease := self._holding.find(event.session_id, event.lease_id):
                    self._take_returned(lease, event.reason, now)
            case AttemptSpawned():
                if found := self._holding.started(event.session_id, event.lease_id, event.item, None, now):
                    if event.refusal is not None:
                        self._end_early(found[1], event.refusal, now)
                    else:
                        self._effects.append(TasksSpawned(*found[1].named[:2], event.tasks))
            case AttemptAsked():
                if found := self._holding.started(event.session_id, event.lease_id, event.item, None, now):
                    self._effects.append(question_of(event, *found[1].named))
            case ArtifactsReported():
                self._effects.append(SettleArtifacts(event.artifacts))
            case CancelRequested():
                for task_id in event.task_ids:
                    if task := self.tasks.get((event.run_id, task_id)):
                        self._end_early(task, event.failure, now)
            case WorkerHello():
                self._greet(event, now)
            case WorkerDetached():
                if node := self._fleet.by_session(event.session_id):
                    self._fleet.detach(node, now - event.silent_s)
            case WorkerHeartbeat():
                if node := self._fleet.by_session(event.session_id):
                    self._compare(node, event, now)
            case WorkerLost():
                for node in self._fleet.by_worker(event.worker_id):
                    self._lose(node, event.reason, now)
            case DrainRequested():
                if node := self.nodes.get(event.node_id):
                    self._drain(node, event.deadline_s, now)
            case NodesRequested():
                running = sum(len(lease.members()) for lease in self._leases.values())
                nodes = tuple(node.view() for node in self.nodes.values())
                self._effects.append(NodesDescribed(event.request_id, nodes, len(self.tasks) - running, running))
            case ExplainRequested():
                task = self.tasks.get((event.run_id, event.task_id))
                explained = explain(task, self._placer, self._fleet, now) if task else None
                self._effects.append(TaskExplained(event.request_id, explained))
            case _:
                assert_never(event)

    # Waiting.

    def _admit(self, ready: TaskReady, now: float) -> None:
        key = (ready.run_id, ready.spec.task_id)
        if key in self.tasks:
            return
        spec = ready.spec
        task = Task(ready, self._fleet.shape(spec), concurrency_of(spec), next(self._numbers), ready.inputs, now)
        if ready.after:
            source = self.tasks.get((ready.run_id, ready.after))
            if source is None or source.ending is not None:
                self._effects.append(TaskReturned(*key))
                return
            self.tasks[key] = task
            followers.follow(task, source)
            if source.lease_id:
                self._placer.send_along(source, now)
            return
        self.tasks[key] = task
        self._start_clock(task, now)
        self._wait(task, now)

    def _start_clock(self, task: Task, now: float) -> None:
        """Count the task's time from when it could have started; what it waited for is not its own."""
        limit_s = task.ready.spec.total_timeout_s
        if limit_s is not None:
            self._timeouts.set(task, now + limit_s)

    def _wait(self, task: Task, now: float) -> None:
        task.retry_at = None
        if not task.is_over and task.follows is None:
            self._placer.queue.push(task, now)

    def _requeue(self, task: Task, now: float) -> None:
        if task.is_over:
            return
        if task.ending is not None:
            self._end(task)
        else:
            self._wait(task, now)

    # Leases.

    def _take_returned(self, lease: Lease, reason: str, now: float) -> None:
        if lease.started_at is None:
            for task in lease.members():
                # Its worker says that it never began, so the number may be used again.
                task.attempt -= 1
        why = reason or "the worker gave the task back after it had started"
        self._run_again(lease, Failure(FailureKind.WORKER_LOST, why), now)

    def _run_again(self, lease: Lease, failure: Failure, now: float) -> None:
        """Dissolve a lease that ends through no fault of its members, and queue them; nothing is charged."""
        for task in self._holding.dissolve(lease, now):
            if lease.started_at is not None and task.ending is None:
                self._effects.append(TaskRetrying(*task.named, failure, 0.0))
            self._requeue(task, now)

    def _lose_leases(self, node: Node, lost: Sequence[Lease], failure: Failure, now: float) -> None:
        """Queue the members of leases that a node's worker will not end; from now on each runs alone on its node.

        Only a lease that was alone on the node can have ended its worker. It is charged, also when its start was not
        reported in time; others are not.
        """
        held = self._table.held_by(node)
        # A lease that waits for its input cannot have begun.
        is_alone = len(held) == 1 and held[0].tasks[0].follows is None
        for lease in lost:
            for task in lease.members():
                task.shape, task.cohort = self._fleet.alone(task.shape), 0
            if not is_alone:
                self._run_again(lease, failure, now)
                continue
            self._holding.note_start(lease, now)
            members = self._holding.dissolve(lease, now)
            if len(lease.tasks) > 1:
                self._bisect(members, failure, now)
            else:
                self._fail(members[0], failure, now)

    # Ending.

    def _succeed(self, event: AttemptSucceeded, now: float) -> None:
        found = self._holding.started(event.session_id, event.lease_id, event.item, _began_at(event), now)
        if found is None:
            self._refuse_unready(event, now)
            return
        lease, task = found
        ended_at = lease.time_of(event.at, now)
        if event.item == 0:
            # It cannot have taken longer than it was away, whatever its worker says.
            self._placer.learn(task, min(max(0.0, event.duration_s), now - lease.sent_at))
        self._holding.leave(lease, task, now)
        if task.ending is not None and task.ending.kind is not FailureKind.CANCELLED:
            # It is too late, or was refused what it wanted; only who was asked to stop may have been done already.
            self._end(task)
        elif lacking := _lacking(task, event):
            failure = Failure(FailureKind.PAYLOAD, f"the worker reported a success without {lacking}")
            self._fail(task, failure, now, ended_at)
        else:
            self._forget(task)
            done = TaskSucceeded(*task.named, event.outputs, event.split, event.duration_s, ended_at)
            self._effects.append(done)
            for follower in followers.release(task, event.outputs):
                self._start_clock(follower, now)
                if not follower.lease_id:
                    self._wait(follower, now)

    def _take_failure(self, event: AttemptFailed, now: float) -> None:
        self._refuse_unready(event, now)
        lease = self._holding.find(event.session_id, event.lease_id)
        task = None if lease is None else lease.member(event.item)
        if lease is None or task is None:
            return
        if event.failure.kind is FailureKind.WORKER_LOST:
            self._lose_leases(self.nodes[lease.slot.node_id], [lease], event.failure, now)
            return
        if event.failure.kind is not FailureKind.CANCELLED:
            self._holding.note_start(lease, now, _began_at(event))
        if event.failure.kind in BISECTED and len(lease.tasks) > 1:
            self._bisect(self._holding.dissolve(lease, now), event.failure, now)
            return
        self._holding.leave(lease, task, now)
        self._fail(task, event.failure, now, lease.time_of(event.at, now))

    def _refuse_unready(self, event: AttemptSucceeded | AttemptFailed, now: float) -> None:
        """Take back what cannot have ended, because its inputs were not there."""
        lease = self._holding.find(event.session_id, event.lease_id)
        if lease is not None and lease.tasks[0].follows is not None:
            failure = Failure(FailureKind.WORKER_LOST, "the worker reported the end of a task that had no inputs yet")
            self._run_again(lease, failure, now)

    def _bisect(self, members: list[Task], failure: Failure, now: float) -> None:
        """Try the members of a batch that crashed again, in halves, until one that was alone has failed by itself."""
        middle = (len(members) + 1) // 2
        for half in (members[:middle], members[middle:]):
            cohort = next(self._numbers)
            for task in half:
                if task.ending is None:
                    task.cohort = cohort
                    self._effects.append(TaskRetrying(*task.named, failure, 0.0))
                self._requeue(task, now)

    def _fail(self, task: Task, failure: Failure, now: float, ended_at: float | None = None) -> None:
        retry = task.ready.spec.retry
        delay_s = 0.0
        if task.ending is not None:
            self._end(task, ended_at)
            return
        if failure.kind is FailureKind.WORKER_LOST:
            task.losses += 1
            is_final = task.losses >= retry.max_worker_losses
        else:
            task.failures += 1
            is_final = not retry.allows(failure, task.failures)
            delay_s = 0.0 if is_final else retry.backoff_s(task.failures) * task.jitter()
        if is_final:
            task.ending = failure
            self._end(task, ended_at)
            return
        self._effects.append(TaskRetrying(*task.named, failure, delay_s))
        # What took its process down alone must not take others with it the next time.
        is_batched = task.ready.spec.batch is not None
        task.cohort = next(self._numbers) if is_batched and failure.kind in BISECTED else 0
        task.retry_at = now + delay_s
        self._backoff.set(task, task.retry_at)

    def _end_early(self, task: Task, failure: Failure, now: float) -> None:
        """End a task before its time; one that a worker holds ends when the worker says so."""
        if task.ending is not None:
            return
        task.ending = failure
        if not task.lease_id:
            self._end(task)
            return
        lease = self._leases[task.lease_id]
        if all(member.ending is not None for member in lease.members()):
            self._effects.append(StopLease(self.nodes[lease.slot.node_id].session_id, lease.lease_id))
        else:
            # The others go on; what the call makes of this one is ignored.
            self._holding.leave(lease, task, now)
            self._end(task)

    def _end(self, task: Task, ended_at: float | None = None) -> None:
        """Say how a task ended, for the reason it must; at `ended_at` if that is not now."""
        assert task.ending is not None
        self._placer.queue.discard(task)
        followers.leave(task)
        for dropped in followers.drop(task, task.ending):
            # Its run knows that by itself.
            self._forget(dropped)
        self._forget(task)
        if task.ending.kind is FailureKind.CANCELLED:
            self._effects.append(TaskCancelled(*task.named, task.ending))
        else:
            self._effects.append(TaskFailed(*task.named, task.ending, ended_at))

    def _forget(self, task: Task) -> None:
        task.is_over = True
        self._backoff.discard(task)
        self._timeouts.discard(task)
        del self.tasks[task.ready.run_id, task.ready.spec.task_id]

    # Workers.

    def _greet(self, hello: WorkerHello, now: float) -> None:
        self._placer.look_again()
        node = self.nodes.get(hello.node_id)
        if node is not None and node.worker_id == hello.worker_id and node.session_id == hello.session_id:
            self._fleet.resume(node)
            held, ours = set(hello.held_lease_ids), self._table.held_by(node)
            dropped = tuple(held.difference(lease.lease_id for lease in ours))
            self._effects.append(WelcomeWorker(node.worker_id, node.session_id, True, dropped, hello.greeting))
            self._repeat(node, ours, held, now)
            if node.is_draining:
                deadline_s = None if node.drain_at is None else max(0.0, node.drain_at - now)
                self._effects.append(DrainWorker(node.session_id, deadline_s))
                self._holding.let_go(node)
            return
        if node is not None:
            why = "the worker connected again and had forgotten its work"
            if node.worker_id != hello.worker_id:
                # Two machines under one name would do this to each other: each should learn of the other.
                why = f"worker {hello.worker_id!r} on host {hello.hostname!r} serves node {hello.node_id!r} now"
            self._effects.append(CloseSession(node.session_id, "SUPERSEDED", why))
            self._lose(node, why, now)
        node = self._fleet.join(hello, f"{self._epoch}-{next(self._numbers)}")
        dropped = hello.held_lease_ids
        self._effects.append(WelcomeWorker(node.worker_id, node.session_id, False, dropped, hello.greeting))
        self._effects.append(NodesChanged(self._fleet.known()))
        if not self._fleet.wants(hello.worker_id):
            self._drain(node, None, now)

    def _repeat(self, node: Node, leases: Sequence[Lease], held: Container[str], now: float) -> None:
        """Say again what a worker that was away may have missed about its leases; those it has forgotten are lost."""
        forgotten = []
        for lease in leases:
            if lease.lease_id not in held:
                if lease.started_at is not None:
                    forgotten.append(lease)
                    continue
                self._effects.append(self._table.assignment(lease))
            self._repeat_end(lease)
        failure = Failure(FailureKind.WORKER_LOST, "the worker came back and had forgotten the task")
        self._lose_leases(node, forgotten, failure, now)

    def _repeat_end(self, lease: Lease) -> None:
        """Say again that a lease is to end, if it is."""
        session_id = self.nodes[lease.slot.node_id].session_id
        if all(task.ending is not None for task in lease.members()):
            self._effects.append(StopLease(session_id, lease.lease_id))
        elif lease.is_revoked:
            self._effects.append(RevokeLease(session_id, lease.lease_id))

    def _compare(self, node: Node, heartbeat: WorkerHeartbeat, now: float) -> None:
        """Repair what a worker and the ledger disagree on; what is still on its way is no disagreement."""
        ours = self._table.held_by(node)
        forgotten = []
        for lease in ours:
            if lease.lease_id in heartbeat.held_lease_ids:
                self._repeat_end(lease)
            elif lease.sequence <= heartbeat.assignment_sequence:
                forgotten.append(lease)
            elif now >= max(lease.sent_at, lease.repeated_at) + self._fleet.session_ttl_s:
                lease.repeated_at = now
                self._effects.append(self._table.assignment(lease))
        for lease_id in sorted(heartbeat.held_lease_ids.difference(lease.lease_id for lease in ours)):
            self._effects.append(StopLease(node.session_id, lease_id))
        failure = Failure(FailureKind.WORKER_LOST, "its worker no longer knew of the task")
        self._lose_leases(node, forgotten, failure, now)

    def _drain(self, node: Node, deadline_s: float | None, now: float) -> None:
        self._placer.look_again()
        self._fleet.drain(node, None if deadline_s is None else now + deadline_s)
        self._effects.append(NodesChanged(self._fleet.known()))
        self._effects.append(DrainWorker(node.session_id, deadline_s))
        self._placer.ahead.vacate(node)
        self._holding.let_go(node)

    def _move_all(self, node: Node, now: float) -> None:
        """Have done elsewhere what a node that is drained has not got done in time; no fault of the tasks."""
        node.drain_at = None
        failure = Failure(FailureKind.WORKER_LOST, f"node {node.node_id!r} was drained before the task ended")
        for lease in self._table.held_by(node):
            self._run_again(lease, failure, now)

    def _lose(self, node: Node, reason: str, now: float) -> None:
        self._placer.look_again()
        self._effects.append(ForgetSession(node.session_id))
        failure = Failure(FailureKind.WORKER_LOST, f"node {node.node_id!r} was lost: {reason}")
        # A node that is lost does not leave for being drained.
        may_return, node.is_draining = not node.is_draining, False
        if may_return:
            self._lose_leases(node, self._table.held_by(node), failure, now)
        else:
            # It was to end anyway, which says nothing about what ran there.
            self._fleet.unwant(node.worker_id)
            for lease in self._table.held_by(node):
                self._run_again(lease, failure, now)
        self._fleet.remove(node, may_return=may_return)
        self._effects.append(NodesChanged(self._fleet.known()))


def _began_at(event: AttemptSucceeded | AttemptFailed) -> float | None:
    """Return when an attempt whose start was not reported began, as far as its end tells."""
    return None if event.at is None else event.at - max(0.0, event.duration_s)


def _lacking(task: Task, event: AttemptSucceeded) -> str:
    """Return what others could count on and a success does not bring."""
    for output in task.ready.spec.outputs:
        if output not in event.outputs:
            return f"its output {output!r}"
    for output in task.ready.split_outputs:
        if output not in event.split:
            return f"the items of its output {output!r}"
    return ""
