"""Converts run events. Rule: one row of a table for each kind of event."""

from collections.abc import Callable, Mapping
from typing import Any

from lattice.v1 import run_pb2

from lattice_server.core.messages import (
    RunCancelling,
    RunEvent,
    RunFinished,
    RunStarted,
    SignalAwaited,
    SignalReceived,
    SignalTaken,
    TaskAccessedNetwork,
    TaskCancelled,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TasksAdded,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Failure
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.rpc.convert.network import access_to_proto
from lattice_server.rpc.convert.payloads import failure_to_proto, fill_payload
from lattice_server.rpc.convert.runs import RUN_STATE_TO_PROTO, queued_s
from lattice_server.rpc.convert.times import fill_duration, fill_timestamp

Tasks = Mapping[str, TaskRecord]


def fill_event(message: run_pb2.RunEvent, tasks: Tasks, event: RunEvent) -> None:
    """Fill the message of one event of the run that has these tasks."""
    message.sequence = event.sequence
    fill_timestamp(message.time, event.time_s)
    field, fill = EVENTS[type(event.fact)]
    # Written in place, without a message of its own: a large run has many events.
    body = getattr(message, field)
    body.SetInParent()
    fill(body, event.fact, event, tasks)


def event_to_proto(tasks: Tasks, event: RunEvent) -> run_pb2.RunEvent:
    """Return the message of one event of the run that has these tasks."""
    message = run_pb2.RunEvent()
    fill_event(message, tasks, event)
    return message


def _run_started(body: run_pb2.RunStarted, fact: RunStarted, event: RunEvent, tasks: Tasks) -> None:
    body.workflow_id, body.task_count = fact.workflow_id, fact.task_count


def _run_cancelling(body: run_pb2.RunCancelling, fact: RunCancelling, event: RunEvent, tasks: Tasks) -> None:
    _set_failure(body, fact.failure)


def _run_finished(body: run_pb2.RunFinished, fact: RunFinished, event: RunEvent, tasks: Tasks) -> None:
    body.state = RUN_STATE_TO_PROTO[fact.state]
    body.unread_signals.extend(fact.unread_signals)
    _set_failure(body, fact.failure)


def _tasks_added(body: run_pb2.TasksAdded, fact: TasksAdded, event: RunEvent, tasks: Tasks) -> None:
    body.task_ids.extend(fact.task_ids)
    body.display_names.extend(tasks[task_id].spec.display_name for task_id in fact.task_ids)
    body.parent_task_id, body.revision = fact.parent_task_id, fact.revision


def _task_started(body: run_pb2.TaskStarted, fact: TaskStarted, event: RunEvent, tasks: Tasks) -> None:
    _set_attempt(body, fact, tasks)
    body.node_id, body.node_ip = fact.node_id, fact.node_ip
    body.gpu_indices.extend(fact.gpu_indices)


def _task_succeeded(body: run_pb2.TaskSucceeded, fact: TaskSucceeded, event: RunEvent, tasks: Tasks) -> None:
    _set_attempt(body, fact, tasks)
    for name, payload in fact.outputs.items():
        fill_payload(body.outputs[name], payload)
    fill_duration(body.duration, fact.duration_s)
    if (waited_s := queued_s(tasks[fact.task_id])) is not None:
        fill_duration(body.queue_time, waited_s)


def _task_retrying(body: run_pb2.TaskRetrying, fact: TaskRetrying, event: RunEvent, tasks: Tasks) -> None:
    _set_attempt(body, fact, tasks)
    _set_failure(body, fact.failure)
    body.retry_time.FromNanoseconds(int((event.time_s + fact.delay_s) * 1e9))


def _task_ended(body: Any, fact: TaskFailed | TaskCancelled, event: RunEvent, tasks: Tasks) -> None:
    _set_attempt(body, fact, tasks)
    _set_failure(body, fact.failure)


def _task_skipped(body: run_pb2.TaskSkipped, fact: TaskSkipped, event: RunEvent, tasks: Tasks) -> None:
    body.task_id, body.display_name = fact.task_id, tasks[fact.task_id].spec.display_name
    _set_failure(body, fact.failure)


def _task_network_access(
    body: run_pb2.TaskNetworkAccess, fact: TaskAccessedNetwork, event: RunEvent, tasks: Tasks
) -> None:
    body.task_id, body.attempt = fact.task_id, fact.attempt
    body.access.CopyFrom(access_to_proto(fact.access))


def _task_log(body: run_pb2.TaskLog, fact: TaskLogged, event: RunEvent, tasks: Tasks) -> None:
    _set_attempt(body, fact, tasks)
    body.stream = run_pb2.LOG_STREAM_STDERR if fact.is_error else run_pb2.LOG_STREAM_STDOUT
    body.text, body.truncated = fact.text, fact.is_truncated


def _signal_received(body: run_pb2.SignalReceived, fact: SignalReceived, event: RunEvent, tasks: Tasks) -> None:
    body.name, body.index, body.request_id = fact.name, fact.index, fact.request_id
    fill_payload(body.value, fact.value)


def _signal_awaited(body: run_pb2.SignalAwaited, fact: SignalAwaited, event: RunEvent, tasks: Tasks) -> None:
    _set_attempt(body, fact, tasks)
    body.name = fact.name


def _signal_taken(body: run_pb2.SignalTaken, fact: SignalTaken, event: RunEvent, tasks: Tasks) -> None:
    _set_attempt(body, fact, tasks)
    body.name, body.index = fact.name, fact.index


# The field of `RunEvent` for each kind of event, and the function that fills it.
EVENTS: dict[type, tuple[str, Callable[[Any, Any, RunEvent, Tasks], None]]] = {
    RunStarted: ("run_started", _run_started),
    RunCancelling: ("run_cancelling", _run_cancelling),
    RunFinished: ("run_finished", _run_finished),
    TasksAdded: ("tasks_added", _tasks_added),
    TaskStarted: ("task_started", _task_started),
    TaskSucceeded: ("task_succeeded", _task_succeeded),
    TaskRetrying: ("task_retrying", _task_retrying),
    TaskFailed: ("task_failed", _task_ended),
    TaskCancelled: ("task_cancelled", _task_ended),
    TaskSkipped: ("task_skipped", _task_skipped),
    TaskLogged: ("task_log", _task_log),
    SignalReceived: ("signal_received", _signal_received),
    SignalAwaited: ("signal_awaited", _signal_awaited),
    SignalTaken: ("signal_taken", _signal_taken),
    TaskAccessedNetwork: ("task_network_access", _task_network_access),
}


def _set_attempt(body: Any, fact: Any, tasks: Tasks) -> None:
    body.task_id, body.attempt = fact.task_id, fact.attempt
    body.display_name = tasks[fact.task_id].spec.display_name


def _set_failure(body: Any, failure: Failure | None) -> None:
    if (message := failure_to_proto(failure)) is not None:
        body.failure.CopyFrom(message)
