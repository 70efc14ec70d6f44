"""Both sides of the worker protocol on a wire that loses, delays, repeats, reorders, and breaks anywhere.

The head is the scheduler's machine behind the sessions, the worker its leases; only the runner is a fake.
"""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from lattice_server.core import messages
from lattice_server.core.messages import Assign, CancelRequested, TaskCancelled, TaskFailed, TaskReady, TaskSucceeded
from lattice_server.core.model import Failure, FailureKind, Payload
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine.workers.outbox import Connection
from lattice_server.engine.workers.sessions import Sessions
from lattice_worker.session.lease_machine import LeaseMachine
from tests.examples import share
from tests.server.core.scenes import node, ready

SILENCE_LIMIT_S = 2.0
TTL_S = 3.0
VALUE = {"out": Payload("application/json", "1")}
STOPPED = Failure(FailureKind.CANCELLED, "the attempt was cancelled")
ENDS = (TaskSucceeded, TaskFailed, TaskCancelled)


class Attempts:
    """A fake runner of leases: a lease ends when a test says how."""

    def __init__(self) -> None:
        self.running: dict[str, Assign] = {}
        self.started: list[str] = []
        self.fed: set[str] = set()
        self.leases: LeaseMachine[Assign, Any, Any]

    def start(self, work: Assign) -> None:
        assert not work.after_lease_id or work.lease_id in self.fed, "a lease started without its inputs"
        self.running[work.lease_id] = work
        self.started.append(work.lease_id)

    def send_ahead(self, work: Assign, running: str) -> bool:
        return False

    def has_ahead(self, lease_id: str) -> bool:
        return False

    def take_back(self, lease_id: str) -> bool:
        return True

    def feed(self, lease_id: str, outputs: Any) -> None:
        self.fed.add(lease_id)

    def stop(self, lease_id: str, kind: str, message: str) -> None:
        self.end(lease_id, messages.AttemptFailed("", lease_id, 0, STOPPED))

    def cancelled(self, work: Assign) -> None:
        self.leases.report(work.lease_id, messages.AttemptFailed("", work.lease_id, 0, STOPPED))
        self.leases.ended(work.lease_id, None)

    def end(self, lease_id: str, report: Any) -> None:
        if self.running.pop(lease_id, None) is not None and self.leases.holds(lease_id):
            self.leases.report(lease_id, report)
            self.leases.ended(lease_id, VALUE if isinstance(report, messages.AttemptSucceeded) else None)


