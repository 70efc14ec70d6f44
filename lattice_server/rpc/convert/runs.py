"""Owns how runs, tasks and their events look on the wire. Rule: it reads, and changes nothing."""

from collections.abc import Mapping
from typing import assert_never

from lattice.v1 import results_pb2, run_pb2

from lattice_server.core.messages import (
    RunCancelling,
    RunEvent,
    RunFinished,
    RunStarted,
    TaskCancelled,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TasksAdded,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Payload
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import RunState, TaskState
from lattice_server.engine.run_entry import RunEntry
from lattice_server.engine.slices import Slices
from lattice_server.rpc.convert.payloads import (
    JSON,
    duration,
    failure_to_proto,
    fill_duration,
    fill_payload,
    payload_to_proto,
    payloads_to_proto,
    timestamp,
)

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


def event_to_proto(tasks: Mapping[str, TaskRecord], event: RunEvent) -> run_pb2.RunEvent:
    """Return the message of one event of the run that has these tasks."""
    message = run_pb2.RunEvent(sequence=event.sequence, time=timestamp(event.time_s))
    fact = event.fact
    match fact:
        case TaskStarted():
            message.task_started.task_id = fact.task_id
            message.task_started.attempt = fact.attempt
            message.task_started.node_id = fact.node_id
            message.task_started.node_ip = fact.node_ip
            message.task_started.gpu_indices.extend(fact.gpu_indices)
        case TaskSucceeded():
            _fill_success(message.task_succeeded, fact, tasks[fact.task_id])
        case TaskLogged():
            stream = run_pb2.LOG_STREAM_STDERR if fact.is_error else run_pb2.LOG_STREAM_STDOUT
            message.task_log.task_id = fact.task_id
            message.task_log.attempt = fact.attempt
            message.task_log.stream = stream
            message.task_log.text = fact.text
            message.task_log.truncated = fact.is_truncated
        case TaskRetrying():
            failure = failure_to_proto(fact.failure)
            retry_time = timestamp(event.time_s + fact.delay_s)
            retrying = run_pb2.TaskRetrying(
                task_id=fact.task_id, attempt=fact.attempt, failure=failure, retry_time=retry_time
            )
            message.task_retrying.CopyFrom(retrying)
        case TaskFailed():
            failure = failure_to_proto(fact.failure)
            failed = run_pb2.TaskFailed(task_id=fact.task_id, attempt=fact.attempt, failure=failure)
            message.task_failed.CopyFrom(failed)
        case TaskCancelled():
            failure = failure_to_proto(fact.failure)
            cancelled = run_pb2.TaskCancelled(task_id=fact.task_id, attempt=fact.attempt, failure=failure)
            message.task_cancelled.CopyFrom(cancelled)
        case TaskSkipped():
            skipped = run_pb2.TaskSkipped(task_id=fact.task_id, failure=failure_to_proto(fact.failure))
            message.task_skipped.CopyFrom(skipped)
        case RunStarted():
            started = run_pb2.RunStarted(workflow_id=fact.workflow_id, task_count=fact.task_count)
            message.run_started.CopyFrom(started)
        case TasksAdded():
            message.tasks_added.task_ids.extend(fact.task_ids)
            message.tasks_added.display_names.extend(tasks[task_id].spec.display_name for task_id in fact.task_ids)
            message.tasks_added.parent_task_id = fact.parent_task_id
            message.tasks_added.revision = fact.revision
        case RunCancelling():
            message.run_cancelling.CopyFrom(run_pb2.RunCancelling(failure=failure_to_proto(fact.failure)))
        case RunFinished():
            finished = run_pb2.RunFinished(state=RUN_STATE_TO_PROTO[fact.state], failure=failure_to_proto(fact.failure))
            message.run_finished.CopyFrom(finished)
        case _:
            assert_never(fact)
    if (task_id := getattr(fact, "task_id", None)) is not None:
        getattr(message, message.WhichOneof("event") or "").display_name = tasks[task_id].spec.display_name
    return message


def _fill_success(message: run_pb2.TaskSucceeded, fact: TaskSucceeded, record: TaskRecord) -> None:
    """Write a success into an empty message, in place: runs have more of these than of all other events."""
    message.task_id, message.attempt = fact.task_id, fact.attempt
    for name, payload in fact.outputs.items():
        fill_payload(message.outputs[name], payload)
    fill_duration(message.duration, fact.duration_s)
    if (queued_s := _queued_s(record)) is not None:
        fill_duration(message.queue_time, queued_s)


def _queued_s(record: TaskRecord) -> float | None:
    if record.queued_at is None or record.first_started_at is None:
        return None
    # A task sent ahead may start before the server has heard of the end of the one it waits for.
    return max(0.0, record.first_started_at - record.queued_at)


def run_to_view(entry: RunEntry, *, is_full: bool) -> run_pb2.Run:
    """Return a run as one of the contract's views shows it."""
    message = run_to_proto(entry, is_brief=not is_full)
    if is_full:
        for name, payload in entry.run.parameters.items():
            message.parameters[name].CopyFrom(payload_to_proto(payload))
    return message


def run_to_proto(entry: RunEntry, *, is_brief: bool = False) -> run_pb2.Run:
    """Return a run as it is now, without its parameters; a brief one without what may be large of its failure."""
    run, counts = entry.run, entry.run.counts
    return run_pb2.Run(
        run_id=entry.run_id,
        workflow_id=run.workflow_id,
        display_name=run.spec.display_name,
        state=RUN_STATE_TO_PROTO[run.state],
        failure=failure_to_proto(run.failure, is_brief=is_brief) if run.is_terminal else None,
        sequence=len(entry.log.events),
        create_time=timestamp(entry.created_s),
        end_time=timestamp(entry.ended_s),
        task_counts=run_pb2.TaskCounts(
            total=len(run.tasks),
            **{state.value: counts[state] for state in TaskState},
        ),
        labels=entry.labels,
        revision=run.revision,
        retried_run_id=run.retried_run_id,
        tenant=run.tenant,
        priority=run.priority,
        timeout=None if entry.timeout_s is None else duration(entry.timeout_s),
        start_time=timestamp(entry.began_s),
        open=run.is_open,
    )


def task_to_proto(entry: RunEntry, task_id: str, *, is_brief: bool = False) -> run_pb2.TaskRun:
    """Return one task of a run as it is now; a brief one without outputs, and what may be large of its failure."""
    record = entry.run.tasks[task_id]
    queued_s = _queued_s(record)
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
        queue_time=None if queued_s is None else duration(queued_s),
        item_count=None if record.items is None else len(record.items),
    )


def _no_items(record: TaskRecord) -> dict[str, Payload]:
    """Return the outputs of a task mapped over an empty list: there is no item that could show them."""
    is_empty = record.items is not None and not record.items and record.state is TaskState.SUCCEEDED
    return dict.fromkeys(record.spec.outputs, EMPTY_LIST) if is_empty else {}


async def result_to_proto(entry: RunEntry, slices: Slices) -> results_pb2.GetResultResponse:
    """Return a run and its final tasks as they are now; after a mapped one its items. Made in slices."""
    # First: a run that has ended by then has the outputs of its tasks after that.
    response = results_pb2.GetResultResponse(run=run_to_proto(entry))
    async for task_id in slices.each(entry.run.final_task_ids()):
        response.final_tasks.append(task_to_proto(entry, task_id))
    return response
