"""Owns the tasks that the scheduler has: their admission, backoff, time limits and end.

Rule: a task is in exactly one place: behind another task, queued, in backoff, in a lease, or in one of an earlier life
of the server. A task in a lease may also have a predecessor, with which it was sent.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.messages import (
    AttemptSucceeded,
    HeldLease,
    ServiceChanged,
    TaskCancelled,
    TaskFailed,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TaskSucceeded,
)
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.scheduling import chains
from lattice_server.core.scheduling.earlier_leases import EarlierLeases
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.needs import Needs
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.permits import concurrency_of
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Task
from lattice_server.core.trust import stamped_all

# A batch that fails like this is halved until the member at fault is alone.
BISECTED = frozenset({FailureKind.CRASHED, FailureKind.OUT_OF_MEMORY})
RESTARTED = "the server was restarted while the attempt ran, and"
TaskEffect = TaskSucceeded | TaskRetrying | TaskFailed | TaskCancelled | TaskReturned


@dataclass(slots=True, eq=False)
class LiveTasks:
    """The tasks by the ids of their run and of themselves."""

    _registry: NodeRegistry
    _placer: Placer
    _needs: Needs
    _numbers: Iterator[int]
    _emit: Callable[[TaskEffect], None]
    earlier: EarlierLeases
    by_key: dict[tuple[str, str], Task] = field(default_factory=dict)
    _backoff: Deadlines[Task] = field(default_factory=Deadlines)
    _timeouts: Deadlines[Task] = field(default_factory=Deadlines)

    def admit(self, ready: TaskReady, now: float) -> None:
        """Take a task and queue it, or link it to its predecessor."""
        spec = ready.spec
        key = (ready.run_id, spec.task_id)
        if key in self.by_key:
            return
        if ready.refusal is not None and ready.earlier is None:
            self._emit(TaskFailed(*key, ready.history.attempts, ready.refusal))
            return
        shape = self._registry.shape(spec)
        task = Task(ready, shape, concurrency_of(spec), next(self._numbers), ready.inputs, now)
        history = ready.history
        task.attempt, task.failures, task.losses = history.attempts, history.failures, history.losses
        if ready.earlier is not None:
            self._add(task)
            self._time(task, now)
            if not self.earlier.admit(task, ready.earlier, now):
                self._retry_unclaimed(task, "its concurrency key allows fewer calls now", now)
            return
        if not ready.after:
            self._add(task)
            self._start(task, now)
            return
        source = self.by_key.get((ready.run_id, ready.after))
        if source is None or source.ending is not None:
            self._emit(TaskReturned(*key))
            return
        self._add(task)
        chains.link(task, source)
        if source.lease_id:
            self._placer.send_along(source, now)

    def claim(self, node: Node, held: tuple[HeldLease, ...], now: float) -> list[HeldLease]:
        """Return the leases of an earlier life of the server that a new node continues; queue the tasks of others."""
        adopted, left = self.earlier.claim(node, held, now)
        for task in left:
            self._retry_unclaimed(task, f"the worker of node {node.node_id!r} does not have it any more", now)
        return adopted

    def queue_unclaimed(self, now: float) -> None:
        """Queue the tasks whose workers did not come back after a restart of the server."""
        for task in self.earlier.overdue(now):
            self._retry_unclaimed(task, "its worker did not come back", now)

    def requeue(self, task: Task, now: float) -> None:
        """Queue a task that is in no lease any more, or end it if it must end."""
        if task.is_over:
            return
        if task.ending is not None:
            self.end(task)
        else:
            self._queue(task, now)

    def retry_uncharged(self, task: Task, failure: Failure, now: float) -> None:
        """Queue a task whose attempt ended through no fault of its own."""
        if task.ending is None:
            self._emit(TaskRetrying(*task.named, failure, 0.0))
        self.requeue(task, now)

    def fail(self, task: Task, failure: Failure, now: float, ended_at: float | None = None) -> None:
        """Charge a task with a failed attempt: it is retried after a backoff, or ends."""
        if task.ending is not None:
            self.end(task, ended_at)
            return
        retry = task.ready.spec.retry
        delay_s = 0.0
        if failure.kind is FailureKind.WORKER_LOST:
            task.losses += 1
            is_final = task.losses >= retry.max_worker_losses
            if is_final and task.losses > 1:
                # Retries would let it end as many workers, and other tasks with them.
                text = f"{failure.message}; the task was alone on {task.losses} workers that were lost, and fails"
                failure = replace(failure, message=f"{text} whatever its retries (max_worker_losses)")
        else:
            task.failures += 1
            is_final = not retry.allows(failure, task.failures)
            delay_s = 0.0 if is_final else retry.backoff_s(task.failures) * task.jitter()
        if is_final:
            task.ending = failure
            self.end(task, ended_at)
            return
        self._emit(TaskRetrying(*task.named, failure, delay_s))
        # A task that crashed its process alone must not be batched with others again.
        is_batched = task.ready.spec.batch is not None
        task.cohort = next(self._numbers) if is_batched and failure.kind in BISECTED else 0
        task.retry_at = now + delay_s
        self._backoff.set(task, task.retry_at)

    def succeed(self, task: Task, event: AttemptSucceeded, now: float, ended_at: float | None) -> None:
        """End a task with its outputs, and queue its dependents."""
        if task.ending is not None and task.ending.kind is not FailureKind.CANCELLED:
            # It exceeded its time limit, or its request was refused. A cancelled task may still succeed.
            self.end(task)
        elif lacking := _lacking(task, event):
            failure = Failure(FailureKind.PAYLOAD, f"the worker reported a success without {lacking}")
            self.fail(task, failure, now, ended_at)
        else:
            self._forget(task)
            outputs, split = stamped_all(event.outputs, event.split, task.ready.spec.isolation)
            self._emit(TaskSucceeded(*task.named, outputs, split, event.duration_s, ended_at))
            for dependent in chains.release(task, outputs):
                self._start(dependent, now)

    def end(self, task: Task, ended_at: float | None = None) -> None:
        """End a task for the reason it must, at `ended_at` if that is not now."""
        assert task.ending is not None
        self._placer.queue.discard(task)
        chains.unlink(task)
        for dropped in chains.drop(task, task.ending):
            # Its run decides what becomes of it.
            self._forget(dropped)
        self._forget(task)
        if task.ending.kind is FailureKind.CANCELLED:
            self._emit(TaskCancelled(*task.named, task.ending))
        else:
            self._emit(TaskFailed(*task.named, task.ending, ended_at))

    def change_service(self, event: ServiceChanged, now: float) -> None:
        """Queue the tasks that waited for a service, or that other nodes than before may run."""
        for task in self._needs.change(event):
            self._placer.queue.discard(task)
            self._queue(task, now)

    def timed_out(self, now: float) -> Iterator[Task]:
        """Take out the tasks whose total time limit has passed."""
        return self._timeouts.due(now)

    def queue_retries(self, now: float) -> None:
        """Queue the tasks whose backoff has passed."""
        for task in self._backoff.due(now):
            self._queue(task, now)

    def next_deadline(self) -> float | None:
        """Return when a backoff or a time limit passes next."""
        due = (self._backoff.next_at(), self._timeouts.next_at(), self.earlier.next_deadline())
        return min((at for at in due if at is not None), default=None)

    def check(self, leases: Mapping[str, Lease]) -> None:
        """Assert that each task is in one place, and its own invariants."""
        waiting = [task for group in self._placer.queue.groups() for task in group.tasks()]
        assert len(waiting) == sum(group.count for group in self._placer.queue.groups())
        assert all(task.group is not None and not task.lease_id for task in waiting)
        backing_off = list(self._backoff)
        assert all(task.retry_at is not None for task in backing_off)
        leased = [task for lease in leases.values() for task in lease.members()]
        dependent = [task for task in self.by_key.values() if task.predecessor is not None and not task.lease_id]
        apart = (*self._needs.waiting, *self.earlier.tasks())
        places = [id(task) for task in (*waiting, *backing_off, *leased, *dependent, *apart)]
        assert len(places) == len(set(places)), "a task is in two places"
        assert set(places) == {id(task) for task in self.by_key.values()}, "a task is nowhere"
        self._needs.check(self.by_key.values())
        timed = {id(task) for task in self._timeouts}
        for key, task in self.by_key.items():
            assert key == task.key
            _check_task(task)
            if task.ready.spec.total_timeout_s is not None and task.predecessor is None and task.ending is None:
                assert id(task) in timed, "the time limit of a task has no deadline"

    def _start(self, task: Task, now: float) -> None:
        """Queue a task that has its inputs, unless a worker has it; its time limit counts from now."""
        self._time(task, now)
        if not task.lease_id:
            self._queue(task, now)

    def _time(self, task: Task, now: float) -> None:
        limit_s, since = task.ready.spec.total_timeout_s, task.ready.since
        if limit_s is not None:
            self._timeouts.set(task, (now if since is None else since) + limit_s)

    def _retry_unclaimed(self, task: Task, why: str, now: float) -> None:
        self.retry_uncharged(task, Failure(FailureKind.WORKER_LOST, f"{RESTARTED} {why}"), now)

    def _queue(self, task: Task, now: float) -> None:
        task.retry_at = None
        if task.is_over or task.predecessor is not None:
            return
        if (failure := task.ready.refusal or self._needs.failure_of(task)) is not None:
            task.ending = failure
            self.end(task)
        elif self._needs.may_queue(task, now):
            self._placer.queue.push(task, now)

    def _add(self, task: Task) -> None:
        self.by_key[task.key] = task
        self._needs.add(task)

    def _forget(self, task: Task) -> None:
        task.is_over = True
        self._backoff.discard(task)
        self._timeouts.discard(task)
        self._needs.forget(task)
        self.earlier.discard(task)
        del self.by_key[task.key]


def _lacking(task: Task, event: AttemptSucceeded) -> str:
    """Return, as text, an output that a success should bring and does not."""
    for output in task.ready.spec.outputs:
        if output not in event.outputs:
            return f"its output {output!r}"
    for output in task.ready.split_outputs:
        if output not in event.split:
            return f"the items of its output {output!r}"
    return ""


def _check_task(task: Task) -> None:
    retry = task.ready.spec.retry
    assert not task.is_over
    assert task.failures < retry.max_attempts
    assert task.losses < retry.max_worker_losses
    assert task.attempt >= 0
    if task.predecessor is not None and task.ending is None:
        assert not task.predecessor.is_over, "the predecessor of a task has ended"
        assert task.predecessor.dependents[task.ticket] is task
    assert all(dependent.predecessor is task for dependent in task.dependents.values())
    assert task.ending is None or task.lease_id, "a task that must end and is in no lease has not ended"
