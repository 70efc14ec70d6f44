"""Converts recorded events back into facts. Rule: it is the reverse of `events.py`, one row for each kind of event."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lattice.v1 import errors_pb2, payload_pb2, run_pb2, worker_pb2

from lattice_server.core.messages import (
    Fact,
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
from lattice_server.core.model import Failure, Payload
from lattice_server.engine.recording.run_codec import RecordedEvent
from lattice_server.rpc.convert.network import access_from_proto
from lattice_server.rpc.convert.payloads import failure_from_proto, payload_from_proto
from lattice_server.rpc.convert.runs import RUN_STATE_TO_PROTO
from lattice_server.rpc.convert.times import seconds_from

RUN_STATE_FROM_PROTO = {proto: core for core, proto in RUN_STATE_TO_PROTO.items()}
NO_LIMIT = 1 << 62  # An accepted value is restored, even over the present limits.


def event_from_proto(key: str, message: run_pb2.RunEvent, report: worker_pb2.Report) -> RecordedEvent:
    """Return an event of the run with this key. Raises ValueError for a kind of event that is not known."""
    kind = message.WhichOneof("event")
    if kind is None:
        raise ValueError("an event has a kind that this server does not know; a newer server wrote it")
    body = getattr(message, kind)
    time_s = seconds_from(message.time)
    fact = FACTS[kind](key, body, report, time_s)
    queued_s = seconds_from(body.queue_time) if kind == "task_succeeded" and body.HasField("queue_time") else None
    happened_s = seconds_from(report.time) if report.HasField("time") else time_s
    event, is_called = RunEvent(message.sequence, time_s, fact), report.spawned.called
    return RecordedEvent(event, happened_s, queued_s, report.lease_id, report.item, is_called)


def _run_started(key: str, body: run_pb2.RunStarted, *_: Any) -> Fact:
    return RunStarted(body.workflow_id, body.task_count)


def _run_cancelling(key: str, body: run_pb2.RunCancelling, *_: Any) -> Fact:
    return RunCancelling(_failure(body.failure))


def _run_finished(key: str, body: run_pb2.RunFinished, *_: Any) -> Fact:
    failure = _failure(body.failure) if body.HasField("failure") else None
    return RunFinished(RUN_STATE_FROM_PROTO[body.state], failure, tuple(body.unread_signals))


def _tasks_added(key: str, body: run_pb2.TasksAdded, *_: Any) -> Fact:
    return TasksAdded(tuple(body.task_ids), body.parent_task_id, body.revision)


def _task_started(key: str, body: run_pb2.TaskStarted, report: worker_pb2.Report, time_s: float) -> Fact:
    where = (body.node_id, body.node_ip, tuple(body.gpu_indices))
    return TaskStarted(key, body.task_id, body.attempt, *where, None, report.lease_id, report.item)


def _task_succeeded(key: str, body: run_pb2.TaskSucceeded, report: worker_pb2.Report, time_s: float) -> Fact:
    outputs = {name: _payload(payload) for name, payload in body.outputs.items()}
    split = {name: tuple(map(_payload, items.items)) for name, items in report.succeeded.split.items()}
    return TaskSucceeded(key, body.task_id, body.attempt, outputs, split, seconds_from(body.duration))


def _task_retrying(key: str, body: run_pb2.TaskRetrying, report: worker_pb2.Report, time_s: float) -> Fact:
    delay_s = max(0.0, seconds_from(body.retry_time) - time_s)
    return TaskRetrying(key, body.task_id, body.attempt, _failure(body.failure), delay_s)


def _task_failed(key: str, body: run_pb2.TaskFailed, *_: Any) -> Fact:
    return TaskFailed(key, body.task_id, body.attempt, _failure(body.failure))


def _task_cancelled(key: str, body: run_pb2.TaskCancelled, *_: Any) -> Fact:
    return TaskCancelled(key, body.task_id, body.attempt, _failure(body.failure))


def _task_skipped(key: str, body: run_pb2.TaskSkipped, *_: Any) -> Fact:
    return TaskSkipped(key, body.task_id, _failure(body.failure) if body.HasField("failure") else None)


def _task_log(key: str, body: run_pb2.TaskLog, *_: Any) -> Fact:
    is_error = body.stream == run_pb2.LOG_STREAM_STDERR
    return TaskLogged(key, body.task_id, body.attempt, is_error, body.text, body.truncated)


def _task_network_access(key: str, body: run_pb2.TaskNetworkAccess, *_: Any) -> Fact:
    return TaskAccessedNetwork(key, body.task_id, body.attempt, access_from_proto(body.access))


def _signal_received(key: str, body: run_pb2.SignalReceived, *_: Any) -> Fact:
    return SignalReceived(body.name, body.index, payload_from_proto(body.value, "value", NO_LIMIT), body.request_id)


def _signal_awaited(key: str, body: run_pb2.SignalAwaited, *_: Any) -> Fact:
    return SignalAwaited(key, body.task_id, body.attempt, body.name)


def _signal_taken(key: str, body: run_pb2.SignalTaken, *_: Any) -> Fact:
    return SignalTaken(key, body.task_id, body.attempt, body.name, body.index)


# The function that makes the fact of each field of `RunEvent`.
FACTS: dict[str, Callable[[str, Any, worker_pb2.Report, float], Fact]] = {
    "run_started": _run_started,
    "run_cancelling": _run_cancelling,
    "run_finished": _run_finished,
    "tasks_added": _tasks_added,
    "task_started": _task_started,
    "task_succeeded": _task_succeeded,
    "task_retrying": _task_retrying,
    "task_failed": _task_failed,
    "task_cancelled": _task_cancelled,
    "task_skipped": _task_skipped,
    "task_log": _task_log,
    "task_network_access": _task_network_access,
    "signal_received": _signal_received,
    "signal_awaited": _signal_awaited,
    "signal_taken": _signal_taken,
}


def _payload(message: payload_pb2.Payload) -> Payload:
    return payload_from_proto(message, "outputs", NO_LIMIT)


def _failure(message: errors_pb2.Failure) -> Failure:
    """Return a whole failure, as the server knew it."""
    found = failure_from_proto(message)
    cause = _failure(message.cause) if message.HasField("cause") else None
    exception = _payload(message.exception) if message.HasField("exception") else None
    return replace(found, task_id=message.task_id, cause=cause, exception=exception)
