"""Owns the states of runs, tasks, leases, nodes and sessions. Rule: a transition that a table does not list raises."""

from collections.abc import Mapping, Set
from enum import Enum
from typing import TypeVar

from lattice_server.core.symbol import Symbol

S = TypeVar("S", bound=Enum)


class InvalidTransition(Exception):
    """A transition that the table does not list; a bug."""

    def __init__(self, what: str, old: Enum, new: Enum) -> None:
        super().__init__(f"{what}: {old.name} cannot become {new.name}")


def transition(kind: str, name: str, old: S, new: S, table: Mapping[S, Set[S]]) -> S:
    """Return `new`. Raises InvalidTransition, which names both states, when the table does not list the pair."""
    if new not in table[old]:
        raise InvalidTransition(f"{kind} {name}", old, new)
    return new


class RunState(Symbol):
    """The state of a run."""

    RUNNING = "running"  # Tasks wait or run.
    CANCELLING = "cancelling"  # No further task starts; running ones are being stopped.
    SUCCEEDED = "succeeded"  # Every task succeeded or was skipped on purpose.
    FAILED = "failed"  # A task failed.
    CANCELLED = "cancelled"  # A caller cancelled it, or the caller of an open run left.


RUN_TRANSITIONS: Mapping[RunState, Set[RunState]] = {
    # A bug in the server ends a run in any state as failed.
    RunState.RUNNING: {RunState.CANCELLING, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
    RunState.CANCELLING: {RunState.FAILED, RunState.CANCELLED},
    RunState.SUCCEEDED: {RunState.FAILED},
    RunState.FAILED: {RunState.FAILED},
    RunState.CANCELLED: {RunState.FAILED},
}
RUN_TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})


class TaskState(Symbol):
    """The state of a task of a run."""

    BLOCKED = "blocked"  # Waits for another task.
    QUEUED = "queued"  # Waits for resources or for a retry.
    RUNNING = "running"  # An attempt is on a worker; of a mapped task, its items are known.
    SUCCEEDED = "succeeded"  # Its outputs are known.
    FAILED = "failed"  # Its last attempt failed.
    CANCELLED = "cancelled"  # A caller cancelled it or its run.
    SKIPPED = "skipped"  # Never started: a task it depends on did not succeed, or a condition was not met.


TASK_TRANSITIONS: Mapping[TaskState, Set[TaskState]] = {
    # From BLOCKED, a mapped task runs without being queued; a task fails when its condition cannot be evaluated or it
    # has too many items, and succeeds when its run retries another one that has its outputs.
    TaskState.BLOCKED: frozenset(TaskState) - {TaskState.BLOCKED},
    TaskState.QUEUED: {TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELLED},
    TaskState.RUNNING: {TaskState.QUEUED, TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED},
    TaskState.SUCCEEDED: frozenset(),
    TaskState.FAILED: frozenset(),
    TaskState.CANCELLED: frozenset(),
    TaskState.SKIPPED: frozenset(),
}
TASK_TERMINAL = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED, TaskState.SKIPPED})


class LeaseState(Symbol):
    """The state of a lease."""

    ASSIGNED = "assigned"  # Sent to its worker, which has not reported a start.
    REVOKED = "revoked"  # Asked back before a start was reported; the worker returns it or has started it.
    STARTED = "started"  # An attempt of it has started.
    RELEASED = "released"  # Its tasks have ended or are queued again; its slot does not hold it any more.


LEASE_TRANSITIONS: Mapping[LeaseState, Set[LeaseState]] = {
    LeaseState.ASSIGNED: {LeaseState.REVOKED, LeaseState.STARTED, LeaseState.RELEASED},
    LeaseState.REVOKED: {LeaseState.STARTED, LeaseState.RELEASED},
    LeaseState.STARTED: {LeaseState.RELEASED},
    LeaseState.RELEASED: frozenset(),
}


class NodeState(Symbol):
    """The state of a node in the registry."""

    READY = "ready"  # Accepts leases while its session is connected.
    DRAINING = "draining"  # Accepts no leases and is removed with its last one.
    REMOVED = "removed"  # Drained, lost, or replaced by a newer node of the same id.


NODE_TRANSITIONS: Mapping[NodeState, Set[NodeState]] = {
    # A second request may shorten the deadline of a drain.
    NodeState.READY: {NodeState.DRAINING, NodeState.REMOVED},
    NodeState.DRAINING: {NodeState.DRAINING, NodeState.REMOVED},
    NodeState.REMOVED: frozenset(),
}


class SessionState(Symbol):
    """The state of the session in which a worker serves a node."""

    CONNECTED = "connected"  # Its stream is open.
    DETACHED = "detached"  # Its stream broke; the worker may resume it until it expires.
    ENDED = "ended"  # It expired, was drained, or was replaced.


SESSION_TRANSITIONS: Mapping[SessionState, Set[SessionState]] = {
    # A worker may resume its session before the break of its old stream is noticed, and a break may be reported twice.
    SessionState.CONNECTED: {SessionState.CONNECTED, SessionState.DETACHED, SessionState.ENDED},
    SessionState.DETACHED: {SessionState.CONNECTED, SessionState.DETACHED, SessionState.ENDED},
    SessionState.ENDED: frozenset(),
}
