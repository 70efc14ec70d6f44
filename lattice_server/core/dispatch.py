"""Owns what becomes of tasks handed over: waiting, running, retries, time limits, lost workers.

This is the scheduler's machine.

Rule: a task is in exactly one place: following another task, waiting in the queue, backing off, or in a lease that a
slot holds. A task in a lease may follow another as well: it was sent along with it.
"""

import heapq
from collections.abc import Mapping, Sequence
from itertools import count
from typing import assert_never
from zlib import crc32

from lattice_server.core.attempts import Lease, Task
from lattice_server.core.explanation import explain
from lattice_server.core.fleet import Fleet
from lattice_server.core.launching import Launcher
from lattice_server.core.leases import Node, held_leases
from lattice_server.core.messages import (
    AttemptFailed,
    AttemptLogged,
    AttemptSpawned,
    AttemptStarted,
    AttemptSucceeded,
    CancelRequested,
    CloseSession,
    DrainRequested,
    ExplainRequested,
    LeaseReturned,
    NodesChanged,
    NodesDescribed,
    NodesRequested,
    RevokeLease,
    SchedulerEffect,
    SchedulerEvent,
    StopLease,
    TaskCancelled,
    TaskExplained,
    TaskFailed,
    TaskLogged,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TasksSpawned,
    TaskStarted,
    TaskSucceeded,
    WelcomeWorker,
    WorkerDetached,
    WorkerHello,
    WorkerLost,
)
from lattice_server.core.model import Binding, Failure, FailureKind, OutputRef, Outputs, Parameter, resolve
from lattice_server.core.placement import shape_of

# A batch that ended like this is halved until the member at fault is alone.
BISECTED = frozenset({FailureKind.CRASHED, FailureKind.OUT_OF_MEMORY, FailureKind.WORKER_LOST})


