"""A worker as the contract has it, without processes or a clock, for simulations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lattice_server.core import messages
from lattice_server.core.messages import (
    AcknowledgeReports,
    Assign,
    AttemptInputs,
    HeldLease,
    RevokeLease,
    StopLease,
    WelcomeWorker,
    WorkerHello,
)
from lattice_server.core.model import (
    Binding,
    BindingList,
    BindingMap,
    Failure,
    FailureKind,
    OutputRef,
    Outputs,
    Parameter,
    Payload,
)
from lattice_server.core.references import resolve

STOPPED = Failure(FailureKind.CANCELLED, "the attempt was cancelled")


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt after `seconds`: outputs, with items if they are split, or a failure.

    The attempt spawns `tasks` when it starts.
    """

    seconds: float
    outputs: Outputs = field(default_factory=dict)
    split: Mapping[str, list[Payload]] = field(default_factory=dict)
    failure: Failure | None = None
    tasks: tuple[Any, ...] = ()

    @property
    def takes_all_down(self) -> bool:
        """Whether the process dies, and with it the batch."""
        return self.failure is not None and self.failure.kind in {FailureKind.CRASHED, FailureKind.OUT_OF_MEMORY}


Behaviour = Callable[[Assign, AttemptInputs, Mapping[str, Binding]], Outcome]


