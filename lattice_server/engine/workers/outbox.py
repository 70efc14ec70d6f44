"""Owns the outbox of each worker's stream: the effects to send, the acknowledgement that is due, the heartbeat.

Rule: an acknowledgement never costs a message of its own while another message is about to go out.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from lattice_server.core.messages import AnswerQuestion, ToSession, WelcomeWorker
from lattice_server.core.model import Function, Isolation
from lattice_server.engine.stores.code_store import SentCode
from lattice_server.engine.workers.clock_offset import WorkerClock

# An acknowledgement only lets the worker forget. Alone, it would cost both sides as much as an assignment does.
ACK_AFTER_MESSAGES = 32
ACK_AFTER_S = 0.05  # At least; at most twice as long.

CallLater = Callable[[float, Callable[[], None]], object]


def call_later(delay_s: float, call: Callable[[], None]) -> None:
    """Have the running event loop call something later."""
    asyncio.get_running_loop().call_later(delay_s, call)


class Acknowledgement:
    """Which reports are still to be acknowledged, and when that may no longer wait for another message.

    `send` is called when it must go out now.
    """

    def __init__(self, send: Callable[[], None], later: CallLater) -> None:
        self._send = send
        self._later = later
        self._sequence = 0
        self._messages = 0
        self._taken = 0
        self._taken_before = 0
        self._is_timed = False

    def add(self, sequence: int) -> None:
        """Note that one more message has brought reports, which can be acknowledged up to `sequence`."""
        self._sequence = sequence
        self._messages += 1
        if self._messages >= ACK_AFTER_MESSAGES:
            self._send()
        elif not self._is_timed:
            self._time()

    def take(self) -> int:
        """Return the number to acknowledge, which counts as sent; zero when nothing is due."""
        if not self._messages:
            return 0
        self._messages = 0
        self._taken += 1
        return self._sequence

    def _time(self) -> None:
        self._is_timed, self._taken_before = True, self._taken
        self._later(ACK_AFTER_S, self._look)

    def _look(self) -> None:
        # One timer serves all messages that come while it runs: a busy stream would make and cancel one for each.
        self._is_timed = False
        if not self._messages:
            return
        if self._taken == self._taken_before:
            self._send()
        else:
            self._time()


class Connection:
    """One stream of a worker: its outbox, and the time of its last message.

    `shares_store` tells that the worker uses the head's own store of large values. `stored` and `reported` are the
    artifacts the worker had when it said hello, the latter named by reports the server may not have. `subject` is the
    owner of the worker's token. `abort` ends the stream of a silent worker without sending: a message could block.
    """

    def __init__(
        self, worker_id: str, node_id: str = "", shares_store: bool = True, later: CallLater = call_later
    ) -> None:
        self.worker_id = worker_id
        self.node_id = node_id
        self.shares_store = shares_store
        self.subject = ""
        self.session: Session | None = None
        self.stored: tuple[str, ...] = ()
        self.reported: tuple[str, ...] = ()
        self.greeting = 0
        self.heard_at = time.monotonic()
        self.is_closed = False
        self.is_beat_due = False
        self.abort: Callable[[], object] = lambda: None
        self.on_end: list[Callable[[], None]] = []
        self.sent = SentCode()
        self._wanted: list[Function] = []
        self._outbox: list[WelcomeWorker | ToSession] = []
        self._ready = asyncio.Event()
        self.acknowledgement = Acknowledgement(self._ready.set, later)
        self.clock = WorkerClock()
        self._has_sent = False

    @property
    def named(self) -> dict[str, str]:
        """The ids that a log line about the stream has."""
        session_id = "" if self.session is None else self.session.session_id
        return {"worker_id": self.worker_id, "node_id": self.node_id, "session_id": session_id}

    def send(self, effect: WelcomeWorker | ToSession) -> None:
        """Queue an effect."""
        self._outbox.append(effect)
        self._ready.set()

    def send_code(self, function: Function) -> None:
        """Queue a function that the worker does not have."""
        self.sent.discard(function.digest)
        self._wanted.append(function)
        self._ready.set()

    def take_wanted(self) -> list[Function]:
        """Return the functions that are queued, which count as sent."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def close(self) -> None:
        """End the stream once the outbox is sent."""
        self.is_closed = True
        self._ready.set()

    def beat(self) -> None:
        """Have a heartbeat sent, if nothing was sent since the last one."""
        if not self._has_sent:
            self.is_beat_due = True
            self._ready.set()
        self._has_sent = False

    async def next_effects(self) -> list[WelcomeWorker | ToSession]:
        """Wait until there is something to send, or the connection closed; return all queued effects."""
        await self._ready.wait()
        self._ready.clear()
        self._has_sent = True
        effects, self._outbox = self._outbox, []
        return effects


class Session:
    """One life of a worker, over any number of connections."""

    def __init__(self, session_id: str, connection: Connection) -> None:
        self.session_id = session_id
        self.connection = connection
        self.is_connected = True
        # A worker that is being drained may end at any time, which is no fault.
        self.is_draining = False
        self.last_sequence = 0
        # How many of the worker's processes are busy and idle, by level of isolation; for metrics.
        self.runners: dict[Isolation, tuple[int, int]] = {}
        self._answers: deque[AnswerQuestion] = deque()
        self._last_answer = 0

    def is_news(self, sequence: int) -> bool:
        """Whether a report is the next one.

        Others are repetitions, or come after a lost one. The worker repeats reports that are not acknowledged.
        """
        if sequence != self.last_sequence + 1:
            return False
        self.last_sequence = sequence
        return True

    def number(self, answer: AnswerQuestion) -> AnswerQuestion:
        """Return an answer with its number, and keep it until the worker acknowledges it."""
        self._last_answer += 1
        numbered = replace(answer, sequence=self._last_answer)
        self._answers.append(numbered)
        return numbered

    def acknowledge(self, sequence: int) -> None:
        """Forget the answers up to a number."""
        while self._answers and self._answers[0].sequence <= sequence:
            self._answers.popleft()

    def unacknowledged(self) -> list[AnswerQuestion]:
        """Return the answers that the worker may not have."""
        return list(self._answers)
