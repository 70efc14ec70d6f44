"""Owns the states of runs and tasks and their transitions. Rule: a pair the table does not hold raises."""

from enum import Enum


class InvalidTransition(Exception):
    """A state was asked to become one its table does not allow; a bug."""

    def __init__(self, what: str, old: Enum, new: Enum) -> None:
        super().__init__(f"{what}: {old.name} cannot become {new.name}")


class RunState(Enum):
    """Where a run is."""

    RUNNING = "running"  # Tasks are waiting or running.
    CANCELLING = "cancelling"  # Nothing new starts; what runs is being stopped.
    SUCCEEDED = "succeeded"  # Every task succeeded or was skipped on purpose.
    FAILED = "failed"  # A task failed.
    CANCELLED = "cancelled"  # Somebody cancelled it.


class TaskState(Enum):
    """Where a task of a run is."""

    BLOCKED = "blocked"  # Waits for another task.
    QUEUED = "queued"  # Ready; waits for resources or for a retry.
    RUNNING = "running"  # An attempt is on a worker.
    SUCCEEDED = "succeeded"  # Ended well.
    FAILED = "failed"  # Ended in a failure.
    CANCELLED = "cancelled"  # Somebody cancelled it, or its run.
    SKIPPED = "skipped"  # Never started: a task it depends on did not succeed, or a condition was not met.


RUN_TRANSITIONS = {
    RunState.RUNNING: {RunState.CANCELLING, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
    RunState.CANCELLING: {RunState.FAILED, RunState.CANCELLED},
}
RUN_TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})

TASK_TRANSITIONS = {
    # A mapped task runs from when its items are known, without ever being queued. One fails unstarted when its
    # condition cannot be read or it has too many items. One succeeds unstarted when its run retries another, which had
    # its outputs.
    TaskState.BLOCKED: {
        TaskState.QUEUED,
        TaskState.RUNNING,
        TaskState.SUCCEEDED,
        TaskState.SKIPPED,
        TaskState.CANCELLED,
        TaskState.FAILED,
    },
    TaskState.QUEUED: {TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELLED},
    TaskState.RUNNING: {TaskState.QUEUED, TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED},
}
TASK_TERMINAL = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED, TaskState.SKIPPED})
