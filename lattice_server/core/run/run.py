"""Owns one run: its progress through its graph, its growth, its failure and its cancellation.

Rule: every change of a task's state goes through `TaskTable.move`, every public fact through `_publish`, in that order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from lattice_server.core.errors import ExhaustedError, LatticeError, PreconditionError
from lattice_server.core.messages import (
    CancelRequested,
    Explanation,
    Fact,
    RunCancelling,
    RunFinished,
    RunStarted,
    TaskCancelled,
    TaskEvent,
    TaskFailed,
    TaskLogged,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TasksAdded,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import (
    Failure,
    FailureKind,
    FailurePolicy,
    Payload,
    TaskSpec,
    WorkflowSpec,
    resolve,
)
from lattice_server.core.run import dag as graphs
from lattice_server.core.run.additions import Addition, adding
from lattice_server.core.run.bindings import Values
from lattice_server.core.run.conditions import PathError
from lattice_server.core.run.handover import Handover
from lattice_server.core.run.limits import DEFAULT_BOUNDS, Bounds, items_of, refuse_late_maps
from lattice_server.core.run.ordering import Ranking, least_left_aged
from lattice_server.core.run.reuse import Earlier
from lattice_server.core.run.task_table import TaskRecord, TaskTable, tabulating
from lattice_server.core.scheduling.explain import explain_in_run
from lattice_server.core.scheduling.invariants import check_run
from lattice_server.core.states import (
    RUN_TERMINAL,
    RUN_TRANSITIONS,
    TASK_TERMINAL,
    InvalidTransition,
    RunState,
    TaskState,
)
from lattice_server.core.steps import Steps, finish
from lattice_server.core.tenancy import id_of

__all__ = ["Bounds", "Effect", "Run"]

Effect = Fact | TaskReady | CancelRequested


class Run:
    """The machine of one run; owned by the orchestrator's thread.

    `handle` takes what the scheduler tells about tasks; the effects are facts to publish, in order, and tasks to
    hand to the scheduler or take back from it. One that `is_open` goes on while none of its tasks does.
    """

    def __init__(
        self,
        run_id: str,
        spec: WorkflowSpec,
        dag: graphs.Dag,
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
            run_id: names it.
            spec: its workflow.
            dag: the graph of that.
            workflow_id: names the workflow if it is stored.
            priority: added to that of each task.
            tenant: whose share of the cluster it counts towards.
            ranking: the order among its tasks.
            bounds: how far it may grow.
            earlier: the run that this one retries.
            table: what `tabulating` made of the graph; it is made here when there is none.
            slice_tasks: how many tasks are handed over at once; None for all. See `is_unsettled`.
        """
        self.run_id = run_id
        self.spec = spec
        self.dag = dag
        self.workflow_id = workflow_id
        self.priority = priority
        self.tenant = tenant
        self.state = RunState.RUNNING
        self.is_open = is_open
        self.failure: Failure | None = None
        self.revision = 1
        self.started_at = 0.0
        self._table = table or finish(tabulating(run_id, dag))
        self.tasks: Mapping[str, TaskRecord] = self._table.records
        self.counts: Mapping[TaskState, int] = self._table.counts
        self._ranking = ranking
        self._bounds = bounds
        self._earlier = earlier
        self.retried_run_id = earlier.run_id if earlier else ""
        self._values = Values(self.tasks, spec.parameters)
        self.handover = Handover(slice_tasks)
        self._effects: list[Effect] = []

    @property
    def is_terminal(self) -> bool:
        """Whether the run has ended."""
        return self.state in RUN_TERMINAL

    @property
    def open_tasks(self) -> int:
        """How many tasks have not ended."""
        return self.counts[TaskState.BLOCKED] + self.counts[TaskState.QUEUED] + self.counts[TaskState.RUNNING]

    @property
    def is_unsettled(self) -> bool:
        """Whether there are tasks to hand over still: `go_on` hands over the next of them."""
        return self.handover.is_under_way and not self.is_terminal

    def go_on(self, now: float) -> list[Effect]:
        """Hand over more tasks, after a call that left some."""
        return self._settle(now)

    @property
    def parameters(self) -> Mapping[str, Payload]:
        """The values of its parameters, the workflow's defaults included."""
        return self._values.parameters

    def final_task_ids(self) -> list[str]:
        """Return the tasks no other task depends on, in the order of definition; of mapped ones their items as well."""
        found = []
        for task_id in self.dag.final_task_ids():
            record = self.tasks[task_id]
            if not record.item_of:
                found += [task_id, *(record.items or ())]
        return found

    def start(self, parameters: Mapping[str, Payload], now: float) -> list[Effect]:
        """Publish the start and hand over every task that waits for nothing."""
        self._values.parameters = {**self.spec.parameters, **parameters}
        self.started_at = now
        self._publish(RunStarted(self.workflow_id, len(self.tasks)))
        self.handover.ready += self._table.roots
        self._table.roots = []
        return self._settle(now)

    def handle(self, event: TaskEvent | TaskReturned, now: float) -> list[Effect]:
        """Take one fact about a task. A task that has ended ignores what comes late."""
        record = self.tasks[event.task_id]
        if record.state is TaskState.BLOCKED and record.is_promised and record.missing == 0:
            # The scheduler went on by itself before it was this one's turn here.
            self._become_ready(event.task_id, record, now)
        if record.state in TASK_TERMINAL:
            return self._settle(now)
        match event:
            case TaskStarted():
                self._table.move(record, TaskState.RUNNING)
                started_at = now if event.at is None else event.at
                record.attempt, record.node_id, record.started_at = event.attempt, event.node_id, started_at
                if record.first_started_at is None:
                    record.first_started_at = started_at
                self._publish(event)
            case TaskLogged():
                self._publish(event)
            case TaskRetrying():
                if record.state is TaskState.RUNNING:
                    self._table.move(record, TaskState.QUEUED)
                record.attempt, record.failure = event.attempt, event.failure
                self._publish(event)
            case TaskSucceeded():
                refusal = record.cancelled
                if refusal is not None and refusal.kind is not FailureKind.CANCELLED:
                    self._refuse_success(event, refusal, now)
                else:
                    record.outputs, record.split, record.failure = event.outputs, event.split or None, None
                    record.duration_s = event.duration_s
                    self._end(record, TaskState.SUCCEEDED, event, now, event.at)
                    self._satisfy_successors(event.task_id)
            case TaskFailed():
                record.attempt, record.failure = event.attempt, event.failure
                self._end(record, TaskState.FAILED, event, now, event.at)
                self._fail_after(event.task_id, event.failure, now)
            case TaskCancelled():
                record.failure = event.failure
                self._end(record, TaskState.CANCELLED, event, now)
                if self.state is RunState.RUNNING:
                    self._fail_after(event.task_id, event.failure, now)
            case TaskSkipped():
                record.failure = event.failure
                self._end(record, TaskState.SKIPPED, event, now)
            case TaskReturned():
                record.is_promised = False
                if record.cancelled is not None:
                    return self.handle(TaskCancelled(self.run_id, event.task_id, 0, record.cancelled), now)
                if record.state is TaskState.QUEUED:
                    self._tell(record, "")
            case _:
                assert_never(event)
        return self._settle(now)

    def cancel(self, reason: str, now: float) -> list[Effect]:
        """Cancel the run; a run that has ended or is stopping stays as it is."""
        return self._stop_now(Failure(FailureKind.CANCELLED, reason), now)

    def expire(self, limit_s: float, now: float) -> list[Effect]:
        """Fail the run because its time is over; a run that has ended or is stopping stays as it is."""
        return self._stop_now(Failure(FailureKind.TIMEOUT, f"the run took longer than {limit_s:g} s"), now)

    def fail(self, failure: Failure, now: float) -> list[Effect]:
        """Fail the run for a reason outside it; a run that has ended or is stopping stays as it is."""
        return self._stop_now(failure, now)

    def abandon(self, failure: Failure, now: float) -> list[Effect]:
        """Fail the run at once, whatever state a bug has left it in; facts that come later are ignored.

        It does not wait for the scheduler to say how each task ends: that it was told already may be what was lost.
        """
        stopped = Failure(FailureKind.CANCELLED, f"the run stopped: {failure.message}", cause=failure)
        held = tuple(task_id for task_id, record in self.tasks.items() if record.is_with_scheduler)
        self.handover.clear()
        self._effects = [CancelRequested(self.run_id, held, stopped)] if held else []
        for task_id, record in self.tasks.items():
            if record.state not in TASK_TERMINAL:
                self._table.move(record, TaskState.CANCELLED)
                record.failure, record.ended_at, record.open_items = stopped, now, 0
                self._publish(TaskCancelled(self.run_id, task_id, record.attempt, stopped))
        self.is_open = False
        # No transition: it may have ended in a way that nobody has been told.
        self.state, self.failure = RunState.FAILED, failure
        self._publish(RunFinished(self.state, failure))
        effects, self._effects = self._effects, []
        return effects

    def cancel_task(self, task_id: str, reason: str, now: float) -> list[Effect]:
        """Cancel one task; what depends on it follows the workflow's failure policy."""
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
                    # It was not handed over yet.
                    effects += self.handle(TaskCancelled(self.run_id, item, 0, failure), now)
            return effects
        if record.is_with_scheduler:
            return [CancelRequested(self.run_id, (task_id,), failure)]
        return self.handle(TaskCancelled(self.run_id, task_id, 0, failure), now)

    def close(self, now: float) -> list[Effect]:
        """Have an open run end once its tasks have; it is as any other run from now on."""
        self.is_open = False
        return self._settle(now)

    def append(self, added: Sequence[TaskSpec], now: float) -> list[Effect]:
        """Add tasks; they may depend on any task of the run and on each other.

        Raises:
            InvalidError: they do not fit the graph.
            PreconditionError: RUN_ENDED, the run has ended or is stopping.
            ExhaustedError: RUN_TOO_LARGE, the run would have too many tasks.
        """
        return self.add(finish(self.adding(added)), now)

    def adding(self, added: Sequence[TaskSpec]) -> Steps[Addition]:
        """Check tasks that are to be added by `add`, in steps. Raises as `append`."""
        self._refuse_growth(len(added), 0)
        return (yield from adding(self.dag, added, self._values.parameters.keys()))

    def add(self, addition: Addition, now: float) -> list[Effect]:
        """Add tasks that were checked at the revision which the run still has. Raises as `append`."""
        self._grow(addition, now)
        return self._settle(now)

    def spawn(
        self, parent: str, added: Sequence[TaskSpec], now: float, refusal: ExhaustedError | None = None
    ) -> list[Effect]:
        """Add tasks on behalf of a running task, which fails when they cannot be added; `refusal` says that, if known.

        What an earlier attempt of the same task added is already there, and stays as it was.
        """
        record = self.tasks[parent]
        new = [spec for spec in added if not self._is_spawn_of(parent, spec.task_id)]
        if self.state is not RunState.RUNNING or record.state in TASK_TERMINAL or not new:
            return []
        try:
            if refusal is not None:
                raise refusal
            self._spawn(new, now, parent, record.depth + 1)
        except LatticeError as error:
            kind = FailureKind.RESOURCES if isinstance(error, ExhaustedError) else FailureKind.PAYLOAD
            failure = Failure(kind, f"what it spawned cannot be added: {error.message}")
            # It may have succeeded before the scheduler hears of this.
            record.cancelled = failure
            return [CancelRequested(self.run_id, (parent,), failure)]
        return self._settle(now)

    def explain(self, task_id: str, now: float) -> Explanation:
        """Return why a task is where it is, as far as the run knows: what it waits for, or how it ended."""
        return explain_in_run(self, task_id, now)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        check_run(self)

    # Becoming ready.

    def _become_ready(self, task_id: str, record: TaskRecord, now: float) -> None:
        condition = record.spec.condition
        if condition is not None:
            source = f"its condition, output {condition.output.task_id}.{condition.output.output}"
            try:
                is_met = self._values.is_met(condition)
            except PathError as error:
                self._fail_unstarted(record, Failure(FailureKind.PAYLOAD, f"{source}, cannot be told: {error}"), now)
                return
            if is_met is None:
                text = f"{source}, is not JSON, so nothing but a task can read it"
                self._fail_unstarted(record, Failure(FailureKind.PAYLOAD, text), now)
                return
            if not is_met:
                self._skip(record, None, now)
                self._pass_by(task_id, None, now)
                return
        if record.spec.over:
            self._expand(task_id, record, now)
            return
        if self._earlier is not None and self._take_over(task_id, record, self._earlier, now):
            return
        self._table.move(record, TaskState.QUEUED)
        record.queued_at = now
        if not record.is_promised:
            self._tell(record, "")
            self._promise_after(task_id)

    def _take_over(self, task_id: str, record: TaskRecord, earlier: Earlier, now: float) -> bool:
        """Have a task succeed with the outputs it had in the run that this one retries; return whether it could."""
        found = earlier.success_of(record.spec)
        sources = self.dag.predecessors[record.item_of or task_id]
        if found is None or not all(self._is_as_before(source, earlier) for source in sources):
            return False
        if spawned := earlier.spawned_by(task_id):
            try:
                self._spawn(spawned, now, task_id, record.depth + 1)
            except LatticeError:
                return False  # it runs, and spawns them again
        record.outputs, record.split, record.duration_s = found.outputs, found.split, found.duration_s
        record.is_taken_over = True
        fact = TaskSucceeded(self.run_id, task_id, 0, found.outputs or {}, found.split or {}, found.duration_s or 0.0)
        self._end(record, TaskState.SUCCEEDED, fact, now)
        self._satisfy_successors(task_id)
        return True

    def _is_as_before(self, task_id: str, earlier: Earlier) -> bool:
        record = self.tasks[task_id]
        if record.items is not None:
            return all(self.tasks[item].is_taken_over for item in record.items)
        return record.is_taken_over or (record.state is TaskState.SKIPPED and earlier.was_skipped(task_id))

    def _promise_after(self, task_id: str) -> None:
        """Hand over, early, whatever waits for this task alone, and what waits for that alone, and so on.

        The scheduler then goes on by itself when the task succeeds, instead of asking here first.
        """
        self.handover.promise(task_id)

    def _promise(self, source: str, successor: str) -> bool:
        """Hand over a task early if it waits for another one alone; return whether it was."""
        record = self.tasks[successor]
        if record.missing != 1 or record.state is not TaskState.BLOCKED or record.is_promised:
            return False
        if record.spec.over or record.spec.condition is not None or (source, successor) in self.dag.optional:
            return False
        if not self.tasks[source].is_with_scheduler or self.state is not RunState.RUNNING:
            return False  # it ended meanwhile
        record.is_promised = True
        self._tell(record, source)
        return True

    def _tell(self, record: TaskRecord, after: str) -> None:
        spec = record.spec
        inputs = {name: resolve(binding, self._values.of) for name, binding in spec.inputs.items()}
        self._effects.append(
            TaskReady(
                self.run_id,
                spec,
                inputs,
                self.priority + spec.priority,
                after,
                self.tenant,
                self._ranking(self, spec.task_id),
                self.dag.split.get(spec.task_id, ()),
            )
        )

    def _satisfy_successors(self, task_id: str) -> None:
        for successor in self.dag.successors[task_id]:
            self._satisfy(successor)

    def _satisfy(self, task_id: str) -> None:
        record = self.tasks[task_id]
        record.missing -= 1
        self._advance(task_id, record)

    def _advance(self, task_id: str, record: TaskRecord) -> None:
        """See whether a task that waits is ready, or waits for one other only."""
        if record.state is not TaskState.BLOCKED or self.state is not RunState.RUNNING:
            return
        if record.missing == 0:
            self.handover.ready.append(task_id)
        elif record.missing == 1 and not record.is_promised:
            sources = self.dag.predecessors[task_id]
            last = next((source for source in sources if self.tasks[source].state not in TASK_TERMINAL), None)
            if last is not None and self.tasks[last].is_with_scheduler:
                self._promise_after(last)

    # Growing.

    def _expand(self, task_id: str, record: TaskRecord, now: float) -> None:
        """Make one task of each item of the list a task is mapped over."""
        payloads = self._values.mapped_over(record.spec)
        if payloads is None:
            text = "the list it is mapped over came without its items"
            self._fail_unstarted(record, Failure(FailureKind.PAYLOAD, text), now)
            return
        if excess := self._bounds.excess(len(payloads), len(self.tasks)):
            self._fail_unstarted(record, Failure(FailureKind.RESOURCES, excess), now)
            return
        record.items = []
        record.started_at = now
        for spec in items_of(record.spec, payloads):
            self.dag.add_item(spec)
            self._table.add(TaskRecord(spec, missing=0, item_of=task_id, depth=record.depth))
            record.items.append(spec.task_id)
        record.open_items = len(record.items)
        self._table.move(record, TaskState.RUNNING)
        self.revision += 1
        self._publish(TasksAdded(tuple(record.items), task_id, self.revision))
        self.handover.ready.extendleft(reversed(record.items))
        if not record.items:
            self._end_mapped(task_id, record, now)

    def _spawn(self, added: Sequence[TaskSpec], now: float, parent: str, depth: int) -> None:
        self._refuse_growth(len(added), depth)
        self._grow(finish(adding(self.dag, added, self._values.parameters.keys(), parent, depth)), now, parent)

    def _refuse_growth(self, count: int, depth: int) -> None:
        if self.state is not RunState.RUNNING:
            raise PreconditionError(
                "RUN_ENDED", f"run {id_of(self.run_id)!r} is {self.state.value}; nothing can be added to it"
            )
        self._bounds.refuse(len(self.tasks) + count, depth)

    def _grow(self, addition: Addition, now: float, parent: str = "") -> None:
        self._refuse_growth(len(addition.records), 0)
        refuse_late_maps(addition.mapped, self.tasks, self.dag.split)
        addition.extension.apply(self.dag)
        self._table.extend(addition.records)
        for source, targets in addition.extension.behind.items():
            if self.tasks[source].state in TASK_TERMINAL:
                for target in targets:
                    self.tasks[target].missing -= self._is_enough(source, target)
        self.revision += 1
        self._publish(TasksAdded(tuple(addition.records), parent, self.revision))
        self.handover.added += addition.arrivals

    def _is_enough(self, source: str, task_id: str) -> bool:
        """Whether a task need not wait for another any more. Tasks that are yet to be added have not ended."""
        record = self.tasks.get(source)
        if record is None or record.state not in TASK_TERMINAL:
            return False
        return record.state is TaskState.SUCCEEDED or (source, task_id) in self.dag.optional

    def _catch_up(self, task_id: str, now: float) -> None:
        """Bring a task that came late to where it would be had it been there from the start."""
        record = self.tasks[task_id]
        for source in self.dag.predecessors[task_id]:
            other = self.tasks[source]
            is_lost = other.state in TASK_TERMINAL and not self._is_enough(source, task_id)
            if is_lost and record.state is TaskState.BLOCKED:
                failure = other.failure
                cause = None if failure is None else replace(failure, task_id=failure.task_id or source)
                self._skip(record, cause, now)
                self._pass_by(task_id, cause, now)
        self._advance(task_id, record)

    def _is_spawn_of(self, parent: str, task_id: str) -> bool:
        record = self.tasks.get(task_id)
        return record is not None and record.spawned_by == parent

    # Ending.

    def _fail_unstarted(self, record: TaskRecord, failure: Failure, now: float) -> None:
        record.failure = failure
        self._end(record, TaskState.FAILED, TaskFailed(self.run_id, record.spec.task_id, 0, failure), now)
        self._fail_after(record.spec.task_id, failure, now)

    def _refuse_success(self, event: TaskSucceeded, refusal: Failure, now: float) -> None:
        """Fail a task that succeeded before it could be told that it must not."""
        # The scheduler lets go on what waits for this one alone.
        promised = [t for t in self.dag.descendants(event.task_id) if self.tasks[t].is_promised]
        record = self.tasks[event.task_id]
        record.failure = refusal
        self._end(record, TaskState.FAILED, TaskFailed(self.run_id, event.task_id, event.attempt, refusal), now)
        self._fail_after(event.task_id, refusal, now)
        if promised and self.state is RunState.RUNNING:
            stopped = Failure(FailureKind.CANCELLED, refusal.message)
            self._effects.append(CancelRequested(self.run_id, tuple(promised), stopped))

    def _fail_after(self, task_id: str, failure: Failure, now: float) -> None:
        named = replace(failure, task_id=failure.task_id or task_id, cause=None)
        if self.spec.failure_policy is FailurePolicy.FINISH_INDEPENDENT:
            self.failure = self.failure or named
            self._pass_by(task_id, named, now)
        elif self.state is RunState.RUNNING:
            self._stop(named, now)

    def _pass_by(self, task_id: str, failure: Failure | None, now: float) -> None:
        """Go on after a task that gave nothing: what can do without it does, the rest is skipped."""
        frontier = [task_id]
        while frontier:
            source = frontier.pop()
            for successor in self.dag.successors[source]:
                record = self.tasks[successor]
                if (source, successor) in self.dag.optional:
                    self._satisfy(successor)
                elif record.state is TaskState.BLOCKED:
                    self._skip(record, failure, now)
                    frontier.append(successor)

    def _skip(self, record: TaskRecord, cause: Failure | None, now: float) -> None:
        failure = None
        if cause is not None:
            what = f"task {cause.task_id!r} did not succeed" if cause.task_id else "the run was stopped"
            failure = Failure(FailureKind.UPSTREAM, what, task_id=cause.task_id)
        record.failure = failure
        self._end(record, TaskState.SKIPPED, TaskSkipped(self.run_id, record.spec.task_id, failure), now)

    def _stop_now(self, failure: Failure, now: float) -> list[Effect]:
        if self.state is not RunState.RUNNING:
            return []
        self._stop(failure, now)
        return self._settle(now)

    def _stop(self, failure: Failure, now: float) -> None:
        self.failure = self.failure or failure
        self.is_open = False
        self._become(RunState.CANCELLING)
        if self.open_tasks:
            self._publish(RunCancelling(self.failure))
        self.handover.stop(self.tasks, failure)

    def _stop_some(self, now: float) -> None:
        """Skip tasks that have not been handed over, and have the others end."""
        held, cause = [], self.handover.cause
        assert cause is not None
        stopped = Failure(FailureKind.CANCELLED, f"the run stopped: {cause.message}", cause=cause)
        for task_id in self.handover.next_stopping():
            record = self.tasks[task_id]
            if record.is_with_scheduler:
                record.cancelled = stopped
                held.append(task_id)
            if record.state is TaskState.BLOCKED:
                self._skip(record, cause, now)
        if held:
            self._effects.append(CancelRequested(self.run_id, tuple(held), stopped))

    def _end(self, record: TaskRecord, state: TaskState, fact: Fact, now: float, ended_at: float | None = None) -> None:
        self._table.move(record, state)
        record.ended_at = now if ended_at is None else ended_at
        self._publish(fact)
        if record.item_of:
            mapped = self.tasks[record.item_of]
            mapped.open_items -= 1
            if mapped.failure is None and record.failure is not None:
                mapped.failure = replace(record.failure, task_id=record.spec.task_id)
            if mapped.open_items == 0:
                self._end_mapped(record.item_of, mapped, now)

    def _end_mapped(self, task_id: str, record: TaskRecord, now: float) -> None:
        named = (self.run_id, task_id, 0)
        if record.failure is None:
            self._end(record, TaskState.SUCCEEDED, TaskSucceeded(*named, {}), now)
            self._satisfy_successors(task_id)
        elif record.failure.kind is FailureKind.CANCELLED:
            self._end(record, TaskState.CANCELLED, TaskCancelled(*named, record.failure), now)
        else:
            self._end(record, TaskState.FAILED, TaskFailed(*named, record.failure), now)
        if record.failure is not None and self.state is RunState.RUNNING:
            self._fail_after(task_id, record.failure, now)

    def _become(self, state: RunState) -> None:
        if state not in RUN_TRANSITIONS.get(self.state, ()):
            raise InvalidTransition(f"run {self.run_id}", self.state, state)
        self.state = state

    def _publish(self, fact: Fact) -> None:
        self._effects.append(fact)

    def _settle(self, now: float) -> list[Effect]:
        # Step by step instead of each within the last: a chain of tasks that need no worker may be long.
        self.handover.begin()
        while not self.handover.is_over:
            if self.handover.added:
                self._catch_up(self.handover.next_added(), now)
                continue
            if self.handover.stopping:
                self._stop_some(now)
                continue
            if self.handover.is_promising:
                self.handover.keep_promises(self.dag.successors, self._promise)
                continue
            task_id = self.handover.next_ready()
            record = self.tasks[task_id]
            if record.state is TaskState.BLOCKED and self.state is RunState.RUNNING:
                self._become_ready(task_id, record, now)
        if self._table.is_done() and not self.is_open and not self.is_terminal:
            if self.failure is None:
                self._become(RunState.SUCCEEDED)
            elif self.failure.kind is FailureKind.CANCELLED:
                self._become(RunState.CANCELLED)
            else:
                self._become(RunState.FAILED)
            self._publish(RunFinished(self.state, self.failure))
            self._earlier = None
        effects, self._effects = self._effects, []
        return effects
