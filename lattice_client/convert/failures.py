"""Owns the translation of failures in messages of the contract to this package's errors."""

from lattice.v1 import errors_pb2, run_pb2

from lattice_client.errors import RunCancelledError, RunError, RunTimeoutError, TaskFailedError


def failure_of(failure: errors_pb2.Failure) -> dict[str, str]:
    """Return the fields of a failure that an event shows."""
    kind = errors_pb2.FailureKind.Name(failure.kind).removeprefix("FAILURE_KIND_")
    return {
        "kind": kind,
        "type": failure.type,
        "message": failure.message,
        "traceback": failure.traceback,
        "task_id": failure.task_id,
    }


def error_of(run: run_pb2.Run, task_name: str = "") -> RunError | None:
    """Return the error of an ended run; None when it succeeded. `decoded` adds the original exception as the cause.

    `task_name` is the display name of the failed task.
    """
    if run.state == run_pb2.RUN_STATE_SUCCEEDED:
        return None
    failure = run.failure
    if failure.kind == errors_pb2.FAILURE_KIND_TIMEOUT and not failure.task_id:
        return RunTimeoutError(run.run_id, f"run {run.run_id!r} failed: {failure.message}")
    if run.state == run_pb2.RUN_STATE_CANCELLED:
        return RunCancelledError(run.run_id, f"run {run.run_id!r} was cancelled: {failure.message}")
    return task_error_of(run.run_id, failure.task_id, failure, run.task_counts.failed, task_name)


def task_error_of(
    run_id: str, task_id: str, failure: errors_pb2.Failure, failed_tasks: int, task_name: str
) -> TaskFailedError:
    """Return the error of a failed task. `decoded` adds the original exception as the cause."""
    shown = failure_of(failure)
    message = f"{failure.type}: {failure.message}" if failure.type else failure.message
    error = TaskFailedError(run_id, task_id, shown["kind"], message, failure.traceback, failed_tasks, task_name)
    error.error_type, error.error_message = failure.type, failure.message
    if failure.HasField("exception"):
        error.exception = failure.exception
    elif failure.type:
        why = "it could not be pickled, or the task ran in a sandbox or is not written in Python"
        error.missing_cause = f"The worker sent the original exception as text only: {why}"
    return error


def error_of_task(task: run_pb2.TaskRun) -> RunError | None:
    """Return the error of an ended task that has no outputs; None when it succeeded."""
    if task.state == run_pb2.TASK_STATE_SUCCEEDED:
        return None
    if task.state == run_pb2.TASK_STATE_FAILED:
        return task_error_of(task.run_id, task.task_id, task.failure, 1, task.display_name)
    state = run_pb2.TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()
    text = f"task {task.task_id!r} of run {task.run_id!r} was {state} and has no output"
    return RunError(task.run_id, f"{text}: {task.failure.message}" if task.failure.message else text)
