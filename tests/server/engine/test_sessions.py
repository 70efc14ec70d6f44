"""Connections and sessions: the end of silent connections, and the effects for workers that reconnect."""

import asyncio
import logging
import time
from collections.abc import Callable

import pytest

from lattice_server.core.messages import (
    CloseSession,
    DrainWorker,
    DropArtifact,
    ForgetSession,
    WelcomeWorker,
    WorkerEffect,
)
from lattice_server.core.model import Artifact
from lattice_server.engine.workers.outbox import ACK_AFTER_MESSAGES, Connection
from lattice_server.engine.workers.sessions import Sessions

INTERVAL_S, LIMIT_S = 0.05, 0.2


def connect(sessions: Sessions, resumed: bool = False, shares_store: bool = False) -> Connection:
    """Connect the worker of a node, by default with a store of its own, and welcome it to session `s`."""
    connection = Connection("w", "n", shares_store)
    connection.stored, connection.reported = ("kept", "large"), ("said", "unsaid")
    sessions.greet(connection)
    sessions.perform(WelcomeWorker("w", "s", resumed, (), connection.greeting))
    return connection


def test_a_connection_is_aborted_when_it_falls_silent() -> None:
    async def scenario() -> None:
        sessions, told = Sessions(LIMIT_S), asyncio.Queue[tuple[str, float]]()
        sessions.on_detached = lambda *left: told.put_nowait(left)
        connection, is_aborted = connect(sessions), asyncio.Event()
        connection.abort = is_aborted.set
        watching = asyncio.create_task(sessions.watch(INTERVAL_S))
        session_id, silent_s = await asyncio.wait_for(told.get(), 30)
        assert session_id == "s"
        assert silent_s > LIMIT_S
        await asyncio.wait_for(is_aborted.wait(), 30)
        watching.cancel()

    asyncio.run(scenario())


def test_a_worker_that_disconnects_counts_as_away_since_its_last_message() -> None:
    async def scenario() -> None:
        sessions, told = Sessions(LIMIT_S), list[float]()
        sessions.on_detached = lambda _, silent_s: told.append(silent_s)
        for silent_s in (LIMIT_S / 2, 100 * LIMIT_S):
            connection = connect(sessions)
            connection.heard_at = time.monotonic() - silent_s
            sessions.leave(connection)
        assert told[0] >= LIMIT_S / 2
        assert told[1] == LIMIT_S, "no time is left to come back"

    asyncio.run(scenario())


def test_a_stall_of_this_thread_does_not_count_as_silence() -> None:
    async def scenario() -> None:
        sessions, detached = Sessions(LIMIT_S), list[str]()
        sessions.on_detached = lambda session_id, _: detached.append(session_id)
        connection = connect(sessions)
        watching = asyncio.create_task(sessions.watch(INTERVAL_S))
        await asyncio.sleep(INTERVAL_S / 5)
        time.sleep(5 * LIMIT_S)  # that is the point
        # The watch looks first; messages that came meanwhile are read after it.
        for _ in range(10):
            await asyncio.sleep(0)
        assert detached == []
        connection.heard_at = time.monotonic()
        watching.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize("is_known_to_be_away", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_worker_is_told_of_dropped_artifacts_when_it_reconnects(is_known_to_be_away: bool, resumed: bool) -> None:
    async def scenario() -> None:
        sessions = Sessions(LIMIT_S)
        sessions.unneeded = lambda artifacts: [name for name in artifacts if name in {"large", "unsaid"}]
        away = connect(sessions)
        if is_known_to_be_away:
            sessions.leave(away)
        sessions.drop_artifact(Artifact("large", 1, "n"))
        back = connect(sessions, resumed)
        (welcome,) = await back.next_effects()
        assert isinstance(welcome, WelcomeWorker)
        assert welcome.drop_artifact_ids == (("large",) if resumed else ("large", "unsaid"))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("shares_store", "node_id", "is_told"), [(0, "n", 1), (0, "head", 1), (1, "n", 1), (1, "head", 0)]
)
def test_every_worker_that_may_have_a_copy_is_told_of_a_dropped_artifact(
    shares_store: bool, node_id: str, is_told: bool
) -> None:
    async def scenario() -> None:
        sessions = Sessions(LIMIT_S)
        connection = connect(sessions, shares_store=shares_store)
        await connection.next_effects()
        sessions.drop_artifact(Artifact("large", 1, node_id))
        connection.close()
        assert await connection.next_effects() == [DropArtifact("s", "large")] * is_told

    asyncio.run(scenario())


