"""Owns one run: its progress through its graph, its growth, its failure and its cancellation.

Rule: an event is handled as a whole before the next one; its effects are events to publish, in order, and tasks to send
to the scheduler or to cancel there.
"""

from collections.abc import Mapping, Sequence

from lattice_server.core.errors import ExhaustedError, LatticeError
from lattice_server.core.messages import (
    CancelRequested,
    Explanation,
    RunFinished,
    RunStarted,
    TaskCancelled,
    TaskEvent,
    TaskLogged,
    TaskReturned,
)
from lattice_server.core.model import Failure, FailureKind, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.run import invariants
from lattice_server.core.run.additions import Addition
from lattice_server.core.run.bindings import Values
from lattice_server.core.run.dag import Dag
from lattice_server.core.run.endings import Endings
from lattice_server.core.run.explain import explain
from lattice_server.core.run.growth import Growth
from lattice_server.core.run.handover import Handover
from lattice_server.core.run.limits import DEFAULT_BOUNDS, Bounds
from lattice_server.core.run.ordering import Ranking, least_left_aged
from lattice_server.core.run.progress import Progress
from lattice_server.core.run.restoration import Restoration
from lattice_server.core.run.reuse import Earlier
from lattice_server.core.run.signals import Signals
from lattice_server.core.run.status import Effect, RunStatus
from lattice_server.core.run.task_table import TaskRecord, TaskTable, tabulating
from lattice_server.core.states import TASK_TERMINAL, RunState, TaskState
from lattice_server.core.steps import Steps, finish
from lattice_server.core.trust import confined

__all__ = ["Bounds", "Effect", "Run"]


