"""Converts workflows, runs and the tasks of runs into messages. Rule: it changes none of them."""

from lattice.v1 import results_pb2, run_pb2, workflow_pb2

from lattice_server.core.messages import QuestionAsked
from lattice_server.core.model import Payload
from lattice_server.core.run.run import Run
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import RunState, TaskState
from lattice_server.core.tenancy import id_of
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.slices import Slices
from lattice_server.engine.workflows.workflow_store import WorkflowEntry
from lattice_server.rpc.convert.functions import code_to_proto
from lattice_server.rpc.convert.payloads import (
    JSON,
    failure_to_proto,
    fill_payload,
    payload_to_proto,
    payloads_to_proto,
)
from lattice_server.rpc.convert.streams import progress_of
from lattice_server.rpc.convert.tasks import task_to_spec
from lattice_server.rpc.convert.times import duration, fill_duration, fill_timestamp, timestamp

EMPTY_LIST = Payload(JSON, "[]")

RUN_STATE_TO_PROTO = {
    RunState.RUNNING: run_pb2.RUN_STATE_RUNNING,
    RunState.CANCELLING: run_pb2.RUN_STATE_CANCELLING,
    RunState.SUCCEEDED: run_pb2.RUN_STATE_SUCCEEDED,
    RunState.FAILED: run_pb2.RUN_STATE_FAILED,
    RunState.CANCELLED: run_pb2.RUN_STATE_CANCELLED,
}
TASK_STATE_TO_PROTO = {
    TaskState.BLOCKED: run_pb2.TASK_STATE_BLOCKED,
    TaskState.QUEUED: run_pb2.TASK_STATE_QUEUED,
    TaskState.RUNNING: run_pb2.TASK_STATE_RUNNING,
    TaskState.SUCCEEDED: run_pb2.TASK_STATE_SUCCEEDED,
    TaskState.FAILED: run_pb2.TASK_STATE_FAILED,
    TaskState.CANCELLED: run_pb2.TASK_STATE_CANCELLED,
    TaskState.SKIPPED: run_pb2.TASK_STATE_SKIPPED,
}


def queued_s(record: TaskRecord) -> float | None:
    """Return how long a task was queued before its first attempt, in seconds; None before that."""
    if record.queued_at is None or record.first_started_at is None:
        return None
    # A task that was assigned ahead may start before the server learns that its predecessor has ended.
    return max(0.0, record.first_started_at - record.queued_at)


def run_to_view(entry: RunEntry, *, is_full: bool) -> run_pb2.Run:
    """Return a run as one of the contract's views shows it."""
    message = run_to_proto(entry, is_brief=not is_full)
    if is_full:
        for name, payload in entry.run.parameters.items():
            message.parameters[name].CopyFrom(payload_to_proto(payload))
    return message


def run_to_proto(entry: RunEntry, *, is_brief: bool = False) -> run_pb2.Run:
    """Return a run as it is now, without its parameters; a brief one also without the large fields of its failure."""
    run = entry.run
    message = run_pb2.Run(
        run_id=entry.run_id,
        workflow_id=run.workflow_id,
        display_name=run.spec.display_name,
        state=RUN_STATE_TO_PROTO[run.state],
        failure=failure_to_proto(run.failure, is_brief=is_brief) if run.is_terminal else None,
        sequence=len(entry.log.events),
        labels=entry.labels,
        revision=run.revision,
        retried_run_id=run.retried_run_id,
        tenant=run.tenant,
        priority=run.priority,
        open=run.is_open,
        awaited_signals=run.signals.awaited(),
    )
    # Each start of a run answers with this message; to make the parts apart and copy them takes three times as long.
    fill_timestamp(message.create_time, entry.created_s)
    fill_timestamp(message.start_time, entry.began_s)
    fill_timestamp(message.end_time, entry.ended_s)
    if entry.timeout_s is not None:
        fill_duration(message.timeout, entry.timeout_s)
    if entry.disconnect_grace_s is not None:
        fill_duration(message.cancel_on_disconnect, entry.disconnect_grace_s)
    message.task_counts.total = len(run.tasks)
    for state, count in run.counts.items():
        if count:
            setattr(message.task_counts, state.value, count)
    return message


