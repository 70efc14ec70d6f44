"""Owns the workers' sessions, and when each worker was last heard.

Rule: an outbox belongs to a connection; a session may outlive several.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count

from lattice_server.core.messages import (
    AnswerQuestion,
    CloseSession,
    DropArtifact,
    ForgetSession,
    WelcomeWorker,
    WorkerEffect,
)
from lattice_server.core.model import Artifact
from lattice_server.engine.artifact_store import HEAD
from lattice_server.engine.outbox import Connection, Session

log = logging.getLogger(__name__)

Detached = Callable[[str, float], None]


class Sessions:
    """All connections and sessions; lives on the main thread.

    `on_detached` is told each session that is left without a connection, and how long that had been silent. `unneeded`
    says which of some artifacts nobody needs. Whoever is silent for more than `silence_limit_s` is given up.
    """

    def __init__(self, silence_limit_s: float) -> None:
        self._silence_limit_s = silence_limit_s
        self.on_detached: Detached = lambda session_id, silent_s: None
        self.unneeded: Callable[[Iterable[str]], list[str]] = lambda artifact_ids: []
        self._numbers = count(1)
        self._unwelcome: dict[int, Connection] = {}
        self._greeting: dict[str, Connection] = {}
        self._sessions: dict[str, Session] = {}

    def greet(self, connection: Connection) -> None:
        """Remember who said hello, and number it; the newest connection of a worker counts."""
        connection.greeting = next(self._numbers)
        self._unwelcome[connection.greeting] = connection
        older = self._greeting.get(connection.worker_id)
        self._greeting[connection.worker_id] = connection
        if older is not None:
            older.close()

    def perform(self, effect: WorkerEffect) -> None:
        """Route an effect to its worker's connection. What a detached worker misses is sent again when it resumes."""
        if isinstance(effect, WelcomeWorker):
            self._welcome(effect)
        elif isinstance(effect, ForgetSession):
            session = self._sessions.pop(effect.session_id, None)
            if session is not None:
                log.info("the worker is lost", extra=session.connection.named)
            if session is not None and session.is_connected:
                # Whoever is there all the same learns by dialling again that the session is lost.
                session.connection.close()
        elif session := self._sessions.get(effect.session_id):
            session.connection.send(session.number(effect) if isinstance(effect, AnswerQuestion) else effect)
            if isinstance(effect, CloseSession):
                del self._sessions[effect.session_id]

    def leave(self, connection: Connection) -> None:
        """Forget a connection that ended."""
        # This thread may have been too busy to listen: whoever hung up meanwhile needs time to come back.
        self._forget(connection, min(time.monotonic() - connection.heard_at, self._silence_limit_s))

    def _forget(self, connection: Connection, silent_s: float) -> None:
        self._unwelcome.pop(connection.greeting, None)
        for call in connection.on_end:
            call()
        if self._greeting.get(connection.worker_id) is not connection:
            return  # a newer connection of the worker decides
        del self._greeting[connection.worker_id]
        for session in self._sessions.values():
            if session.connection.worker_id == connection.worker_id:
                session.is_connected = False
                log.info("the stream broke; the worker may come back", extra=connection.named)
                self.on_detached(session.session_id, silent_s)

    async def watch(self, interval_s: float) -> None:
        """Give signs of life on every connection, and give up those without any; for ever."""
        looked_at = time.monotonic()
        while True:
            # Signs of life are for when nothing else happens: nothing could wake this.
            await asyncio.sleep(interval_s)
            now = time.monotonic()
            late_s = now - looked_at - interval_s
            looked_at = now
            for connection in list(self._greeting.values()):
                if late_s > interval_s:
                    # This thread was busy, and what came meanwhile is still to be read.
                    connection.heard_at = min(now, connection.heard_at + late_s)
                if connection.session is None:
                    continue  # Whoever is not welcome yet has nothing to say.
                if now - connection.heard_at <= self._silence_limit_s:
                    connection.beat()
                else:
                    self._forget(connection, now - connection.heard_at)
                    connection.abort()

    def heard_at(self, session_id: str) -> float:
        """Return when a session was last heard, in seconds since the epoch; zero when unknown."""
        session = self._sessions.get(session_id)
        return time.time() - (time.monotonic() - session.connection.heard_at) if session else 0.0

    def of_node(self, node_id: str) -> Session | None:
        """Return the session that serves a node."""
        return next((s for s in self._sessions.values() if s.connection.node_id == node_id), None)

    def owner_of(self, node_id: str, worker_id: str) -> str | None:
        """Return the subject whose worker serves a node, or has an id; None when neither is known."""
        known = [*self._greeting.values(), *(session.connection for session in self._sessions.values())]
        return next((c.subject for c in known if c.node_id == node_id or c.worker_id == worker_id), None)

    def drop_artifact(self, artifact: Artifact) -> None:
        """Tell every worker that may have an artifact, or a copy of it, that nobody needs it any more.

        One that does not hear it says what it has when it is back.
        """
        for session in self._sessions.values():
            if not session.connection.shares_store or artifact.node_id != HEAD:
                session.connection.send(DropArtifact(session.session_id, artifact.artifact_id))

    def close_all(self) -> None:
        """Tell every worker that the server stops."""
        for session_id in list(self._sessions):
            self.perform(CloseSession(session_id, "SHUTDOWN", "the server stops"))

    def _welcome(self, effect: WelcomeWorker) -> None:
        # The connection whose hello this answers: another one of the same worker has a welcome of its own coming.
        connection = self._unwelcome.pop(effect.greeting, None)
        if connection is None:
            # It hung up before it was welcome, and the scheduler takes it for connected; or for resumed by a newer one.
            if effect.worker_id not in self._greeting:
                self.on_detached(effect.session_id, 0.0)
            return
        connection.heard_at = time.monotonic()
        session = self._sessions.get(effect.session_id) if effect.resumed else None
        if session is None:
            session = Session(effect.session_id, connection)
            self._sessions[effect.session_id] = session
        session.connection = connection
        session.is_connected = True
        connection.session = session
        log.info("the worker is back" if effect.resumed else "the worker joined", extra=connection.named)
        # All that older reports led to has been done by now: the scheduler answered them before the hello.
        listed = connection.stored if effect.resumed else connection.stored + connection.reported
        connection.stored = connection.reported = ()
        connection.send(replace(effect, drop_artifact_ids=tuple(self.unneeded(listed))))
        for answer in session.unacknowledged():
            connection.send(answer)
