"""Owns what waits and what runs: queueing, placement, sending ahead, retries, lost workers. The scheduler's machine.

Rule: a task is in exactly one place: following another task, waiting in a queue, backing off, or in a lease that a
slot holds. A task in a lease may follow another as well: it was sent along with it.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import assert_never

from lattice_server.core.leases import Node, Slot, held_leases
from lattice_server.core.messages import (
    Assign,
    AttemptFailed,
    AttemptLogged,
    AttemptStarted,
    AttemptSucceeded,
    CancelRequested,
    CloseSession,
    DrainRequested,
    LeaseReturned,
    RevokeLease,
    SchedulerEvent,
    StopLease,
    TaskCancelled,
    TaskEvent,
    TaskFailed,
    TaskLogged,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TaskStarted,
    TaskSucceeded,
    WelcomeWorker,
    WorkerDetached,
    WorkerEffect,
    WorkerHello,
    WorkerLost,
)
from lattice_server.core.model import Binding, Failure, FailureKind, OutputRef, Outputs, Parameter, resolve
from lattice_server.core.placement import Shape, place, suits

SEND_AHEAD_S = 0.010  # Work worth at most this long waits behind other work on a worker.
SEND_AHEAD_LEASES = 64
PATIENCE_S = 0.020  # What waits behind one attempt for longer is taken back.


@dataclass(slots=True)
class Task:
    """One task handed over. `ticket` orders it among its equals and stays with it over retries. `follows` is the task
    it still waits for, and `inputs` refer to that one's outputs until it succeeds."""

    ready: TaskReady
    shape: Shape
    ticket: int
    inputs: Mapping[str, Binding]
    follows: "Task | None" = None
    followers: "dict[int, Task]" = field(default_factory=dict)
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    is_waiting: bool = False
    lease_id: str = ""
    cancelled: Failure | None = None


@dataclass(slots=True)
class Lease:
    """One attempt in the hands of a worker."""

    lease_id: str
    task: Task
    slot: Slot
    expected_s: float
    after_lease_id: str = ""
    is_started: bool = False
    is_revoked: bool = False


Effect = TaskEvent | TaskReturned | WorkerEffect


