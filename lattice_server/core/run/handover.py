"""Owns which tasks of a run are sent to the scheduler, or stopped there, and in which order.

Rule: a call handles a limited number of tasks, and later calls the others, so that other events come in between.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from lattice_server.core.messages import NO_HISTORY, AttemptHistory, EarlierLease, TaskReady
from lattice_server.core.model import Failure
from lattice_server.core.references import resolve
from lattice_server.core.run.bindings import Values
from lattice_server.core.run.dag import Dag
from lattice_server.core.run.ordering import MAX_AGE_S, Ranking
from lattice_server.core.run.status import RunStatus
from lattice_server.core.run.task_table import TaskRecord, TaskTable
from lattice_server.core.states import TaskState
from lattice_server.core.trust import is_weaker

# How many tasks that wait for one task only are sent early: when it ends, the scheduler queues all of them at once.
MAX_PROMISED = 500
# Called tasks go before others of their tenant, the deepest first: a process waits for each.
CALLED_S = 1e9


@dataclass(slots=True, eq=False)
class Handover:
    """The tasks that a run has yet to send to the scheduler or, once it stops, to stop there.

    `added` are tasks that joined a run which had started; their predecessors are looked at first. `ready` are tasks
    that have their inputs. `stopping` are tasks to stop because of `cause`. A task that waits for a
    single other one is promised: sent early, so that the scheduler queues it by itself. Promises come before the next
    ready task. Each is a stack of tasks and the position among the successors of each.
    """

    _status: RunStatus
    _table: TaskTable
    _dag: Dag
    _values: Values
    _priority: int
    _tenant: str
    _ranking: Ranking
    _slice_tasks: int | None
    added: deque[str] = field(default_factory=deque)
    ready: deque[str] = field(default_factory=deque)
    stopping: deque[str] = field(default_factory=deque)
    cause: Failure | None = None
    _promises: deque[list[tuple[str, int]]] = field(default_factory=deque)
    _unsent: set[str] = field(default_factory=set)  # The first tasks of promises not begun: one for each is enough.
    _left: int = 0

    @property
    def is_under_way(self) -> bool:
        """Whether there are tasks to send or to stop."""
        return bool(self.ready or self._promises or self.stopping or self.added)

    @property
    def is_over(self) -> bool:
        """Whether this call is to handle no further task."""
        return not self.is_under_way or (self._slice_tasks is not None and self._left <= 0)

    @property
    def is_promising(self) -> bool:
        """Whether promises come next."""
        return bool(self._promises)

    def begin(self) -> None:
        """Begin a call."""
        self._left = self._slice_tasks or 0

    def next_added(self) -> str:
        """Take out a task that joined the run."""
        self._left -= 1
        return self.added.popleft()

    def next_ready(self) -> str:
        """Take out a task that has its inputs."""
        self._left -= 1
        return self.ready.popleft()

    def send(
        self,
        record: TaskRecord,
        now: float,
        after: str = "",
        history: AttemptHistory = NO_HISTORY,
        earlier: EarlierLease | None = None,
    ) -> None:
        """Send a task to the scheduler, to start at once or after another one, or to continue an `earlier` lease."""
        spec, status = record.spec, self._status
        started_at = max(status.started_at, now - MAX_AGE_S)
        status.emit(
            TaskReady(
                status.run_id,
                spec,
                {name: resolve(binding, self._values.of) for name, binding in spec.inputs.items()},
                self._priority + spec.priority,
                after,
                self._tenant,
                self._ranking(started_at, self._table.open_tasks, spec.task_id)
                - CALLED_S * record.depth * record.is_called,
                self._dag.split.get(spec.task_id, ()),
                history,
                earlier=earlier,
                since=record.first_started_at,
            )
        )

    def promise_after(self, task_id: str) -> None:
        """Have the chains of tasks that wait only for this one sent early."""
        if task_id not in self._unsent:
            self._unsent.add(task_id)
            self._promises.append([(task_id, 0)])

    def send_promised(self, now: float) -> None:
        """Send some of the promised tasks."""
        stack = self._promises[0]
        source, start = stack.pop()
        self._unsent.discard(source)
        waiting = self._dag.successors[source][:MAX_PROMISED]
        end = len(waiting) if self._slice_tasks is None else min(len(waiting), start + max(1, self._left))
        sent = [successor for successor in waiting[start:end] if self._send_early(source, successor, now)]
        self._left -= end - start
        stack += [(successor, 0) for successor in sent]
        if end < len(waiting):
            stack.append((source, end))
        if not stack:
            self._promises.popleft()

    def stop(self, task_ids: Iterable[str], cause: Failure) -> None:
        """Send no further task; note the tasks that may have to be stopped."""
        self.clear()
        self.stopping.extend(task_ids)
        self.cause = cause

    def next_stopping(self) -> list[str]:
        """Take out some of the tasks that may have to be stopped."""
        count = len(self.stopping) if self._slice_tasks is None else min(self._left, len(self.stopping))
        self._left -= count
        return [self.stopping.popleft() for _ in range(count)]

    def clear(self) -> None:
        """Forget all tasks."""
        self.added.clear()
        self.ready.clear()
        self.stopping.clear()
        self._promises.clear()
        self._unsent.clear()

    def _send_early(self, source: str, successor: str, now: float) -> bool:
        """Send a task early if it waits for `source` only, and the scheduler has that one; return whether it was."""
        records, record = self._table.records, self._table.records[successor]
        if record.missing != 1 or record.state is not TaskState.BLOCKED or record.is_promised:
            return False
        if record.spec.over or record.spec.condition is not None or (source, successor) in self._dag.optional:
            return False
        if not records[source].is_with_scheduler or not self._status.is_running:
            return False
        if record.spec.secrets or record.spec.services:
            # Whether there is a value of each secret, and an instance of each service, is known when it may start.
            return False
        # Whether the task may be given an output is known when there is one.
        if is_weaker(record.spec.isolation, records[source].spec.isolation) or self._values.untrusted(record.spec):
            return False
        record.is_promised = True
        self.send(record, now, source)
        return True
