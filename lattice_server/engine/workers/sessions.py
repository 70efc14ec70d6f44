"""Owns the workers' sessions, and the time of each worker's last message.

Rule: an outbox belongs to a connection; a session may have several connections, one after the other.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import count

from lattice_server.core.messages import (
    AnswerQuestion,
    CloseSession,
    DrainWorker,
    DropArtifact,
    ForgetSession,
    WelcomeWorker,
    WorkerEffect,
)
from lattice_server.core.model import Artifact
from lattice_server.engine.stores.artifact_store import HEAD
from lattice_server.engine.workers.outbox import Connection, Session

log = logging.getLogger(__name__)

Detached = Callable[[str, float], None]


class Sessions:
    """All connections and sessions; lives on the main thread.

    `on_detached` is called with each session that loses its connection, and the silence of that connection. `unneeded`
    returns those of some artifacts that have no reference. A connection that is silent for more than `silence_limit_s`
    is aborted.
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
        """Number a connection that said hello, and close the worker's older one."""
        connection.greeting = next(self._numbers)
        self._unwelcome[connection.greeting] = connection
        older = self._greeting.get(connection.worker_id)
        self._greeting[connection.worker_id] = connection
        if older is not None:
            older.close()

    def perform(self, effect: WorkerEffect) -> None:
        """Route an effect to its worker's connection; a worker that resumes gets the effects that it missed."""
        if isinstance(effect, WelcomeWorker):
            self._welcome(effect)
        elif isinstance(effect, ForgetSession):
            session = self._sessions.pop(effect.session_id, None)
            if session is not None:
                level = logging.INFO if session.is_draining else logging.WARNING
                log.log(level, "the worker is lost", extra=session.connection.named)
            if session is not None and session.is_connected:
                # A worker that is still alive learns that the session is lost when it connects again.
                session.connection.close()
        elif session := self._sessions.get(effect.session_id):
            session.connection.send(session.number(effect) if isinstance(effect, AnswerQuestion) else effect)
            if isinstance(effect, DrainWorker):
                session.is_draining = True
            elif isinstance(effect, CloseSession):
                del self._sessions[effect.session_id]

    def leave(self, connection: Connection) -> None:
        """Forget a connection that ended."""
        # This thread may have been too busy to read: a worker that disconnected meanwhile needs time to reconnect.
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
                log.info("the stream broke; the worker may reconnect", extra=connection.named)
                self.on_detached(session.session_id, silent_s)

    def acknowledge(self, session_id: str, sequence: int) -> None:
        """Tell a worker that it may forget its reports up to a number."""
        if (session := self._sessions.get(session_id)) is not None:
            session.connection.acknowledgement.add(sequence)

    async def watch(self, interval_s: float) -> None:
        """Send heartbeats on every connection, and abort silent ones; for ever."""
        looked_at = time.monotonic()
        while True:
            # Heartbeats are for times without events, so only a timer can wake this.
            await asyncio.sleep(interval_s)
            now = time.monotonic()
            late_s = now - looked_at - interval_s
            looked_at = now
            for connection in list(self._greeting.values()):
                if late_s > interval_s:
                    # This thread was busy, and messages that arrived meanwhile are still to be read.
                    connection.heard_at = min(now, connection.heard_at + late_s)
                if connection.session is None:
                    continue  # A worker sends nothing before it is welcomed.
                if now - connection.heard_at <= self._silence_limit_s:
                    connection.beat()
                else:
                    self._forget(connection, now - connection.heard_at)
                    connection.abort()

    def heard_at(self, session_id: str) -> float:
        """Return the time of a session's last message, in seconds since the epoch; zero when unknown."""
        session = self._sessions.get(session_id)
        return time.time() - (time.monotonic() - session.connection.heard_at) if session else 0.0

    def all(self) -> Collection[Session]:
        """Return all sessions."""
        return self._sessions.values()

    def of_node(self, node_id: str) -> Session | None:
        """Return the session that serves a node."""
        return next((s for s in self._sessions.values() if s.connection.node_id == node_id), None)

    def owner_of(self, node_id: str, worker_id: str) -> str | None:
        """Return the subject whose worker serves a node, or has an id; None when neither is known."""
        known = [*self._greeting.values(), *(session.connection for session in self._sessions.values())]
        return next((c.subject for c in known if c.node_id == node_id or c.worker_id == worker_id), None)

    def drop_artifact(self, artifact: Artifact) -> None:
        """Tell every worker that may have an artifact, or a copy of it, that its last reference was released.

        A worker that misses the message lists its artifacts when it reconnects.
        """
        for session in self._sessions.values():
            if not session.connection.shares_store or artifact.node_id != HEAD:
                session.connection.send(DropArtifact(session.session_id, artifact.artifact_id))

    def close_all(self) -> None:
        """Close every session, because the server stops."""
        for session_id in list(self._sessions):
            self.perform(CloseSession(session_id, "SHUTDOWN", "the server stops"))

    def _welcome(self, effect: WelcomeWorker) -> None:
        # The connection whose hello this answers: a newer one of the same worker gets a welcome of its own.
        connection = self._unwelcome.pop(effect.greeting, None)
        if connection is None:
            # It disconnected before its welcome, but the scheduler counts it as connected, unless a newer one resumed.
            if effect.worker_id not in self._greeting:
                self.on_detached(effect.session_id, 0.0)
            return
        connection.heard_at = time.monotonic()
        session = self._sessions.get(effect.session_id)
        if session is None:
            session = Session(effect.session_id, connection)
            self._sessions[effect.session_id] = session
        session.connection = connection
        session.is_connected = True
        connection.session = session
        log.info("the worker reconnected" if effect.resumed else "the worker joined", extra=connection.named)
        # The effects of older reports are done by now, because the scheduler took them before the hello.
        is_continued = effect.resumed or effect.adopted_lease_ids
        listed = connection.stored if is_continued else connection.stored + connection.reported
        connection.stored = connection.reported = ()
        connection.send(replace(effect, drop_artifact_ids=tuple(self.unneeded(listed))))
        for answer in session.unacknowledged():
            connection.send(answer)
