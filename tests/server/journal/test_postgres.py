"""What only the journal in PostgreSQL does: its lock, its versions, and its content after either side was killed."""

import json
import signal
import time
from pathlib import Path
from urllib.parse import urlencode
from uuid import uuid4

import psycopg
import pytest

from lattice_server.engine.recording.journal_port import (
    Journal,
    JournalBrokenError,
    JournalError,
    JournalLockedError,
    JournalVersionError,
)
from lattice_server.journal.postgres import PostgresSettings, open_postgres
from tests.server.journal.crashing import check
from tests.server.journal.listening import Listening, accepted, event, store, whole
from tests.server.journal.postgres_server import PostgresServer
from tests.server.journal.test_commands import lattice, real
from tests.server.journal.test_crashes import died, start


@pytest.fixture
def settings(postgres_server: PostgresServer) -> PostgresSettings:
    """A schema of the test's own."""
    return PostgresSettings(postgres_server.database, f"own_{uuid4().hex}")


def reopened(settings: PostgresSettings, listening: Listening) -> Journal:
    """Open a journal whose last process was killed, which the database may not have noticed yet."""
    deadline = time.monotonic() + 30.0
    while True:
        try:
            return open_postgres(listening, settings)
        except JournalLockedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_journal_is_refused_while_another_server_has_it(settings: PostgresSettings) -> None:
    journal = open_postgres(Listening(), settings)
    with pytest.raises(JournalLockedError, match="another server"):
        open_postgres(Listening(), settings)
    other = open_postgres(Listening(), PostgresSettings(settings.database, f"other_{uuid4().hex}"))
    other.close()
    journal.close()
    reopened(settings, Listening()).close()


def test_journal_of_a_newer_server_is_refused(settings: PostgresSettings) -> None:
    open_postgres(Listening(), settings).close()
    with psycopg.connect(settings.database, autocommit=True) as connection:
        connection.execute(f"UPDATE {settings.schema}.meta SET value = 99 WHERE key = 'version'".encode())
    with pytest.raises(JournalVersionError, match="version 99"):
        reopened(settings, Listening())


def test_schema_that_is_no_journal_is_refused(settings: PostgresSettings) -> None:
    with psycopg.connect(settings.database, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {settings.schema}".encode())
        connection.execute(f"CREATE TABLE {settings.schema}.other (x INTEGER)".encode())
    with pytest.raises(JournalVersionError, match="no journal"):
        open_postgres(Listening(), settings)


def test_database_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        open_postgres(Listening(), PostgresSettings(f"host={tmp_path} user=lattice dbname=postgres"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["commit.before_commit", "commit.after_commit", "commit.after_acknowledge", "chores.before_delete"]
)
def test_nothing_acknowledged_is_lost_when_killed_at(settings: PostgresSettings, point: str, tmp_path: Path) -> None:
    place = f"{settings.database}|{settings.schema}"
    # The first ones are those of the opening.
    assert died(start(tmp_path, 1, f"{point}=kill@20", place=place)) == -signal.SIGKILL
    listening = Listening()
    journal = reopened(settings, listening)
    assert check(tmp_path, journal) > 0
    journal.close()
    assert listening.error is None


def test_nothing_acknowledged_is_lost_when_the_database_is_killed(
    settings: PostgresSettings, postgres_server: PostgresServer
) -> None:
    listening = Listening()
    journal = open_postgres(listening, settings)
    store(journal, listening, *whole(1, events=20), accepted(2), event(2, 1))
    postgres_server.stop()
    try:
        with pytest.raises(JournalBrokenError):
            listening.wait(journal.append([event(2, 2)]))
    finally:
        postgres_server.start()
    journal.close()
    journal = reopened(settings, listening)
    with journal.reader() as reader:
        assert [run.run for run in reader.live_runs()] == [2]
        assert len(list(reader.events(1))) == 20
        assert [item.sequence for item in reader.events(2)] in ([1], [1, 2])
    journal.close()


def test_commands_read_a_journal_that_no_server_has(postgres_server: PostgresServer) -> None:
    # The commands read the schema of servers, so this test has a database of its own.
    name = f"own_{uuid4().hex}"
    with psycopg.connect(postgres_server.database, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    parts = psycopg.conninfo.conninfo_to_dict(postgres_server.database) | {"dbname": name}
    url = f"postgresql:///?{urlencode(parts)}"
    assert "there is no journal" in lattice("check", url).output
    listening = Listening()
    journal = open_postgres(listening, PostgresSettings(url))
    store(journal, listening, *real(1), *real(2))
    refused = lattice("check", url).output
    assert "another server" in refused
    assert "pg_dump" in refused
    assert "lattice journal backup" not in refused
    assert "pg_dump" in lattice("backup", url, "copy").output
    journal.close()
    assert "2 runs, of which 0 have not ended; 2 events; 0 workflows: no damage" in lattice("check", url).output
    exported = [json.loads(line)["kind"] for line in lattice("export", url).output.splitlines()]
    assert exported == ["run", "bundle", "function", "definition", "event", "run", "definition", "event"]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DELETE FROM lattice.events WHERE run = 1")
    assert 'run "run-1": event 1 of run 1 is missing' in lattice("check", url).output