class Run:
    """The machine of one run; the orchestrator's thread owns it.

    `handle` takes the scheduler's events about tasks. An open run does not end with its tasks.
    """

    def __init__(
        self,
        run_id: str,
        spec: WorkflowSpec,
        dag: Dag,
        workflow_id: str = "",
        priority: int = 0,
        *,
        tenant: str = "",
        ranking: Ranking = least_left_aged,
        bounds: Bounds = DEFAULT_BOUNDS,
        earlier: Earlier | None = None,
        is_open: bool = False,
        table: TaskTable | None = None,
        slice_tasks: int | None = None,
    ) -> None:
        """Make a run that has not started.

        Args:
            run_id: its id.
            spec: its workflow.
            dag: the graph of the workflow.
            workflow_id: the id of the workflow if it is stored.
            priority: added to that of each task.
            tenant: whose share of the cluster it counts towards.
            ranking: the order among its tasks.
            bounds: how far it may grow.
            earlier: the run that this one retries.
            is_open: whether it waits for more tasks until it is closed.
            table: the result of `tabulating` the graph, which is computed here if there is none.
            slice_tasks: how many tasks are sent to the scheduler at once; None for all. See `is_unsettled`.
        """
        self.run_id = run_id
        self.spec = spec
        self.dag = dag
        self.workflow_id = workflow_id
        self.priority = priority
        self.tenant = tenant
        self.retried_run_id = earlier.run_id if earlier else ""
        self._table = table or finish(tabulating(run_id, dag))
        self.tasks: Mapping[str, TaskRecord] = self._table.records
        self.counts: Mapping[TaskState, int] = self._table.counts
        self._status = status = RunStatus(run_id, is_open)
        self.signals = Signals(status)
        self._values = values = Values(self.tasks, spec.parameters)
        self._handover = Handover(status, self._table, dag, values, priority, tenant, ranking, slice_tasks)
        self._endings = Endings(status, self._table, dag, self._handover, spec.failure_policy)
        self._growth = Growth(status, self._table, dag, values, self._handover, self._endings, bounds)
        self._progress = Progress(
            status, self._table, dag, values, self._handover, self._endings, self._growth, earlier
        )

    @property
    def state(self) -> RunState:
        """The state of the run."""
        return self._status.state

    @property
    def failure(self) -> Failure | None:
        """Why the run failed, is cancelled, or will fail."""
        return self._status.failure

    @property
    def is_open(self) -> bool:
        """Whether the run waits for more tasks until it is closed."""
        return self._status.is_open

    @property
    def is_terminal(self) -> bool:
        """Whether the run has ended."""
        return self._status.is_terminal

    @property
    def started_at(self) -> float:
        """When the run started, in monotonic seconds."""
        return self._status.started_at

    @property
    def revision(self) -> int:
        """How often tasks were added, plus one."""
        return self._growth.revision

    @property
    def parameters(self) -> Mapping[str, Payload]:
        """The values of its parameters, including the workflow's defaults."""
        return self._values.parameters

    @property
    def open_tasks(self) -> int:
        """How many tasks have not ended."""
        return self._table.open_tasks

    @property
    def is_unsettled(self) -> bool:
        """Whether there are more tasks to send or to stop; `proceed` handles the next of them."""
        return self._handover.is_under_way and not self.is_terminal

    def final_task_ids(self) -> list[str]:
        """Return the tasks no other task depends on, in the order of definition; mapped ones with their items."""
        found = []
        for task_id in self.dag.final_task_ids():
            record = self.tasks[task_id]
            if not record.item_of and not record.is_called:
                found += [task_id, *(record.items or ())]
        return found

    def start(self, parameters: Mapping[str, Payload], now: float) -> list[Effect]:
        """Start the run: publish the start and send every task that waits for no other."""
        self.provide(parameters)
        self._status.started_at = now
        self._status.emit(RunStarted(self.workflow_id, len(self.tasks)))
        self._handover.ready += self._table.roots
        self._table.roots = []
        return self._settle(now)

    def restoring(self) -> Restoration:
        """Return the restoration of this run, which has not started; then `resume` is called instead of `start`."""
        parts = (self._status, self._table, self.dag, self._values, self._handover, self._endings, self._growth)
        return Restoration(*parts, self.signals, self.spec.failure_policy)

    def resume(self, restoration: Restoration, now: float) -> list[Effect]:
        """Continue the run after its restoration: send its tasks, or stop them if it was to stop."""
        restoration.resume(now)
        return self._settle(now)

    def provide(self, parameters: Mapping[str, Payload]) -> None:
        """Set the values of parameters; the others have the defaults of the workflow."""
        self._values.parameters = {**self.spec.parameters, **parameters}

    def proceed(self, now: float) -> list[Effect]:
        """Send or stop more tasks, after a call that left some."""
        return self._settle(now)

    def handle(self, event: TaskEvent | TaskReturned, now: float) -> list[Effect]:
        """Take one event about a task; events about a task that has ended are ignored."""
        record = self.tasks[event.task_id]
        if not isinstance(event, TaskLogged):
            self.signals.forget(event.task_id)
        if record.state is TaskState.BLOCKED and record.is_promised and record.missing == 0:
            # The scheduler queued it by itself, and this run has not come to it yet.
            self._progress.begin(event.task_id, record, now)
        if record.state not in TASK_TERMINAL:
            self._progress.take(event, record, now)
        effects = self._settle(now)
        if record.calls and record.state in TASK_TERMINAL:
            calls, record.calls = record.calls, ()
            for called in calls:
                effects += self.cancel_task(called, f"task {event.task_id!r}, which called it, has ended", now)
        return effects

    def cancel(self, reason: str, now: float) -> list[Effect]:
        """Cancel the run; a run that has ended or is stopping stays as it is."""
        return self._stop(Failure(FailureKind.CANCELLED, reason), now)

    def expire(self, limit_s: float, now: float) -> list[Effect]:
        """Fail the run because its time limit has passed; a run that has ended or is stopping stays as it is."""
        return self._stop(Failure(FailureKind.TIMEOUT, f"the run took longer than {limit_s:g} s"), now)

    def fail(self, failure: Failure, now: float) -> list[Effect]:
        """Fail the run for a reason outside it; a run that has ended or is stopping stays as it is."""
        return self._stop(failure, now)

    def abandon(self, failure: Failure, now: float) -> list[Effect]:
        """Fail the run at once, whatever state a bug has left it in; later events are ignored.

        It does not wait for reports about the ends of its tasks, because the bug may have lost them.
        """
        stopped = Failure(FailureKind.CANCELLED, f"the run stopped: {failure.message}", cause=failure)
        status = self._status
        status.take_effects()
        self._handover.clear()
        if held := tuple(task_id for task_id, record in self.tasks.items() if record.is_with_scheduler):
            status.emit(CancelRequested(self.run_id, held, stopped))
        for task_id, record in self.tasks.items():
            if record.state not in TASK_TERMINAL:
                self._table.move(record, TaskState.CANCELLED)
                record.failure, record.ended_at, record.open_items = stopped, now, 0
                status.emit(TaskCancelled(self.run_id, task_id, record.attempt, stopped))
        status.is_open, status.failure = False, failure
        status.become(RunState.FAILED)
        status.emit(RunFinished(status.state, failure, self.signals.unread()))
        return status.take_effects()

    def cancel_task(self, task_id: str, reason: str, now: float) -> list[Effect]:
        """Cancel one task; the workflow's failure policy decides about its dependents."""
        record = self.tasks[task_id]
        failure = Failure(FailureKind.CANCELLED, reason, task_id=task_id)
        if record.state in TASK_TERMINAL:
            return []
        record.cancelled = record.cancelled or failure
        if record.items:
            held = tuple(item for item in record.items if self.tasks[item].is_with_scheduler)
            effects: list[Effect] = [CancelRequested(self.run_id, held, failure)]
            for item in record.items:
                if self.tasks[item].state is TaskState.BLOCKED:
                    effects += self.handle(TaskCancelled(self.run_id, item, 0, failure), now)
            return effects
        if record.is_with_scheduler:
            return [CancelRequested(self.run_id, (task_id,), failure)]
        return self.handle(TaskCancelled(self.run_id, task_id, 0, failure), now)

    def close(self, now: float) -> list[Effect]:
        """Close an open run: it ends when its tasks have ended."""
        self._status.is_open = False
        return self._settle(now)

    def append(self, added: Sequence[TaskSpec], now: float) -> list[Effect]:
        """Add tasks, which may depend on any task of the run and on each other.

        Raises:
            InvalidError: they do not fit the graph.
            PreconditionError: RUN_ENDED, the run has ended or is stopping.
            ExhaustedError: RUN_TOO_LARGE, the run would have too many tasks.
        """
        return self.add(finish(self.adding(added)), now)

    def adding(self, added: Sequence[TaskSpec]) -> Steps[Addition]:
        """Check tasks for `add`, in steps. Raises as `append`."""
        return self._growth.checking(added)

    def add(self, addition: Addition, now: float) -> list[Effect]:
        """Add tasks that were checked at the revision that the run still has. Raises as `append`."""
        self._growth.add(addition)
        return self._settle(now)

    def spawn(
        self,
        parent: str,
        added: Sequence[TaskSpec],
        now: float,
        refusal: ExhaustedError | None = None,
        *,
        is_called: bool = False,
    ) -> list[Effect]:
        """Add tasks on behalf of a running task, which fails if they cannot be added, or if there is a `refusal`.

        They are isolated at least as it is. Tasks that an earlier attempt of it added stay as they are. The failure of
        a task that `is_called` does not fail the run.
        """
        record = self.tasks[parent]
        new = [confined(spec, record.spec) for spec in added if not self._growth.is_spawn_of(parent, spec.task_id)]
        if not self._status.is_running or record.state in TASK_TERMINAL or not new:
            return []
        try:
            if refusal is not None:
                raise refusal
            self._growth.add(finish(self._growth.checking(new, parent, record.depth + 1)), parent)
        except LatticeError as error:
            kind = FailureKind.RESOURCES if isinstance(error, ExhaustedError) else FailureKind.PAYLOAD
            failure = Failure(kind, f"the tasks that it spawned cannot be added: {error.message}")
            # The task may succeed before the scheduler receives the request.
            record.cancelled = failure
            return [CancelRequested(self.run_id, (parent,), failure)]
        if is_called:
            for spec in new:
                self.tasks[spec.task_id].is_called = True
            record.calls += tuple(spec.task_id for spec in new)
        return self._settle(now)

    def explain(self, task_id: str, now: float) -> Explanation:
        """Return why a task that the scheduler does not have waits, or how it ended."""
        return explain(self.tasks, self.dag.predecessors[task_id], task_id, self.started_at, now)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        invariants.check(self._status, self._table, self.dag, self._handover)
        self.signals.check([task_id for task_id, record in self.tasks.items() if record.state is TaskState.RUNNING])

    def _stop(self, failure: Failure, now: float) -> list[Effect]:
        if not self._status.is_running:
            return []
        self._endings.stop(failure)
        return self._settle(now)

    def _settle(self, now: float) -> list[Effect]:
        """Send and stop tasks, up to the limit of one call, and end the run with its last task."""
        # In a loop and not by recursion: a chain of tasks that need no worker may be long.
        handover = self._handover
        handover.begin()
        while not handover.is_over:
            if handover.added:
                self._growth.catch_up(handover.next_added(), now)
            elif handover.stopping:
                self._endings.stop_some(now)
            elif handover.is_promising:
                handover.send_promised(now)
            else:
                task_id = handover.next_ready()
                record = self.tasks[task_id]
                if record.state is TaskState.BLOCKED and self._status.is_running:
                    self._progress.begin(task_id, record, now)
        if not self._table.open_tasks and not self.is_open and not self.is_terminal:
            self._status.finish(self.signals.unread())
            self._progress.earlier = None
        return self._status.take_effects()
