"""Owns the messages about waits of attempts: for the ends of tasks that they called, and for signals."""

from lattice_server.core.frozen import frozen
from lattice_server.core.messages.signals import AwaitedSignal
from lattice_server.core.messages.tasks import AttemptMessage
from lattice_server.core.messages.workers import AttemptReport
from lattice_server.core.model import Failure, Outputs, Payload


@frozen
class AttemptAwaits(AttemptReport):
    """An attempt waits for the end of a task that it added, or for a signal; `number` names the wait in its lease."""

    number: int
    called_id: str
    signal: AwaitedSignal | None = None


@frozen
class TaskAwaits(AttemptMessage):
    """An attempt at a task waits for the end of another one, or for a signal."""

    lease_id: str
    number: int
    called_id: str
    signal: AwaitedSignal | None = None


@frozen
class CallOutputs:
    """The outputs of a called task that succeeded."""

    outputs: Outputs


# The end of a called task, the value of a signal, or a sentence that says why there is nothing to wait for.
CallResult = CallOutputs | Payload | Failure | str


@frozen
class CallEnded:
    """A wait of a lease is over. The lease's attempt is told as soon as it has its CPUs again."""

    lease_id: str
    number: int
    result: CallResult
