"""Converts run events. Rule: one row of a table for each kind of event."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lattice.v1 import run_pb2

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
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.rpc.convert.payloads import failure_to_proto, fill_payload
from lattice_server.rpc.convert.runs import RUN_STATE_TO_PROTO, queued_s
from lattice_server.rpc.convert.times import fill_duration

Tasks = Mapping[str, TaskRecord]


def event_to_proto(tasks: Tasks, event: RunEvent) -> run_pb2.RunEvent:
    """Return the message of one event of the run that has these tasks."""
    seconds, nanos = divmod(int(event.time_s * 1e9), 10**9)
    message = run_pb2.RunEvent(sequence=event.sequence)
    message.time.seconds, message.time.nanos = seconds, nanos
    fact = event.fact
    row = EVENTS[type(fact)]
    # Written in place, without a message of its own: a large run has many events.
    body = getattr(message, row.field)
    body.SetInParent()
    for name in row.copied:
        setattr(body, name, getattr(fact, name))
    if row.is_of_task:
        body.display_name = tasks[body.task_id].spec.display_name
    if row.has_failure and (failure := failure_to_proto(getattr(fact, "failure", None))) is not None:
        body.failure.CopyFrom(failure)
    if row.fill is not None:
        row.fill(body, fact, event, tasks)
    return message


def _fill_started(body: run_pb2.TaskStarted, fact: TaskStarted, event: RunEvent, tasks: Tasks) -> None:
    body.gpu_indices.extend(fact.gpu_indices)


def _fill_succeeded(body: run_pb2.TaskSucceeded, fact: TaskSucceeded, event: RunEvent, tasks: Tasks) -> None:
    for name, payload in fact.outputs.items():
        fill_payload(body.outputs[name], payload)
    fill_duration(body.duration, fact.duration_s)
    if (waited_s := queued_s(tasks[fact.task_id])) is not None:
        fill_duration(body.queue_time, waited_s)


def _fill_log(body: run_pb2.TaskLog, fact: TaskLogged, event: RunEvent, tasks: Tasks) -> None:
    body.stream = run_pb2.LOG_STREAM_STDERR if fact.is_error else run_pb2.LOG_STREAM_STDOUT
    body.truncated = fact.is_truncated


def _fill_retrying(body: run_pb2.TaskRetrying, fact: TaskRetrying, event: RunEvent, tasks: Tasks) -> None:
    body.retry_time.FromNanoseconds(int((event.time_s + fact.delay_s) * 1e9))


def _fill_added(body: run_pb2.TasksAdded, fact: TasksAdded, event: RunEvent, tasks: Tasks) -> None:
    body.task_ids.extend(fact.task_ids)
    body.display_names.extend(tasks[task_id].spec.display_name for task_id in fact.task_ids)


def _fill_finished(body: run_pb2.RunFinished, fact: RunFinished, event: RunEvent, tasks: Tasks) -> None:
    body.state = RUN_STATE_TO_PROTO[fact.state]


class _Row(NamedTuple):
    """How one kind of event is converted.

    `field` is its field of `RunEvent`. The fields in `copied` have one name and type on both sides; `fill` writes the
    others.
    """

    field: str
    copied: tuple[str, ...]
    has_failure: bool = False
    fill: Callable[[Any, Any, RunEvent, Tasks], None] | None = None

    @property
    def is_of_task(self) -> bool:
        """Whether the event is about one task."""
        return "task_id" in self.copied


ATTEMPT = ("task_id", "attempt")
EVENTS: dict[type, _Row] = {
    RunStarted: _Row("run_started", ("workflow_id", "task_count")),
    RunCancelling: _Row("run_cancelling", (), has_failure=True),
    RunFinished: _Row("run_finished", (), has_failure=True, fill=_fill_finished),
    TasksAdded: _Row("tasks_added", ("parent_task_id", "revision"), fill=_fill_added),
    TaskStarted: _Row("task_started", (*ATTEMPT, "node_id", "node_ip"), fill=_fill_started),
    TaskSucceeded: _Row("task_succeeded", ATTEMPT, fill=_fill_succeeded),
    TaskRetrying: _Row("task_retrying", ATTEMPT, has_failure=True, fill=_fill_retrying),
    TaskFailed: _Row("task_failed", ATTEMPT, has_failure=True),
    TaskCancelled: _Row("task_cancelled", ATTEMPT, has_failure=True),
    TaskSkipped: _Row("task_skipped", ("task_id",), has_failure=True),
    TaskLogged: _Row("task_log", (*ATTEMPT, "text"), fill=_fill_log),
}
