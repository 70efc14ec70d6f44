"""Owns one run: its progress through its graph, its failure and its cancellation.

Rule: every change of a task's state goes through `_move`, every public fact through `_publish`, in that order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from lattice_server.core.dag import Dag
from lattice_server.core.messages import (
    CancelRequested,
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
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import (
    Binding,
    Failure,
    FailureKind,
    FailurePolicy,
    OutputRef,
    Outputs,
    Parameter,
    Payload,
    TaskSpec,
    WorkflowSpec,
    resolve,
)
from lattice_server.core.states import (
    RUN_TERMINAL,
    RUN_TRANSITIONS,
    TASK_TERMINAL,
    TASK_TRANSITIONS,
    InvalidTransition,
    RunState,
    TaskState,
)


@dataclass(slots=True)
class TaskRecord:
    """One task of the run. `missing` counts predecessors that have not succeeded; `is_promised` tells that the task
    was handed over while it waited for the last of them. Times are monotonic seconds."""

    spec: TaskSpec
    missing: int
    state: TaskState = TaskState.BLOCKED
    attempt: int = 0
    node_id: str = ""
    outputs: Outputs | None = None
    failure: Failure | None = None
    started_at: float | None = None
    ended_at: float | None = None
    is_promised: bool = False
    cancelled: Failure | None = None


Effect = Fact | TaskReady | CancelRequested


class Run:
    """The machine of one run; owned by the orchestrator's thread.

    `handle` takes what the scheduler tells about tasks; the effects are facts to publish, in order, and tasks to
    hand to the scheduler or take back from it.
    """

    def __init__(self, run_id: str, spec: WorkflowSpec, dag: Dag, workflow_id: str = "", priority: int = 0) -> None:
        self.run_id = run_id
        self.spec = spec
        self.dag = dag
        self.workflow_id = workflow_id
        self.priority = priority
        self.state = RunState.RUNNING
        self.failure: Failure | None = None
        self.tasks = {
            task_id: TaskRecord(task, missing=len(dag.predecessors[task_id])) for task_id, task in dag.tasks.items()
        }
        self.counts = dict.fromkeys(TaskState, 0)
        self.counts[TaskState.BLOCKED] = len(self.tasks)
        self._parameters: Mapping[str, Payload] = spec.parameters
        self._effects: list[Effect] = []

    @property
    def is_terminal(self) -> bool:
        """Whether the run has ended."""
        return self.state in RUN_TERMINAL

    def start(self, parameters: Mapping[str, Payload], now: float) -> list[Effect]:
        """Publish the start and hand over every task that waits for nothing."""
        self._parameters = {**self.spec.parameters, **parameters}
        self._publish(RunStarted(self.workflow_id, len(self.tasks)))
        for task_id, record in self.tasks.items():
            if record.missing == 0:
                self._hand_over(task_id, record)
        return self._settle(now)

    def handle(self, event: TaskEvent | TaskReturned, now: float) -> list[Effect]:
        """Take one fact about a task. A task that has ended ignores what comes late."""
        record = self.tasks[event.task_id]
        if record.state in TASK_TERMINAL:
            return []
        match event:
            case TaskStarted():
                self._move(event.task_id, record, TaskState.RUNNING)
                record.attempt, record.node_id, record.started_at = event.attempt, event.node_id, now
                self._publish(event)
            case TaskLogged():
                self._publish(event)
            case TaskRetrying():
                if record.state is TaskState.RUNNING:
                    self._move(event.task_id, record, TaskState.QUEUED)
                record.attempt, record.failure = event.attempt, event.failure
                self._publish(event)
            case TaskSucceeded():
                record.outputs, record.failure = event.outputs, None
                self._end(event.task_id, record, TaskState.SUCCEEDED, event, now)
                self._release_successors(event.task_id)
            case TaskFailed():
                record.attempt, record.failure = event.attempt, event.failure
                self._end(event.task_id, record, TaskState.FAILED, event, now)
                self._fail_after(event.task_id, event.failure, now)
            case TaskCancelled():
                record.failure = event.failure
                self._end(event.task_id, record, TaskState.CANCELLED, event, now)
                if self.state is RunState.RUNNING:
                    self._fail_after(event.task_id, event.failure, now)
            case TaskSkipped():
                record.failure = event.failure
                self._end(event.task_id, record, TaskState.SKIPPED, event, now)
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
        if self.state is not RunState.RUNNING:
            return []
        self._stop(Failure(FailureKind.CANCELLED, reason), now)
        return self._settle(now)

    def cancel_task(self, task_id: str, reason: str, now: float) -> list[Effect]:
        """Cancel one task; what depends on it follows the workflow's failure policy."""
        record = self.tasks[task_id]
        failure = Failure(FailureKind.CANCELLED, reason, task_id=task_id)
        if record.state in TASK_TERMINAL:
            return []
        record.cancelled = record.cancelled or failure
        if self._is_with_scheduler(record):
            return [CancelRequested(self.run_id, (task_id,), failure)]
        return self.handle(TaskCancelled(self.run_id, task_id, 0, failure), now)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        for task_id, record in self.tasks.items():
            succeeded = sum(self.tasks[p].state is TaskState.SUCCEEDED for p in self.dag.predecessors[task_id])
            assert record.missing == len(self.dag.predecessors[task_id]) - succeeded
            if record.state in {TaskState.QUEUED, TaskState.RUNNING, TaskState.SUCCEEDED}:
                assert record.missing == 0, f"{task_id} went ahead of its inputs"
        assert self.counts == {s: sum(r.state is s for r in self.tasks.values()) for s in TaskState}
        open_tasks = sum(record.state not in TASK_TERMINAL for record in self.tasks.values())
        assert self.is_terminal == (open_tasks == 0)

    def _hand_over(self, task_id: str, record: TaskRecord) -> None:
        self._move(task_id, record, TaskState.QUEUED)
        if not record.is_promised:
            self._tell(record, "")
            self._promise_after(task_id)

    def _promise_after(self, task_id: str) -> None:
        """Hand over, early, whatever waits for this task alone, and what waits for that alone, and so on.

        The scheduler then goes on by itself when the task succeeds, instead of asking here first.
        """
        frontier = [task_id]
        while frontier:
            source = frontier.pop()
            for successor in self.dag.successors[source]:
                record = self.tasks[successor]
                if record.missing == 1 and record.state is TaskState.BLOCKED and not record.is_promised:
                    record.is_promised = True
                    self._tell(record, source)
                    frontier.append(successor)

    def _tell(self, record: TaskRecord, after: str) -> None:
        inputs = {name: resolve(binding, self._value_of) for name, binding in record.spec.inputs.items()}
        priority = self.priority + record.spec.priority
        self._effects.append(TaskReady(self.run_id, record.spec, inputs, priority, after))

    def _value_of(self, reference: OutputRef | Parameter) -> Binding:
        if isinstance(reference, Parameter):
            return self._parameters[reference.name]
        outputs = self.tasks[reference.task_id].outputs
        return reference if outputs is None else outputs[reference.output]

    def _release_successors(self, task_id: str) -> None:
        for successor in self.dag.successors[task_id]:
            record = self.tasks[successor]
            record.missing -= 1
            if record.state is not TaskState.BLOCKED or self.state is not RunState.RUNNING:
                continue
            if record.missing == 0:
                self._hand_over(successor, record)
            elif record.missing == 1 and not record.is_promised:
                last = next(p for p in self.dag.predecessors[successor] if not self._has_succeeded(p))
                if self._is_with_scheduler(self.tasks[last]):
                    self._promise_after(last)

    def _has_succeeded(self, task_id: str) -> bool:
        return self.tasks[task_id].state is TaskState.SUCCEEDED

    @staticmethod
    def _is_with_scheduler(record: TaskRecord) -> bool:
        return record.state in {TaskState.QUEUED, TaskState.RUNNING} or (
            record.state is TaskState.BLOCKED and record.is_promised
        )

    def _fail_after(self, task_id: str, failure: Failure, now: float) -> None:
        named = Failure(
            failure.kind,
            failure.message,
            type=failure.type,
            traceback=failure.traceback,
            exception=failure.exception,
            task_id=task_id,
            exit_status=failure.exit_status,
        )
        if self.spec.failure_policy is FailurePolicy.FINISH_INDEPENDENT:
            self.failure = self.failure or named
            self._skip(self.dag.descendants(task_id), named, now)
        elif self.state is RunState.RUNNING:
            self._stop(named, now)

    def _stop(self, failure: Failure, now: float) -> None:
        self.failure = self.failure or failure
        self._become(RunState.CANCELLING)
        held = tuple(t for t, r in self.tasks.items() if self._is_with_scheduler(r))
        stopped = Failure(FailureKind.CANCELLED, f"the run stopped: {failure.message}", cause=failure)
        for task_id in held:
            self.tasks[task_id].cancelled = stopped
        if held or self.counts[TaskState.BLOCKED]:
            self._publish(RunCancelling(self.failure))
        self._skip([t for t, r in self.tasks.items() if r.state is TaskState.BLOCKED], failure, now)
        if held:
            self._effects.append(CancelRequested(self.run_id, held, stopped))

    def _skip(self, task_ids: list[str], cause: Failure, now: float) -> None:
        for task_id in task_ids:
            record = self.tasks[task_id]
            if record.state is TaskState.BLOCKED:
                what = f"task {cause.task_id!r} did not succeed" if cause.task_id else "the run was cancelled"
                record.failure = Failure(FailureKind.UPSTREAM, what, task_id=cause.task_id)
                skipped = TaskSkipped(self.run_id, task_id, record.failure)
                self._end(task_id, record, TaskState.SKIPPED, skipped, now)

    def _end(self, task_id: str, record: TaskRecord, state: TaskState, fact: Fact, now: float) -> None:
        self._move(task_id, record, state)
        record.ended_at = now
        self._publish(fact)

    def _move(self, task_id: str, record: TaskRecord, state: TaskState) -> None:
        if state not in TASK_TRANSITIONS.get(record.state, ()):
            raise InvalidTransition(f"task {task_id} of run {self.run_id}", record.state, state)
        self.counts[record.state] -= 1
        self.counts[state] += 1
        record.state = state

    def _become(self, state: RunState) -> None:
        if state not in RUN_TRANSITIONS.get(self.state, ()):
            raise InvalidTransition(f"run {self.run_id}", self.state, state)
        self.state = state

    def _publish(self, fact: Fact) -> None:
        self._effects.append(fact)

    def _settle(self, now: float) -> list[Effect]:
        counts = self.counts
        is_done = not (counts[TaskState.BLOCKED] or counts[TaskState.QUEUED] or counts[TaskState.RUNNING])
        if is_done and not self.is_terminal:
            if self.failure is None:
                self._become(RunState.SUCCEEDED)
            elif self.failure.kind is FailureKind.CANCELLED:
                self._become(RunState.CANCELLED)
            else:
                self._become(RunState.FAILED)
            self._publish(RunFinished(self.state, self.failure))
        effects, self._effects = self._effects, []
        return effects