def test_a_lost_worker_that_is_alive_connects_again() -> None:
    async def scenario() -> None:
        sessions = Sessions(LIMIT_S)
        connection = connect(sessions)
        sessions.perform(ForgetSession("s"))
        assert connection.is_closed

    asyncio.run(scenario())


def test_a_connection_is_not_silent_before_its_welcome() -> None:
    async def scenario() -> None:
        sessions, detached = Sessions(LIMIT_S), list[str]()
        sessions.on_detached = lambda session_id, _: detached.append(session_id)
        connection = Connection("w", "n")
        sessions.greet(connection)
        watching = asyncio.create_task(sessions.watch(INTERVAL_S))
        connection.heard_at -= 100 * LIMIT_S
        await asyncio.sleep(3 * INTERVAL_S)
        sessions.perform(WelcomeWorker("w", "s", False, (), connection.greeting))
        await asyncio.sleep(2 * INTERVAL_S)
        assert detached == []
        watching.cancel()

    asyncio.run(scenario())


def test_an_older_connection_does_not_detach_the_session_that_a_newer_one_resumed() -> None:
    async def scenario() -> None:
        sessions, detached = Sessions(LIMIT_S), list[str]()
        sessions.leave(connect(sessions))
        older = Connection("w", "n")
        sessions.greet(older)
        sessions.leave(older)
        sessions.on_detached = lambda session_id, _: detached.append(session_id)
        newer = Connection("w", "n")
        sessions.greet(newer)
        for connection in (older, newer):
            sessions.perform(WelcomeWorker("w", "s", True, (), connection.greeting))
        assert detached == []
        assert newer.session is not None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("before", "level"),
    [
        ([], "WARNING"),
        ([DrainWorker("s", None)], "INFO"),
        ([WelcomeWorker("w", "s", True, ())], "WARNING"),
        ([DrainWorker("s", 1.0), WelcomeWorker("w", "s", True, ())], "INFO"),
    ],
)
def test_a_lost_worker_is_a_warning_unless_it_was_being_drained(
    before: list[WorkerEffect], level: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        sessions = Sessions(LIMIT_S)
        connect(sessions)
        for effect in before:
            sessions.perform(effect)
        sessions.perform(ForgetSession("s"))

    caplog.set_level(logging.INFO)
    asyncio.run(scenario())
    (lost,) = [record for record in caplog.records if record.message == "the worker is lost"]
    assert (lost.levelname, vars(lost)["node_id"], vars(lost)["worker_id"]) == (level, "n", "w")


@pytest.mark.parametrize("reason", ["DRAINED", "SHUTDOWN", "SUPERSEDED"])
def test_a_worker_whose_session_was_closed_is_not_lost(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        sessions = Sessions(LIMIT_S)
        connect(sessions)
        sessions.perform(CloseSession("s", reason, ""))
        sessions.perform(ForgetSession("s"))

    caplog.set_level(logging.INFO)
    asyncio.run(scenario())
    assert "lost" not in caplog.text


def test_a_lost_session_serves_no_node() -> None:
    async def scenario() -> None:
        sessions = Sessions(LIMIT_S)
        connect(sessions)
        assert sessions.of_node("n") is not None
        sessions.perform(ForgetSession("s"))
        assert sessions.of_node("n") is None

    asyncio.run(scenario())


def test_an_acknowledgement_is_sent_with_the_next_message_or_alone() -> None:
    timers: list[Callable[[], None]] = []

    async def scenario() -> None:
        connection = Connection("w", later=lambda _, call: timers.append(call))
        waiting = asyncio.ensure_future(connection.next_effects())
        connection.acknowledgement.add(1)
        await asyncio.sleep(0)
        assert not waiting.done()
        connection.send(DropArtifact("s", "large"))
        assert await waiting == [DropArtifact("s", "large")]
        assert (connection.acknowledgement.take(), connection.acknowledgement.take()) == (1, 0)
        waiting = asyncio.ensure_future(connection.next_effects())
        connection.acknowledgement.add(2)
        timers.pop()()
        await asyncio.sleep(0)
        assert not waiting.done(), "it came after the timer was set"
        timers.pop()()
        assert await waiting == []
        assert connection.acknowledgement.take() == 2
        assert not timers

    asyncio.run(scenario())


def test_an_acknowledgement_goes_alone_when_many_messages_wait_for_one() -> None:
    async def scenario() -> None:
        connection = Connection("w")
        waiting = asyncio.ensure_future(connection.next_effects())
        for number in range(1, ACK_AFTER_MESSAGES + 1):
            await asyncio.sleep(0)
            assert not waiting.done()
            connection.acknowledgement.add(number)
        assert await waiting == []
        assert connection.acknowledgement.take() == ACK_AFTER_MESSAGES

    asyncio.run(scenario())
