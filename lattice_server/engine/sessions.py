"""Owns the connected workers' outboxes. Rule: an outbox belongs to a connection; a session may outlive several."""

import asyncio
import time
from collections.abc import Callable

from lattice_server.core.messages import CloseSession, WelcomeWorker, WorkerEffect

# An acknowledgement only lets the worker forget; on its own it would cost as much as an assignment.
ACK_AFTER_MESSAGES = 16


class Connection:
    """One stream of a worker: what is to be sent on it, and when it was last heard."""

    def __init__(self, worker_id: str, node_id: str = "") -> None:
        self.worker_id = worker_id
        self.node_id = node_id
        self.session: Session | None = None
        self.heard_at = time.time()
        self.is_closed = False
        self._outbox: list[WorkerEffect] = []
        self._ready = asyncio.Event()
        self.ack_sequence = 0
        self._unacknowledged = 0

    def send(self, effect: WorkerEffect) -> None:
        """Queue an effect."""
        self._outbox.append(effect)
        self._ready.set()

    def acknowledge(self, sequence: int) -> None:
        """Have reports up to `sequence` acknowledged with the next message, or by one of its own when many wait."""
        self.ack_sequence = sequence
        self._unacknowledged += 1
        if self._unacknowledged >= ACK_AFTER_MESSAGES:
            self._ready.set()

    def close(self) -> None:
        """End the stream once the outbox is sent."""
        self.is_closed = True
        self._ready.set()

    async def next_effects(self) -> list[WorkerEffect]:
        """Wait until there is something to send, or the connection closed; return all effects there are."""
        await self._ready.wait()
        self._ready.clear()
        self._unacknowledged = 0
        effects, self._outbox = self._outbox, []
        return effects


class Session:
    """One life of a worker, over any number of connections."""

    def __init__(self, session_id: str, connection: Connection) -> None:
        self.session_id = session_id
        self.connection = connection
        self.last_sequence = 0
        self.sent_digests: set[str] = set()


class Sessions:
    """All connections and sessions; lives on the main thread."""

    def __init__(self) -> None:
        self._greeting: dict[str, Connection] = {}
        self._sessions: dict[str, Session] = {}

    def greet(self, connection: Connection) -> None:
        """Remember who said hello; the newest connection of a worker counts."""
        older = self._greeting.get(connection.worker_id)
        self._greeting[connection.worker_id] = connection
        if older is not None:
            older.close()

    def perform(self, effect: WorkerEffect) -> None:
        """Route an effect to its worker's connection. What a detached worker misses is sent again when it resumes."""
        if isinstance(effect, WelcomeWorker):
            self._welcome(effect)
        elif session := self._sessions.get(effect.session_id):
            session.connection.send(effect)
            if isinstance(effect, CloseSession):
                del self._sessions[effect.session_id]

    def leave(self, connection: Connection, detached: Callable[[str], None]) -> None:
        """Forget a connection that ended; `detached` is told the session it leaves without one."""
        if self._greeting.get(connection.worker_id) is not connection:
            return  # a newer connection of the worker decides
        del self._greeting[connection.worker_id]
        for session in self._sessions.values():
            if session.connection.worker_id == connection.worker_id:
                detached(session.session_id)

    def heard_at(self, session_id: str) -> float:
        """Return when a session was last heard, in seconds since the epoch; zero when unknown."""
        session = self._sessions.get(session_id)
        return session.connection.heard_at if session else 0.0

    def close_all(self) -> None:
        """Tell every worker that the server stops."""
        for session_id in list(self._sessions):
            self.perform(CloseSession(session_id, "SHUTDOWN", "the server stops"))

    def _welcome(self, effect: WelcomeWorker) -> None:
        connection = self._greeting.get(effect.worker_id)
        if connection is None:
            return
        session = self._sessions.get(effect.session_id) if effect.resumed else None
        if session is None:
            session = Session(effect.session_id, connection)
            self._sessions[effect.session_id] = session
        session.connection = connection
        session.sent_digests.clear()
        connection.session = session
        connection.send(effect)
