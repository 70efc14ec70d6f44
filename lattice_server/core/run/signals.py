"""Owns the signals of one run: the values that callers have sent, and the attempts that wait for one.

Rule: each attempt gets the values of a name in the order in which they were sent, from the first one on, each once. So
repeated attempts and several tasks all get the same values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.errors import ConflictError, ExhaustedError, PreconditionError, invalid_field
from lattice_server.core.messages import (
    CallEnded,
    SignalAwaited,
    SignalEvent,
    SignalReceived,
    SignalTaken,
    TaskAwaits,
)
from lattice_server.core.model import Failure, FailureKind, Payload
from lattice_server.core.run.status import RunStatus
from lattice_server.core.tenancy import id_of

MAX_SIGNALS = 1000
MAX_NAME_LENGTH = 128
NAME = f"the name of a signal is a text of 1 to {MAX_NAME_LENGTH} characters"

SignalEffect = SignalEvent | CallEnded


@dataclass(slots=True)
class _Reader:
    """How many values of each name the newest attempt at a task got, and its waits, in order."""

    lease_id: str
    taken: dict[str, int] = field(default_factory=dict)
    waits: dict[int, TaskAwaits] = field(default_factory=dict)  # By number.


class Signals:
    """The signals of one run, a part of its machine."""

    def __init__(self, status: RunStatus, max_signals: int = MAX_SIGNALS) -> None:
        self._status = status
        self._max_signals = max_signals
        self._values: dict[str, list[Payload]] = {}
        self._sent: dict[str, SignalReceived] = {}  # By request id.
        self._read: dict[str, int] = {}  # How many values of a name some attempt got.
        self._readers: dict[str, _Reader] = {}  # By task.
        self._deadlines: Deadlines[tuple[str, int]] = Deadlines()  # By task, and number of the wait.

    def send(self, name: str, value: Payload, request_id: str) -> tuple[SignalReceived, list[SignalEffect]]:
        """Take a value of a caller; return its number and the effects. A repeated request has no effects.

        Raises:
            InvalidError: the name is none.
            ConflictError: REQUEST_ID_CONFLICT, the request id was used for another signal of the run.
            PreconditionError: RUN_ENDED, the run has ended or is stopping.
            ExhaustedError: TOO_MANY_SIGNALS, the run has as many as it may.
        """
        if not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise invalid_field("name", NAME)
        if (earlier := self._sent.get(request_id)) is not None:
            if (earlier.name, earlier.value) != (name, value):
                text = f"request id {request_id!r} was used for another signal of the run"
                raise ConflictError("REQUEST_ID_CONFLICT", text)
            return earlier, []
        if not self._status.is_running:
            text = f"run {id_of(self._status.run_id)!r} is {self._status.state.value}; no task of it waits for a signal"
            raise PreconditionError("RUN_ENDED", text)
        if sum(map(len, self._values.values())) >= self._max_signals:
            raise ExhaustedError("TOO_MANY_SIGNALS", f"a run takes {self._max_signals} signals, and has got them")
        fact = SignalReceived(name, len(self._values.get(name, ())), value, request_id)
        self.apply(fact)
        effects: list[SignalEffect] = [fact]
        for reader in self._readers.values():
            effects += self._deliver(reader)
        return fact, effects

    def wait(self, event: TaskAwaits, now: float) -> list[SignalEffect]:
        """Take a wait of a running attempt."""
        assert event.signal is not None
        name, timeout_s = event.signal.name, event.signal.timeout_s
        if not 1 <= len(name) <= MAX_NAME_LENGTH:
            return [CallEnded(event.lease_id, event.number, NAME)]
        reader = self._readers.get(event.task_id)
        if reader is None or reader.lease_id != event.lease_id:
            self.forget(event.task_id)
            reader = self._readers[event.task_id] = _Reader(event.lease_id)
        reader.waits[event.number] = event
        effects = self._deliver(reader)
        if event.number in reader.waits:
            effects.append(SignalAwaited(event.run_id, event.task_id, event.attempt, name))
            if timeout_s is not None:
                self._deadlines.set((event.task_id, event.number), now + timeout_s)
        return effects + self.tick(now)

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        return self._deadlines.next_at()

    def tick(self, now: float) -> list[SignalEffect]:
        """End the waits whose time is up."""
        effects: list[SignalEffect] = []
        for task_id, number in self._deadlines.due(now):
            wait = self._readers[task_id].waits.pop(number)
            text = f"signal {_name(wait)!r} was not sent in time"
            effects.append(CallEnded(wait.lease_id, number, Failure(FailureKind.TIMEOUT, text)))
        return effects

    def forget(self, task_id: str) -> None:
        """Forget the values that earlier attempts of a task have read, and their waits: these attempts have ended."""
        if (reader := self._readers.pop(task_id, None)) is not None:
            for number in reader.waits:
                self._deadlines.discard((task_id, number))

    def awaited(self) -> list[str]:
        """Return the names of the signals that attempts wait for."""
        return sorted({_name(wait) for reader in self._readers.values() for wait in reader.waits.values()})

    def unread(self) -> tuple[str, ...]:
        """Return the names of the signals of which a value was sent that no attempt got."""
        return tuple(sorted(name for name, values in self._values.items() if self._read.get(name, 0) < len(values)))

    def apply(self, fact: SignalEvent) -> None:
        """Apply a fact, also one that was recorded before a restart."""
        match fact:
            case SignalReceived():
                self._values.setdefault(fact.name, []).append(fact.value)
                if fact.request_id:
                    self._sent[fact.request_id] = fact
            case SignalTaken():
                self._read[fact.name] = max(self._read.get(fact.name, 0), fact.index + 1)
            case SignalAwaited():
                pass

    def check(self, running: Sequence[str]) -> None:
        """Assert every invariant; `running` are the tasks whose attempts may wait."""
        assert self._readers.keys() <= set(running), "only running attempts wait for signals"
        assert len(self._sent) <= sum(map(len, self._values.values())) <= self._max_signals
        waits = {(task, number) for task, reader in self._readers.items() for number in reader.waits}
        assert waits.issuperset(self._deadlines), "only a wait has a deadline"
        for reader in self._readers.values():
            for name in map(_name, reader.waits.values()):
                assert reader.taken.get(name, 0) == len(self._values.get(name, ())), "a sent value waits"

    def _deliver(self, reader: _Reader) -> list[SignalEffect]:
        """Give an attempt the values that it waits for and that are there."""
        effects: list[SignalEffect] = []
        for number, wait in list(reader.waits.items()):
            name = _name(wait)
            index, values = reader.taken.get(name, 0), self._values.get(name, ())
            if index < len(values):
                del reader.waits[number]
                self._deadlines.discard((wait.task_id, number))
                reader.taken[name] = index + 1
                fact = SignalTaken(wait.run_id, wait.task_id, wait.attempt, name, index)
                self.apply(fact)
                effects += fact, CallEnded(wait.lease_id, number, values[index])
        return effects


def _name(wait: TaskAwaits) -> str:
    assert wait.signal is not None
    return wait.signal.name
