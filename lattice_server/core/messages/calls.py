"""Owns the messages about calls: tasks that an attempt added and whose ends it waits for."""

from dataclasses import dataclass

from lattice_server.core.messages.tasks import AttemptMessage
from lattice_server.core.messages.workers import AttemptReport
from lattice_server.core.model import Failure, Outputs


@dataclass(frozen=True, slots=True)
class AttemptAwaits(AttemptReport):
    """An attempt waits for the end of a task that it added; `number` identifies the wait within its lease."""

    number: int
    called_id: str


@dataclass(frozen=True, slots=True)
class TaskAwaits(AttemptMessage):
    """An attempt at a task waits for the end of another one."""

    lease_id: str
    number: int
    called_id: str


@dataclass(frozen=True, slots=True)
class CallOutputs:
    """The outputs of a called task that succeeded."""

    outputs: Outputs


# The end of a called task, or a sentence that says why it cannot be waited for.
CallResult = CallOutputs | Failure | str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A wait of a lease is over. The lease's attempt is told as soon as it has its CPUs again."""

    lease_id: str
    number: int
    result: CallResult
