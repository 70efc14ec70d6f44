"""Owns the messages about signals: named values that callers send to a run, and that attempts wait for."""

from lattice_server.core.frozen import frozen
from lattice_server.core.messages.tasks import AttemptMessage
from lattice_server.core.model import Payload


@frozen
class AwaitedSignal:
    """A signal that an attempt waits for, for `timeout_s` seconds at most."""

    name: str
    timeout_s: float | None = None


@frozen
class SignalReceived:
    """A caller sent value number `index`, from 0, of a signal."""

    name: str
    index: int
    value: Payload
    request_id: str


@frozen
class SignalAwaited(AttemptMessage):
    """An attempt waits for a signal that was not sent yet."""

    name: str


@frozen
class SignalTaken(AttemptMessage):
    """An attempt got value number `index` of a signal."""

    name: str
    index: int


SignalEvent = SignalReceived | SignalAwaited | SignalTaken