class Worker:
    """One worker. `say` takes its reports, `after` calls back later, `behave` decides what attempts do."""

    def __init__(
        self,
        hello: WorkerHello,
        say: Callable[[Any], None],
        after: Callable[[float, Callable[[], None]], None],
        behave: Behaviour,
    ) -> None:
        self.hello = hello
        self.session_id = ""
        self.greeting = 0
        self.is_connected = False
        self.is_gone = False
        self.calls: dict[str, int] = {}
        self._say = say
        self._after = after
        self._behave = behave
        self._leases: dict[str, Assign] = {}
        self._slots: dict[int, list[str]] = {}
        self._running: dict[str, float] = {}
        self._upstream: dict[str, Outputs] = {}
        self._followers: dict[str, list[str]] = {}
        self._outbox: list[Any] = []
        self._sequence = 0
        self._unacknowledged: dict[int, Any] = {}

    def held(self) -> list[str]:
        """Return the leases that a hello names: leases that have not ended, or have unacknowledged reports."""
        return list(dict.fromkeys([*self._leases, *self._reported()]))

    def held_leases(self) -> tuple[HeldLease, ...]:
        """Return those of them that have started, which another life of the server may adopt."""
        started = dict.fromkeys([*self._running, *self._reported()])
        return tuple(HeldLease(lease_id, lease_id not in self._leases) for lease_id in started)

    def _reported(self) -> list[str]:
        return [report.lease_id for report in (*self._unacknowledged.values(), *self._outbox)]

    def take(self, effect: Any) -> None:
        """Take a message of the server."""
        match effect:
            case WelcomeWorker():
                if effect.resumed:
                    for lease_id in effect.drop_lease_ids:
                        self._forget(lease_id)
                else:
                    self._reset(effect.session_id, effect.adopted_lease_ids)
                self.session_id, self.is_connected = effect.session_id, True
                outbox, self._outbox = self._outbox, []
                for report in outbox:
                    self._report(report)
            case Assign():
                self._assign(effect)
            case AcknowledgeReports():
                for sequence in [known for known in self._unacknowledged if known <= effect.sequence]:
                    del self._unacknowledged[sequence]
            case RevokeLease():
                if effect.lease_id in self._leases and effect.lease_id not in self._running:
                    self._give_back(effect.lease_id)
            case StopLease():
                if effect.lease_id in self._leases:
                    size = len(self._leases[effect.lease_id].attempts)
                    self._end(effect.lease_id, [Outcome(0.0, failure=STOPPED)] * size)

    def disconnect(self) -> None:
        """Lose the stream; reports are kept."""
        self.is_connected = False

    def _reset(self, session_id: str, adopted: tuple[str, ...]) -> None:
        """Begin another session with the leases that it adopts, each in a slot that no assignment names."""
        kept = [lease_id for lease_id in adopted if lease_id in self._leases]
        self._leases = {lease_id: replace(self._leases[lease_id], slot=-n) for n, lease_id in enumerate(kept, 1)}
        self._slots = {-n: [lease_id] for n, lease_id in enumerate(kept, 1)}
        self._running = {lease_id: self._running[lease_id] for lease_id in kept}
        self._upstream.clear()
        self._followers.clear()
        again = [report for report in (*self._unacknowledged.values(), *self._outbox) if report.lease_id in adopted]
        self._unacknowledged.clear()
        self._sequence, self._outbox = 0, [replace(report, session_id=session_id) for report in again]

    def _assign(self, assign: Assign) -> None:
        if assign.lease_id in self._leases:
            return
        if assign.after_lease_id:
            if assign.after_lease_id not in self._leases:
                self._report(messages.LeaseReturned(self.session_id, assign.lease_id, ""))
                return
            self._followers.setdefault(assign.after_lease_id, []).append(assign.lease_id)
        self._leases[assign.lease_id] = assign
        slot = self._slots.setdefault(assign.slot, [])
        slot.append(assign.lease_id)
        if len(slot) == 1:
            self._start(assign)

    def _start(self, assign: Assign) -> None:
        upstream = self._upstream.pop(assign.lease_id, {})

        def value_of(reference: OutputRef | Parameter) -> Binding:
            assert isinstance(reference, OutputRef)
            return upstream[reference.output]

        outcomes = []
        for attempt in assign.attempts:
            inputs = {name: resolve(binding, value_of) for name, binding in attempt.inputs.items()}
            assert all(_is_known(binding) for binding in inputs.values()), "an attempt started without its inputs"
            outcomes.append(self._behave(assign, attempt, inputs))
        for item, outcome in enumerate(outcomes):
            if outcome.tasks:
                self._report(messages.AttemptSpawned(self.session_id, assign.lease_id, item, outcome.tasks))
        seconds = max(outcome.seconds for outcome in outcomes)
        fatal = next((outcome for outcome in outcomes if outcome.takes_all_down), None)
        self._running[assign.lease_id] = seconds
        self.calls[assign.lease_id] = len(assign.attempts)
        if seconds > 0.002:
            self._report(messages.AttemptStarted(self.session_id, assign.lease_id, 0))
        found = outcomes if fatal is None else [fatal] * len(outcomes)
        self._after(seconds, lambda: self._end(assign.lease_id, found) if not self.is_gone else None)

    def _end(self, lease_id: str, outcomes: list[Outcome]) -> None:
        if lease_id not in self._leases:
            return
        seconds = self._running.get(lease_id, 0.0)
        for item, outcome in enumerate(outcomes):
            named = (self.session_id, lease_id, item)
            if outcome.failure is not None:
                self._report(messages.AttemptFailed(*named, outcome.failure))
            else:
                self._report(messages.AttemptSucceeded(*named, outcome.outputs, seconds, outcome.split))
        for follower in self._followers.pop(lease_id, ()):
            if follower not in self._leases:
                continue
            if outcomes[-1].failure is None:
                self._upstream[follower] = outcomes[-1].outputs
            else:
                self._give_back(follower)
        self._forget(lease_id)

    def _give_back(self, lease_id: str) -> None:
        self._report(messages.LeaseReturned(self.session_id, lease_id, ""))
        for follower in self._followers.pop(lease_id, ()):
            if follower in self._leases:
                self._give_back(follower)
        self._forget(lease_id)

    def _forget(self, lease_id: str) -> None:
        assign = self._leases.pop(lease_id, None)
        if assign is None:
            return
        self._upstream.pop(lease_id, None)
        slot = self._slots[assign.slot]
        slot.remove(lease_id)
        if self._running.pop(lease_id, None) is not None and slot:
            self._start(self._leases[slot[0]])

    def _report(self, report: Any) -> None:
        if self.is_gone:
            return
        if self.is_connected:
            self._sequence += 1
            self._unacknowledged[self._sequence] = report
            self._say(report)
            self._say(messages.ReportsRead(self.session_id, self._sequence))
        else:
            self._outbox.append(report)


def _is_known(binding: Binding) -> bool:
    match binding:
        case Payload():
            return True
        case BindingList(items):
            return all(map(_is_known, items))
        case BindingMap(entries):
            return all(map(_is_known, entries.values()))
    return False