class Stream:
    """One stream: the messages in flight, in both directions."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], None]] = []
        self.connection = Connection("worker-of-n", "n", later=lambda _, call: self.timers.append(call))
        self.to_head: list[Any] = []
        self.to_worker: list[Any] = []
        self.has_greeted = False  # Only the first message of a stream can be a hello.


class Protocol:
    """A head, a worker, and every stream there was between them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.machine = Scheduler("e", TTL_S)
        self.sessions = Sessions(SILENCE_LIMIT_S)
        self.sessions.on_detached = lambda session_id, _: self.left.append(session_id)
        self.left: list[str] = []
        self.attempts = Attempts()
        self.leases: LeaseMachine[Assign, Any, Any] = LeaseMachine(
            self.attempts, self.say, lambda lease_id: messages.LeaseReturned("", lease_id, "")
        )
        self.attempts.leases = self.leases
        self.streams: list[Stream] = []
        self.stream: Stream | None = None  # As the worker sees it.
        self.is_welcome = False
        self.ends: dict[str, list[str]] = {}

    # The head.

    def tell(self, *events: Any) -> None:
        """Let the scheduler handle events, and send its effects."""
        left, self.left = self.left, []
        for effect in self.machine.handle_all([*map(messages.WorkerDetached, left), *events], self.now):
            if isinstance(effect, ENDS):
                self.ends[effect.task_id].append(type(effect).__name__)
            elif isinstance(effect, messages.WorkerEffect):
                self.sessions.perform(effect)
        self.machine.check()
        for stream in self.streams:
            connection = stream.connection
            if connection._ready.is_set():  # the calls that the stream's loop would make later
                stream.to_worker += at_once(connection.next_effects())
                if sequence := connection.acknowledgement.take():
                    stream.to_worker.append(sequence)

    def pass_time(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds
        for stream in self.streams:
            due, stream.timers[:] = list(stream.timers), []
            for call in due:
                call()
        self.tell()

    def hear(self, stream: Stream, message: Any) -> None:
        """Process the messages of the worker."""
        session = stream.connection.session
        match message:
            case messages.WorkerHello() if not stream.has_greeted:
                stream.has_greeted = True
                self.sessions.greet(stream.connection)
                self.tell(replace(message, greeting=stream.connection.greeting))
            case ("reports", reports) if session is not None:
                news = [report for number, report in reports if session.is_news(number)]
                stream.connection.acknowledgement.add(session.last_sequence)
                self.tell(*[of_session(report, session.session_id) for report in news])
            case ("heartbeat", held, received) if session is not None:
                self.tell(messages.WorkerHeartbeat(session.session_id, frozenset(held), received))

    def leave(self, stream: Stream) -> None:
        """Learn that a stream is over."""
        self.streams.remove(stream)
        self.sessions.leave(stream.connection)
        self.tell()

    # The worker.

    def dial(self) -> None:
        """Open a new stream; the worker gives the old one up."""
        self.stream = Stream()
        self.streams.append(self.stream)
        self.is_welcome = False
        leases = self.leases
        greeting = node("n", 2.0, session_id=leases.session_id, held_lease_ids=tuple(leases.held()))
        self.stream.to_head.append(greeting)

    def say(self, sequence: int, report: Any) -> None:
        """Send a report; a report without a session is sent after the next welcome."""
        if self.stream is not None and self.is_welcome:
            self.stream.to_head.append(("reports", [(sequence, report)]))

    def beat(self) -> None:
        """Send a heartbeat."""
        if self.stream is not None and self.is_welcome:
            if self.leases.reports.overdue():
                self.say_again()
            self.stream.to_head.append(("heartbeat", self.leases.held(), self.leases.received))

    def say_again(self) -> None:
        """Send all that is not acknowledged."""
        assert self.stream is not None
        outbox = [(sequence, report) for sequence, _, report in self.leases.reports._reports]
        self.stream.to_head.append(("reports", outbox))

    def take(self, message: Any) -> None:
        """Process the messages of the server on the current stream."""
        if isinstance(message, messages.WelcomeWorker):
            self.is_welcome = True
            if not message.resumed and message.session_id != self.leases.session_id:
                self.attempts.running.clear()
                self.attempts.fed.clear()
            self.leases.welcome(message.session_id, message.resumed, message.drop_lease_ids)
            self.say_again()
        elif self.is_welcome:
            match message:
                case Assign():
                    named = (message.lease_id, message.slot, message.after_lease_id, message.sequence)
                    self.leases.assign(*named, message)
                case messages.StopLease():
                    self.leases.stop(message.lease_id)
                case messages.RevokeLease():
                    self.leases.revoke(message.lease_id)
                case int():
                    self.leases.reports.acknowledge(message)

    def deliver(self, queue: list[Any], index: int, stream: Stream, *, again: bool = False) -> None:
        """Let something arrive."""
        message = queue[index] if again else queue.pop(index)
        if queue is stream.to_head:
            self.hear(stream, message)
        elif stream is self.stream:
            self.take(message)


def of_session(report: Any, session_id: str) -> Any:
    """Return a report as one of a session."""
    return type(report)(session_id, *[getattr(report, name) for name in report.__dataclass_fields__][1:])


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class Wire(RuleBasedStateMachine):
    """Anything may happen on the wire; when it calms down, every task has ended, once."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Protocol()
        self.both.dial()
        self.number = 0
        self.after: dict[str, str] = {}

    def queues(self) -> list[tuple[Stream, list[Any]]]:
        return [
            (stream, queue) for stream in self.both.streams for queue in (stream.to_head, stream.to_worker) if queue
        ]

    @rule(chain=st.integers(1, 3))
    def submit(self, chain: int) -> None:
        events: list[TaskReady] = []
        for link in range(chain):
            self.number += 1
            name = f"t{self.number}"
            self.both.ends[name] = []
            before = f"t{self.number - 1}" if link else ""
            self.after[name] = before
            events.append(ready(name, after=before))
        self.both.tell(*events)

    @precondition(lambda self: self.both.attempts.running)
    @rule(data=st.data(), is_well=st.booleans())
    def finish(self, data: st.DataObject, is_well: bool) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.both.attempts.running)))
        failure = Failure(FailureKind.USER_ERROR, "bad")
        good = messages.AttemptSucceeded("", lease_id, 0, VALUE, 0.001)
        self.both.attempts.end(lease_id, good if is_well else messages.AttemptFailed("", lease_id, 0, failure))

    @precondition(lambda self: self.both.ends)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.both.ends)))
        self.both.tell(CancelRequested("r", (task_id,), STOPPED))

    @precondition(lambda self: self.queues())
    @rule(data=st.data(), many=st.integers(1, 4))
    def deliver_in_order(self, data: st.DataObject, many: int) -> None:
        stream, queue = data.draw(st.sampled_from(self.queues()))
        for _ in range(min(many, len(queue))):
            self.both.deliver(queue, 0, stream)

    @precondition(lambda self: self.queues())
    @rule(data=st.data(), how=st.sampled_from(["drop", "repeat", "reorder"]))
    def disturb(self, data: st.DataObject, how: str) -> None:
        stream, queue = data.draw(st.sampled_from(self.queues()))
        index = data.draw(st.integers(0, len(queue) - 1))
        if how == "drop":
            del queue[index]
        else:
            self.both.deliver(queue, index, stream, again=how == "repeat")

    @rule()
    def dial(self) -> None:
        self.both.dial()

    @precondition(lambda self: self.both.streams)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.both.leave(data.draw(st.sampled_from(self.both.streams)))

    @rule()
    def beat(self) -> None:
        self.both.beat()

    @rule(seconds=st.sampled_from([0.01, 0.5, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.both.pass_time(seconds)

    def teardown(self) -> None:
        both = self.both
        for stream in list(both.streams):
            both.leave(stream)
        both.dial()
        for _ in range(60 + 4 * self.number):
            both.pass_time(TTL_S / 6)
            for stream, queue in self.queues():
                while queue:
                    both.deliver(queue, 0, stream)
            for lease_id in sorted(both.attempts.running):
                both.attempts.end(lease_id, messages.AttemptSucceeded("", lease_id, 0, VALUE, 0.001))
            both.beat()
            if not both.machine.tasks:
                break
        assert not both.machine.tasks, "a task was lost"
        assert not both.machine.leases, "the ledger holds what nobody runs"
        for name, ends in both.ends.items():
            # What follows a task that did not succeed is dropped without a report: its run knows.
            is_dropped = both.ends.get(self.after[name], ["TaskSucceeded"]) != ["TaskSucceeded"]
            assert len(ends) == 1 or (is_dropped and not ends), both.ends
        started = both.attempts.started
        assert len(started) == len(set(started)), "a lease ran twice"


TestWire = Wire.TestCase
TestWire.settings = settings(max_examples=share(2000), stateful_step_count=60, deadline=None)