def task_to_proto(entry: RunEntry, task_id: str, *, is_brief: bool = False) -> run_pb2.TaskRun:
    """Return one task of a run as it is now; a brief one without outputs and the large fields of its failure."""
    record = entry.run.tasks[task_id]
    waited_s = queued_s(record)
    return run_pb2.TaskRun(
        run_id=entry.run_id,
        task_id=task_id,
        display_name=record.spec.display_name,
        state=TASK_STATE_TO_PROTO[record.state],
        attempt=record.attempt,
        node_id=record.node_id,
        outputs={} if is_brief else payloads_to_proto(record.outputs or _no_items(record)),
        failure=failure_to_proto(record.failure, is_brief=is_brief),
        start_time=timestamp(entry.start_times_s.get(task_id)),
        end_time=timestamp(entry.end_times_s.get(task_id)),
        parent_task_id=record.item_of or record.spawned_by,
        duration=None if record.duration_s is None else duration(record.duration_s),
        queue_time=None if waited_s is None else duration(waited_s),
        item_count=None if record.items is None else len(record.items),
        progress=progress_of(entry, task_id),
    )


def _no_items(record: TaskRecord) -> dict[str, Payload]:
    """Return the outputs of a task mapped over an empty list: there is no item that could show them."""
    is_empty = record.items is not None and not record.items and record.state is TaskState.SUCCEEDED
    return dict.fromkeys(record.spec.outputs, EMPTY_LIST) if is_empty else {}


async def result_to_proto(entry: RunEntry, slices: Slices) -> results_pb2.GetResultResponse:
    """Return a run and its final tasks as they are now; after a mapped one its items. Made in slices."""
    # The run comes first: if it has ended here, the outputs read after it are complete.
    response = results_pb2.GetResultResponse(run=run_to_proto(entry))
    async for task_id in slices.each(entry.run.final_task_ids()):
        response.final_tasks.append(task_to_proto(entry, task_id))
    return response


def graph_task_to_proto(run: Run, task_id: str, *, is_brief: bool) -> workflow_pb2.GraphTask:
    """Return one task of a run with its predecessors; a brief one without its definition."""
    record = run.tasks[task_id]
    code, _ = code_to_proto(record.spec.function)
    return workflow_pb2.GraphTask(
        task_id=task_id,
        display_name=record.spec.display_name,
        predecessor_task_ids=run.dag.predecessors[task_id],
        parent_task_id=record.item_of or record.spawned_by,
        function_name=code.display_name,
        spec=None if is_brief else task_to_spec(record.spec),
    )


def question_to_proto(question: QuestionAsked) -> workflow_pb2.Question:
    """Return the message of a question."""
    message = workflow_pb2.Question(
        question_id=question.question_id,
        run_id=id_of(question.run_id),
        task_id=question.task_id,
        attempt=question.attempt,
        name=question.name,
    )
    fill_payload(message.payload, question.payload)
    return message


def definition_of(entry: WorkflowEntry) -> workflow_pb2.WorkflowSpec:
    """Return the definition of a stored workflow, as its callers sent it."""
    assert isinstance(entry.definition, workflow_pb2.WorkflowSpec)
    return entry.definition


def workflow_to_proto(entry: WorkflowEntry, *, is_brief: bool = False) -> workflow_pb2.Workflow:
    """Return a stored workflow; a brief one without tasks, functions and parameters."""
    spec, whole = workflow_pb2.WorkflowSpec(), definition_of(entry)
    if is_brief:
        spec.display_name, spec.failure_policy = whole.display_name, whole.failure_policy
    else:
        spec.CopyFrom(whole)
    return workflow_pb2.Workflow(
        workflow_id=entry.workflow_id,
        revision=entry.revision,
        spec=spec,
        create_time=timestamp(entry.created_s),
    )