class Dispatch:
    """The scheduler's machine; only the scheduler's thread touches it."""

    def __init__(self, epoch: str, session_ttl_s: float = 30.0) -> None:
        self.nodes: dict[str, Node] = {}
        self.tasks: dict[tuple[str, str], Task] = {}
        self.leases: dict[str, Lease] = {}
        self._epoch = epoch
        self._session_ttl_s = session_ttl_s
        self._sessions: dict[str, Node] = {}
        self._queues: dict[Shape, list[tuple[int, int, Task]]] = {}
        self._backoff: list[tuple[float, int, Task]] = []
        self._running: dict[Shape, dict[int, Slot]] = {}
        self._crowded: dict[int, Slot] = {}
        self._durations: dict[str, float] = {}
        self._numbers = count(1)
        self._effects: list[Effect] = []

    def handle_all(self, events: Sequence[SchedulerEvent], now: float) -> list[Effect]:
        """Take events in order, then place what can be placed. One placement serves them all."""
        for event in events:
            self.take(event, now)
        return self.tick(now)

    def handle(self, event: SchedulerEvent, now: float) -> list[Effect]:
        """Take one event, then place what can be placed."""
        return self.handle_all((event,), now)

    def tick(self, now: float) -> list[Effect]:
        """Do what is due and place what can be placed."""
        for node in [n for n in self.nodes.values() if n.detached_at is not None]:
            if now >= (node.detached_at or 0.0) + self._session_ttl_s:
                self._lose(node, "its worker did not come back", now)
        while self._backoff and self._backoff[0][0] <= now:
            self._wait(heapq.heappop(self._backoff)[2])
        self._take_back(now)
        self._place_waiting(now)
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        due = [slot.progress_at + PATIENCE_S for slot in self._crowded.values()]
        due += [n.detached_at + self._session_ttl_s for n in self.nodes.values() if n.detached_at is not None]
        if self._backoff:
            due.append(self._backoff[0][0])
        return min(due, default=None)

    def queued_tasks(self) -> int:
        """Return how many tasks wait or back off."""
        return len(self.tasks) - len(self.leases)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        for node in self.nodes.values():
            node.check()
        assert sorted(held_leases(self.nodes)) == sorted(self.leases)
        waiting = [id(task) for queue in self._queues.values() for _, _, task in queue if task.is_waiting]
        backing_off = [id(t) for _, _, t in self._backoff if not t.lease_id and self._is_known(t)]
        leased = [id(lease.task) for lease in self.leases.values()]
        following = [id(t) for t in self.tasks.values() if t.follows is not None and not t.lease_id]
        places = waiting + backing_off + leased + following
        assert len(places) == len(set(places)), "a task is in two places"
        assert set(places) == {id(task) for task in self.tasks.values()}, "a task is nowhere"
        for task in self.tasks.values():
            assert task.follows is None or self._is_known(task.follows), "a task follows one that ended"
            assert all(follower.follows is task for follower in task.followers.values())
            if task.follows is not None and task.lease_id:
                assert not self.leases[task.lease_id].is_started, "a task went ahead of its input"

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Take one event; its effects come with the next `tick`."""
        match event:
            case AttemptSucceeded():
                self._succeed(event, now)
            case TaskReady():
                self._admit(event)
            case AttemptStarted():
                if lease := self._ready_lease(event.session_id, event.lease_id):
                    self._note_start(lease)
            case AttemptLogged():
                if lease := self._ready_lease(event.session_id, event.lease_id):
                    self._note_start(lease)
                    run_id, task_id = lease.task.ready.run_id, lease.task.ready.spec.task_id
                    logged = (event.is_error, event.text, event.is_truncated)
                    self._effects.append(TaskLogged(run_id, task_id, lease.task.attempt, *logged))
            case AttemptFailed():
                if lease := self._ready_lease(event.session_id, event.lease_id):
                    if event.failure.kind is not FailureKind.CANCELLED:
                        self._note_start(lease)
                    self._drop_lease(lease, now)
                    self._fail(lease.task, event.failure, now)
                else:
                    self.take(LeaseReturned(event.session_id, event.lease_id, ""), now)
            case LeaseReturned():
                if lease := self._lease(event.session_id, event.lease_id):
                    self._drop_lease(lease, now)
                    lease.task.attempt -= 1
                    self._requeue(lease.task)
            case CancelRequested():
                for task_id in event.task_ids:
                    self._cancel(event.run_id, task_id, event.failure)
            case WorkerHello():
                self._greet(event, now)
            case WorkerDetached():
                if node := self._sessions.get(event.session_id):
                    node.detached_at = now
            case WorkerLost():
                for node in [n for n in self.nodes.values() if n.worker_id == event.worker_id]:
                    self._lose(node, event.reason, now)
            case DrainRequested():
                if node := self.nodes.get(event.node_id):
                    node.is_draining = True
                    self._leave_if_done(node)
            case _:
                assert_never(event)

    def _is_known(self, task: Task) -> bool:
        return self.tasks.get((task.ready.run_id, task.ready.spec.task_id)) is task

    # Waiting.

    def _admit(self, ready: TaskReady) -> None:
        spec = ready.spec
        shape = Shape(spec.resources, spec.function.is_async, spec.isolation, spec.node_selector)
        task = Task(ready, shape, next(self._numbers), ready.inputs)
        if not ready.after:
            self.tasks[ready.run_id, spec.task_id] = task
            self._wait(task)
        elif (source := self.tasks.get((ready.run_id, ready.after))) is not None and source.cancelled is None:
            self.tasks[ready.run_id, spec.task_id] = task
            task.follows = source
            source.followers[task.ticket] = task
            if source.lease_id:
                self._send_along(source)
        else:
            self._effects.append(TaskReturned(ready.run_id, spec.task_id))

    def _wait(self, task: Task) -> None:
        if not self._is_known(task) or task.follows is not None:
            return
        task.is_waiting = True
        heapq.heappush(self._queues.setdefault(task.shape, []), (-task.ready.priority, task.ticket, task))

    def _requeue(self, task: Task) -> None:
        if not self._is_known(task):
            return
        if task.cancelled is not None:
            self._end_cancelled(task)
        else:
            self._wait(task)

    # Placing.

    def _place_waiting(self, now: float) -> None:
        shapes = sorted(self._queues, key=lambda shape: self._queues[shape][0][:2])
        for shape in shapes:
            queue = self._queues[shape]
            while queue:
                if not queue[0][2].is_waiting:
                    heapq.heappop(queue)
                elif not self._place(shape, queue[0][2], now):
                    break
                else:
                    heapq.heappop(queue)
            if not queue:
                del self._queues[shape]

    def _place(self, shape: Shape, task: Task, now: float) -> bool:
        found = place(shape, self.nodes.values())
        if found is not None:
            node, devices = found
            slot = Slot(next(self._numbers), node.node_id, shape.resources, shape.is_async, devices, progress_at=now)
            node.take(slot)
            self._running.setdefault(shape, {})[slot.slot_id] = slot
            self._assign(task, slot, self._durations.get(task.ready.spec.function.digest, 0.0))
            self._send_along(task)
            return True
        return self._send_ahead(shape, task)

    def _send_ahead(self, shape: Shape, task: Task) -> bool:
        expected_s = self._durations.get(task.ready.spec.function.digest)
        if shape.is_async or expected_s is None or expected_s > SEND_AHEAD_S:
            return False
        slots = self._running.get(shape)
        if not slots:
            return False
        slot = min(slots.values(), key=lambda s: (s.is_slow, s.backlog_s, len(s.lease_ids)))
        if slot.is_slow or slot.backlog_s + expected_s > SEND_AHEAD_S or len(slot.lease_ids) >= SEND_AHEAD_LEASES:
            return False
        node = self.nodes[slot.node_id]
        if not (node.takes_work and suits(shape, node)):
            return False
        self._assign(task, slot, expected_s)
        self._crowded[slot.slot_id] = slot
        return True

    def _send_along(self, task: Task) -> None:
        """Send what follows a leased task to the same slot, so that the worker goes on without asking.

        Only along a chain: of several followers all but one would run sooner elsewhere.
        """
        while len(task.followers) == 1:
            slot = self.leases[task.lease_id].slot
            (following,) = task.followers.values()
            expected_s = self._durations.get(following.ready.spec.function.digest)
            if expected_s is None or following.lease_id or following.shape != task.shape or task.shape.is_async:
                return
            if slot.backlog_s + expected_s > SEND_AHEAD_S or len(slot.lease_ids) >= SEND_AHEAD_LEASES:
                return
            self._assign(following, slot, expected_s)
            task = following

    def _assign(self, task: Task, slot: Slot, expected_s: float) -> None:
        task.is_waiting = False
        task.attempt += 1
        after_lease_id = "" if task.follows is None else task.follows.lease_id
        lease = Lease(f"{self._epoch}-{next(self._numbers)}", task, slot, expected_s, after_lease_id)
        task.lease_id = lease.lease_id
        self.leases[lease.lease_id] = lease
        slot.lease_ids[lease.lease_id] = None
        slot.backlog_s += expected_s
        self._effects.append(self._assignment(lease))

    def _assignment(self, lease: Lease) -> Assign:
        spec = lease.task.ready.spec
        return Assign(
            session_id=self.nodes[lease.slot.node_id].session_id,
            lease_id=lease.lease_id,
            slot=lease.slot.slot_id,
            function=spec.function,
            run_id=lease.task.ready.run_id,
            task_id=spec.task_id,
            attempt=lease.task.attempt,
            inputs=lease.task.inputs,
            outputs=spec.outputs,
            isolation=spec.isolation,
            resources=spec.resources,
            gpu_indices=lease.slot.gpu_indices,
            timeout_s=spec.attempt_timeout_s,
            after_lease_id="" if lease.task.follows is None else lease.after_lease_id,
        )

    def _take_back(self, now: float) -> None:
        for slot in list(self._crowded.values()):
            if now < slot.progress_at + PATIENCE_S:
                continue
            del self._crowded[slot.slot_id]
            slot.is_slow = True
            session_id = self.nodes[slot.node_id].session_id
            for lease_id in list(slot.lease_ids)[1:]:
                lease = self.leases[lease_id]
                # What follows another task cannot run sooner elsewhere.
                if not (lease.is_started or lease.is_revoked or lease.task.follows is not None):
                    lease.is_revoked = True
                    self._effects.append(RevokeLease(session_id, lease_id))

    # Ending.

    def _lease(self, session_id: str, lease_id: str) -> Lease | None:
        lease = self.leases.get(lease_id)
        if lease is None or self.nodes[lease.slot.node_id].session_id != session_id:
            return None
        return lease

    def _ready_lease(self, session_id: str, lease_id: str) -> Lease | None:
        """Return a lease whose task has all its inputs; only such a one can have started."""
        lease = self._lease(session_id, lease_id)
        return None if lease is None or lease.task.follows is not None else lease

    def _note_start(self, lease: Lease) -> None:
        if lease.is_started:
            return
        lease.is_started = True
        task, node = lease.task, self.nodes[lease.slot.node_id]
        started = (task.ready.run_id, task.ready.spec.task_id, task.attempt)
        self._effects.append(TaskStarted(*started, node.node_id, node.node_ip, lease.slot.gpu_indices))

    def _drop_lease(self, lease: Lease, now: float) -> None:
        slot, lease.task.lease_id = lease.slot, ""
        if next(iter(slot.lease_ids)) == lease.lease_id:
            slot.progress_at, slot.is_slow = now, False
        del self.leases[lease.lease_id]
        del slot.lease_ids[lease.lease_id]
        slot.backlog_s = max(0.0, slot.backlog_s - lease.expected_s)
        if len(slot.lease_ids) < 2:
            self._crowded.pop(slot.slot_id, None)
        if not slot.lease_ids:
            node = self.nodes[slot.node_id]
            node.release(slot)
            running = self._running[lease.task.shape]
            del running[slot.slot_id]
            if not running:
                del self._running[lease.task.shape]
            self._leave_if_done(node)

    def _succeed(self, event: AttemptSucceeded, now: float) -> None:
        lease = self._ready_lease(event.session_id, event.lease_id)
        if lease is None:
            return
        self._note_start(lease)
        task = lease.task
        digest = task.ready.spec.function.digest
        known = self._durations.get(digest, event.duration_s)
        self._durations[digest] = known + 0.3 * (event.duration_s - known)
        self._drop_lease(lease, now)
        del self.tasks[task.ready.run_id, task.ready.spec.task_id]
        ended = (task.ready.run_id, task.ready.spec.task_id, task.attempt)
        self._effects.append(TaskSucceeded(*ended, event.outputs))
        self._release_followers(task, event.outputs)

    def _release_followers(self, task: Task, outputs: Outputs) -> None:
        def value_of(reference: OutputRef | Parameter) -> Binding:
            assert isinstance(reference, OutputRef), "the run resolved its parameters"
            return outputs[reference.output]

        for follower in task.followers.values():
            follower.follows = None
            follower.inputs = {name: resolve(binding, value_of) for name, binding in follower.inputs.items()}
            if not follower.lease_id:
                self._wait(follower)

    def _drop_followers(self, task: Task, failure: Failure) -> None:
        """Forget what will never have its inputs; its run knows that by itself."""
        frontier = [task]
        while frontier:
            source = frontier.pop()
            for follower in source.followers.values():
                follower.follows = None
                if follower.lease_id:
                    # The worker gives it back by itself.
                    follower.cancelled = follower.cancelled or failure
                else:
                    del self.tasks[follower.ready.run_id, follower.ready.spec.task_id]
                frontier.append(follower)
            source.followers = {}

    def _fail(self, task: Task, failure: Failure, now: float) -> None:
        retry = task.ready.spec.retry
        delay_s = 0.0
        if task.cancelled is not None:
            self._end_cancelled(task)
            return
        if failure.kind is FailureKind.WORKER_LOST:
            task.losses += 1
            is_final = task.losses >= retry.max_worker_losses
        else:
            task.failures += 1
            is_final = not retry.allows(failure, task.failures)
            delay_s = 0.0 if is_final else retry.backoff_s(task.failures)
        named = (task.ready.run_id, task.ready.spec.task_id, task.attempt, failure)
        if is_final:
            del self.tasks[task.ready.run_id, task.ready.spec.task_id]
            self._effects.append(TaskFailed(*named))
            self._drop_followers(task, failure)
        else:
            self._effects.append(TaskRetrying(*named, delay_s))
            heapq.heappush(self._backoff, (now + delay_s, next(self._numbers), task))

    def _cancel(self, run_id: str, task_id: str, failure: Failure) -> None:
        task = self.tasks.get((run_id, task_id))
        if task is None or task.cancelled is not None:
            return
        task.cancelled = failure
        if task.lease_id:
            node = self.nodes[self.leases[task.lease_id].slot.node_id]
            self._effects.append(StopLease(node.session_id, task.lease_id))
        else:
            self._end_cancelled(task)

    def _end_cancelled(self, task: Task) -> None:
        assert task.cancelled is not None
        task.is_waiting = False
        if task.follows is not None:
            del task.follows.followers[task.ticket]
            task.follows = None
        self._drop_followers(task, task.cancelled)
        del self.tasks[task.ready.run_id, task.ready.spec.task_id]
        ended = (task.ready.run_id, task.ready.spec.task_id, task.attempt)
        self._effects.append(TaskCancelled(*ended, task.cancelled))

    # Workers.

    def _greet(self, hello: WorkerHello, now: float) -> None:
        node = self.nodes.get(hello.node_id)
        if node is not None and node.worker_id == hello.worker_id and node.session_id == hello.session_id:
            node.detached_at = None
            held = set(hello.held_lease_ids)
            ours = [lease_id for slot in node.slots.values() for lease_id in slot.lease_ids]
            self._effects.append(WelcomeWorker(node.worker_id, node.session_id, True, tuple(held.difference(ours))))
            for lease_id in ours:
                self._repeat(self.leases[lease_id], is_held=lease_id in held)
            return
        if node is not None:
            self._effects.append(CloseSession(node.session_id, "SUPERSEDED", "the worker connected again"))
            self._lose(node, "its worker connected again and had forgotten its work", now)
        node = Node(
            hello.node_id,
            hello.worker_id,
            f"{self._epoch}-{next(self._numbers)}",
            hello.hostname,
            hello.node_ip,
            hello.capacity,
            hello.labels,
            hello.isolations,
            hello.runtime,
            hello.pid,
        )
        self.nodes[node.node_id] = node
        self._sessions[node.session_id] = node
        self._effects.append(WelcomeWorker(node.worker_id, node.session_id, False, hello.held_lease_ids))

    def _repeat(self, lease: Lease, *, is_held: bool) -> None:
        """Say again what a worker that was away may have missed about a lease."""
        session_id = self.nodes[lease.slot.node_id].session_id
        if not is_held and not lease.is_started:
            self._effects.append(self._assignment(lease))
        if lease.task.cancelled is not None:
            self._effects.append(StopLease(session_id, lease.lease_id))
        elif lease.is_revoked:
            self._effects.append(RevokeLease(session_id, lease.lease_id))

    def _lose(self, node: Node, reason: str, now: float) -> None:
        leases = [self.leases[lease_id] for slot in node.slots.values() for lease_id in slot.lease_ids]
        for lease in leases:
            self._drop_lease(lease, now)
        self.nodes.pop(node.node_id, None)
        self._sessions.pop(node.session_id, None)
        failure = Failure(FailureKind.WORKER_LOST, f"node {node.node_id!r} was lost: {reason}")
        for lease in leases:
            if lease.is_started:
                self._fail(lease.task, failure, now)
            else:
                lease.task.attempt -= 1
                self._requeue(lease.task)

    def _leave_if_done(self, node: Node) -> None:
        if node.is_draining and not node.slots and node.node_id in self.nodes:
            del self.nodes[node.node_id]
            del self._sessions[node.session_id]
            self._effects.append(CloseSession(node.session_id, "DRAINED", "the node was drained"))
