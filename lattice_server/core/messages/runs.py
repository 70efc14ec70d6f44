"""Owns the public events of a run. Rule: they are numbered without gaps, and `RunFinished` is the last one."""

from lattice_server.core.frozen import frozen
from lattice_server.core.messages.signals import SignalEvent
from lattice_server.core.messages.tasks import TaskEvent
from lattice_server.core.model import Failure
from lattice_server.core.states import RunState


@frozen
class RunStarted:
    """The run was accepted."""

    workflow_id: str
    task_count: int


@frozen
class TasksAdded:
    """The run grew: by the items of the mapped task `parent_task_id`, by the tasks that task spawned, or, when it is
    empty, by tasks of a caller."""

    task_ids: tuple[str, ...]
    parent_task_id: str
    revision: int


@frozen
class RunCancelling:
    """No further task of the run starts."""

    failure: Failure


@frozen
class RunFinished:
    """The run ended; no attempt got some of the values that were sent of `unread_signals`."""

    state: RunState
    failure: Failure | None
    unread_signals: tuple[str, ...] = ()


Fact = RunStarted | TasksAdded | RunCancelling | RunFinished | TaskEvent | SignalEvent


@frozen
class RunEvent:
    """A numbered public event; `time_s` is wall time in seconds since the epoch."""

    sequence: int
    time_s: float
    fact: Fact