class Dispatch:
    """The scheduler's machine; only the scheduler's thread touches it."""

    def __init__(self, epoch: str, session_ttl_s: float = 30.0, limits: Mapping[str, int] | None = None) -> None:
        self.tasks: dict[tuple[str, str], Task] = {}
        self._epoch = epoch
        self._numbers = count(1)
        self._effects: list[SchedulerEffect] = []
        self._fleet = Fleet(session_ttl_s)
        self._launcher = Launcher(self._fleet, self._numbers, epoch, self._effects.append, limits or {})
        self._leases = self._launcher.leases
        self._backoff: list[tuple[float, int, Task]] = []
        self._timeouts: list[tuple[float, int, Task]] = []

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
        while self._timeouts and self._timeouts[0][0] <= now:
            self._time_out(heapq.heappop(self._timeouts)[2])
        while self._backoff and self._backoff[0][0] <= now:
            self._wait(heapq.heappop(self._backoff)[2], now)
        self._launcher.take_back(now)
        self._launcher.place_waiting(now)
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        due = [self._launcher.next_deadline(), self._fleet.next_deadline()]
        due += [heap[0][0] for heap in (self._backoff, self._timeouts) if heap]
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
        for node in self.nodes.values():
            node.check()
        assert sorted(held_leases(self.nodes)) == sorted(self._leases)
        self._launcher.check()
        waiting = [id(task) for group in self._launcher.queue.collectors() for task in group.tasks()]
        assert len(waiting) == sum(group.count for group in self._launcher.queue.collectors())
        backing_off = [id(t) for _, _, t in self._backoff if t.retry_at is not None and self._is_known(t)]
        leased = [id(task) for lease in self._leases.values() for task in lease.members()]
        following = [id(t) for t in self.tasks.values() if t.follows is not None and not t.lease_id]
        places = waiting + backing_off + leased + following
        assert len(places) == len(set(places)), "a task is in two places"
        assert set(places) == {id(task) for task in self.tasks.values()}, "a task is nowhere"
        for task in self.tasks.values():
            assert task.follows is None or self._is_known(task.follows), "a task follows one that ended"
            assert all(follower.follows is task for follower in task.followers.values())
            if task.follows is not None and task.lease_id:
                assert self._leases[task.lease_id].started_at is None, "a task went ahead of its input"

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Take one event; its effects come with the next `tick`."""
        match event:
            case AttemptSucceeded():
                self._succeed(event, now)
            case TaskReady():
                self._admit(event, now)
            case AttemptStarted():
                if lease := self._ready_lease(event.session_id, event.lease_id):
                    self._note_start(lease, now)
            case AttemptLogged():
                if lease := self._ready_lease(event.session_id, event.lease_id):
                    self._note_start(lease, now)
                    if task := lease.member(event.item):
                        named = (task.ready.run_id, task.ready.spec.task_id, task.attempt)
                        self._effects.append(TaskLogged(*named, event.is_error, event.text, event.is_truncated))
            case AttemptFailed():
                self._take_failure(event, now)
            case LeaseReturned():
                if lease := self._lease(event.session_id, event.lease_id):
                    self._give_back(lease, now)
            case AttemptSpawned():
                if (lease := self._ready_lease(event.session_id, event.lease_id)) and (
                    task := lease.member(event.item)
                ):
                    self._note_start(lease, now)
                    if event.refusal is not None:
                        self._end_early(task, event.refusal)
                    else:
                        self._effects.append(TasksSpawned(task.ready.run_id, task.ready.spec.task_id, event.tasks))
            case CancelRequested():
                for task_id in event.task_ids:
                    if task := self.tasks.get((event.run_id, task_id)):
                        self._end_early(task, event.failure)
            case WorkerHello():
                self._greet(event, now)
            case WorkerDetached():
                if node := self._fleet.by_session(event.session_id):
                    node.detached_at = now
            case WorkerLost():
                for node in [n for n in self.nodes.values() if n.worker_id == event.worker_id]:
                    self._lose(node, event.reason, now)
            case DrainRequested():
                if node := self.nodes.get(event.node_id):
                    node.is_draining = True
                    self._effects.append(NodesChanged(self._fleet.known()))
                    self._leave_if_done(node)
            case NodesRequested():
                running = sum(len(lease.members()) for lease in self._leases.values())
                nodes = tuple(node.view() for node in self.nodes.values())
                self._effects.append(NodesDescribed(event.request_id, nodes, len(self.tasks) - running, running))
            case ExplainRequested():
                task = self.tasks.get((event.run_id, event.task_id))
                explained = explain(task, self._launcher, self._fleet, now) if task else None
                self._effects.append(TaskExplained(event.request_id, explained))
            case _:
                assert_never(event)

    def _is_known(self, task: Task) -> bool:
        return self.tasks.get((task.ready.run_id, task.ready.spec.task_id)) is task

    # Waiting.

    def _admit(self, ready: TaskReady, now: float) -> None:
        spec = ready.spec
        task = Task(ready, shape_of(spec), next(self._numbers), ready.inputs, now)
        if ready.after:
            source = self.tasks.get((ready.run_id, ready.after))
            if source is None or source.ending is not None:
                self._effects.append(TaskReturned(ready.run_id, spec.task_id))
                return
            self.tasks[ready.run_id, spec.task_id] = task
            task.follows = source
            source.followers[task.ticket] = task
            if source.lease_id:
                self._launcher.send_along(source)
            return
        self.tasks[ready.run_id, spec.task_id] = task
        self._start_clock(task, now)
        self._wait(task, now)

    def _start_clock(self, task: Task, now: float) -> None:
        """Count the task's time from when it could have started; what it waited for is not its own."""
        limit_s = task.ready.spec.total_timeout_s
        if limit_s is not None:
            heapq.heappush(self._timeouts, (now + limit_s, task.ticket, task))

    def _wait(self, task: Task, now: float) -> None:
        task.retry_at = None
        if self._is_known(task) and task.follows is None:
            self._launcher.queue.push(task, now)

    def _requeue(self, task: Task, now: float) -> None:
        if not self._is_known(task):
            return
        if task.ending is not None:
            self._end(task)
        else:
            self._wait(task, now)

    # Leases.

    def _lease(self, session_id: str, lease_id: str) -> Lease | None:
        lease = self._leases.get(lease_id)
        if lease is None or self.nodes[lease.slot.node_id].session_id != session_id:
            return None
        return lease

    def _ready_lease(self, session_id: str, lease_id: str) -> Lease | None:
        """Return a lease whose tasks have all their inputs; only such a one can have started."""
        lease = self._lease(session_id, lease_id)
        return None if lease is None or lease.tasks[0].follows is not None else lease

    def _note_start(self, lease: Lease, now: float) -> None:
        if lease.started_at is not None:
            return
        lease.started_at = now
        node = self.nodes[lease.slot.node_id]
        for task in lease.members():
            started = (task.ready.run_id, task.ready.spec.task_id, task.attempt)
            self._effects.append(TaskStarted(*started, node.node_id, node.node_ip, lease.slot.gpu_indices))

    def _leave_lease(self, lease: Lease, item: int, now: float, held_s: float | None = None) -> None:
        """Note that one member of a lease is over; with the last one the lease is released."""
        lease.tasks[item].lease_id = ""
        lease.ended.add(item)
        if len(lease.ended) == len(lease.tasks):
            self._release(lease, now, held_s)

    def _dissolve(self, lease: Lease, now: float) -> list[Task]:
        """Release a lease and return the members that had not ended."""
        members = list(lease.members())
        for task in members:
            task.lease_id = ""
        self._release(lease, now)
        return members

    def _release(self, lease: Lease, now: float, held_s: float | None = None) -> None:
        if held_s is None:
            held_s = 0.0 if lease.started_at is None else now - lease.started_at
        self._launcher.release(lease, now, held_s)
        self._leave_if_done(self.nodes[lease.slot.node_id])

    def _give_back(self, lease: Lease, now: float) -> None:
        for task in self._dissolve(lease, now):
            task.attempt -= 1
            self._requeue(task, now)

    # Ending.

    def _succeed(self, event: AttemptSucceeded, now: float) -> None:
        lease = self._ready_lease(event.session_id, event.lease_id)
        task = None if lease is None else lease.member(event.item)
        if lease is None or task is None:
            return
        self._note_start(lease, now)
        if event.item == 0:
            self._launcher.learn(task, event.duration_s)
        self._leave_lease(lease, event.item, now, event.duration_s)
        del self.tasks[task.ready.run_id, task.ready.spec.task_id]
        ended = (task.ready.run_id, task.ready.spec.task_id, task.attempt)
        self._effects.append(TaskSucceeded(*ended, event.outputs, event.split))
        self._release_followers(task, event.outputs, now)

    def _take_failure(self, event: AttemptFailed, now: float) -> None:
        lease = self._ready_lease(event.session_id, event.lease_id)
        if lease is None:
            if lease := self._lease(event.session_id, event.lease_id):
                self._give_back(lease, now)
            return
        task = lease.member(event.item)
        if task is None:
            return
        if event.failure.kind is not FailureKind.CANCELLED:
            self._note_start(lease, now)
        if event.failure.kind in BISECTED and len(lease.tasks) > 1:
            self._bisect(self._dissolve(lease, now), event.failure, now)
            return
        self._leave_lease(lease, event.item, now)
        self._fail(task, event.failure, now)

    def _bisect(self, members: list[Task], failure: Failure, now: float) -> None:
        """Try the members of a batch that crashed again, in halves; one that is alone has failed by itself."""
        if len(members) == 1:
            self._fail(members[0], failure, now)
            return
        middle = (len(members) + 1) // 2
        for half in (members[:middle], members[middle:]):
            cohort = next(self._numbers)
            for task in half:
                if task.ending is None:
                    task.cohort = cohort
                    self._effects.append(TaskRetrying(*self._named(task), failure, 0.0))
                self._requeue(task, now)

    def _fail(self, task: Task, failure: Failure, now: float) -> None:
        retry = task.ready.spec.retry
        delay_s = 0.0
        if task.ending is not None:
            self._end(task)
            return
        if failure.kind is FailureKind.WORKER_LOST:
            task.losses += 1
            is_final = task.losses >= retry.max_worker_losses
        else:
            task.failures += 1
            is_final = not retry.allows(failure, task.failures)
            delay_s = 0.0 if is_final else retry.backoff_s(task.failures) * _jitter(task)
        if is_final:
            task.ending = failure
            self._end(task)
        else:
            self._effects.append(TaskRetrying(*self._named(task), failure, delay_s))
            task.retry_at, task.cohort = now + delay_s, 0
            heapq.heappush(self._backoff, (task.retry_at, next(self._numbers), task))

    def _time_out(self, task: Task) -> None:
        if self._is_known(task):
            limit_s = task.ready.spec.total_timeout_s
            self._end_early(task, Failure(FailureKind.TIMEOUT, f"the task took longer than {limit_s:g} s in all"))

    def _end_early(self, task: Task, failure: Failure) -> None:
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
        elif len(lease.tasks) > 1:
            # The others go on; what the call makes of this one is ignored.
            task.lease_id = ""
            lease.ended.add(lease.tasks.index(task))
            self._end(task)

    def _end(self, task: Task) -> None:
        """Say how a task ended, for the reason it must."""
        assert task.ending is not None
        self._launcher.queue.discard(task)
        if task.follows is not None:
            del task.follows.followers[task.ticket]
            task.follows = None
        self._drop_followers(task, task.ending)
        del self.tasks[task.ready.run_id, task.ready.spec.task_id]
        is_cancelled = task.ending.kind is FailureKind.CANCELLED
        self._effects.append((TaskCancelled if is_cancelled else TaskFailed)(*self._named(task), task.ending))

    @staticmethod
    def _named(task: Task) -> tuple[str, str, int]:
        return task.ready.run_id, task.ready.spec.task_id, task.attempt

    def _release_followers(self, task: Task, outputs: Outputs, now: float) -> None:
        def value_of(reference: OutputRef | Parameter) -> Binding:
            assert isinstance(reference, OutputRef), "the run resolved its parameters"
            return outputs[reference.output]

        for follower in task.followers.values():
            follower.follows = None
            follower.inputs = {name: resolve(binding, value_of) for name, binding in follower.inputs.items()}
            self._start_clock(follower, now)
            if not follower.lease_id:
                self._wait(follower, now)

    def _drop_followers(self, task: Task, failure: Failure) -> None:
        """Forget what will never have its inputs; its run knows that by itself."""
        frontier = [task]
        while frontier:
            source = frontier.pop()
            for follower in source.followers.values():
                follower.follows = None
                if follower.lease_id:
                    # The worker gives it back by itself.
                    follower.ending = follower.ending or Failure(FailureKind.CANCELLED, failure.message)
                else:
                    del self.tasks[follower.ready.run_id, follower.ready.spec.task_id]
                frontier.append(follower)
            source.followers = {}

    # Workers.

    def _greet(self, hello: WorkerHello, now: float) -> None:
        node = self.nodes.get(hello.node_id)
        if node is not None and node.worker_id == hello.worker_id and node.session_id == hello.session_id:
            node.detached_at = None
            held = set(hello.held_lease_ids)
            ours = [lease_id for slot in node.slots.values() for lease_id in slot.lease_ids]
            self._effects.append(WelcomeWorker(node.worker_id, node.session_id, True, tuple(held.difference(ours))))
            for lease_id in ours:
                self._repeat(self._leases[lease_id], is_held=lease_id in held)
            return
        if node is not None:
            self._effects.append(CloseSession(node.session_id, "SUPERSEDED", "the worker connected again"))
            self._lose(node, "its worker connected again and had forgotten its work", now)
        node = self._fleet.join(hello, f"{self._epoch}-{next(self._numbers)}")
        self._effects.append(WelcomeWorker(node.worker_id, node.session_id, False, hello.held_lease_ids))
        self._effects.append(NodesChanged(self._fleet.known()))

    def _repeat(self, lease: Lease, *, is_held: bool) -> None:
        """Say again what a worker that was away may have missed about a lease."""
        session_id = self.nodes[lease.slot.node_id].session_id
        if not is_held and lease.started_at is None:
            self._effects.append(self._launcher.assignment(lease))
        if all(task.ending is not None for task in lease.members()):
            self._effects.append(StopLease(session_id, lease.lease_id))
        elif lease.is_revoked:
            self._effects.append(RevokeLease(session_id, lease.lease_id))

    def _lose(self, node: Node, reason: str, now: float) -> None:
        leases = [self._leases[lease_id] for slot in node.slots.values() for lease_id in slot.lease_ids]
        lost = [(lease.started_at is not None, len(lease.tasks) > 1, self._dissolve(lease, now)) for lease in leases]
        self._fleet.remove(node, may_return=not node.is_draining)
        self._effects.append(NodesChanged(self._fleet.known()))
        failure = Failure(FailureKind.WORKER_LOST, f"node {node.node_id!r} was lost: {reason}")
        for has_started, is_batch, tasks in lost:
            if has_started and is_batch:
                self._bisect(tasks, failure, now)
                continue
            for task in tasks:
                if has_started:
                    self._fail(task, failure, now)
                else:
                    task.attempt -= 1
                    self._requeue(task, now)

    def _leave_if_done(self, node: Node) -> None:
        if node.is_draining and not node.slots and node.node_id in self.nodes:
            self._fleet.remove(node, may_return=False)
            self._effects.append(CloseSession(node.session_id, "DRAINED", "the node was drained"))


def _jitter(task: Task) -> float:
    """Return a factor from a half to one, different for each task and attempt and the same when played again."""
    name = f"{task.ready.run_id}/{task.ready.spec.task_id}/{task.attempt}"
    return 0.5 + crc32(name.encode()) / 2**33
