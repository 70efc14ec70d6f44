"""Owns the journal in PostgreSQL. Rule: one connection writes, and holds the lock of the journal while it lasts.

All values lie in rows: the next server may be on another machine. When the connection is lost the journal is broken,
since its last commit may have been made or not; the next start reads which.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field
from functools import cache
from typing import Any

from lattice_server.core.frozen import frozen
from lattice_server.engine.recording.journal_port import (
    JournalBrokenError,
    JournalDamagedError,
    JournalError,
    JournalFullError,
    JournalListener,
    JournalLockedError,
    JournalReader,
    JournalRetention,
)
from lattice_server.engine.recording.journal_records import Record
from lattice_server.journal.backend import FileSizes
from lattice_server.journal.cells import Cells
from lattice_server.journal.database import Row
from lattice_server.journal.failpoints import failpoint
from lattice_server.journal.group_commit import GroupCommit, Limits
from lattice_server.journal.postgres_schema import MIGRATIONS, migrate
from lattice_server.journal.record_reader import RecordReader
from lattice_server.journal.record_writer import RecordWriter
from lattice_server.journal.stopped import StoppedJournal, check_version
from lattice_server.journal.uses import Changes

try:
    import psycopg
    from psycopg import sql
except ImportError as missing:
    needed = f'a journal in PostgreSQL needs more packages: pip install "lattice-control-plane[postgres]" ({missing})'
    raise JournalError(needed) from missing

DISK_FULL = "53100"
DAMAGED = ("XX001", "XX002")


@frozen
class PostgresSettings:
    """Which database a journal is in, as a connection string of libpq, and in which schema of it."""

    database: str
    schema: str = "lattice"
    retention: JournalRetention = field(default_factory=JournalRetention)
    limits: Limits = field(default_factory=Limits)


def open_postgres(listener: JournalListener, settings: PostgresSettings) -> GroupCommit:
    """Open the journal in a schema, which is made when there is none.

    Raises:
        JournalLockedError: another server has it open.
        JournalVersionError: a newer server wrote it.
        JournalError: it cannot be used.
    """
    return GroupCommit(PostgresBackend(settings), listener, settings.limits)


class PostgresBackend:
    """One connection that writes, and one for each reader."""

    is_full = False

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._database = connected(settings)
        try:
            lock(self._database, settings.schema)
            migrate(self._database)
            self._writer = RecordWriter(self._database, Cells(None), settings.retention)
            failpoint("open.before_epoch")
            with self._database.transaction():
                self._database.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
            failpoint("open.after_epoch")
            self.opened = self._writer.opened()
        except BaseException:
            unlock(self._database)
            raise
        self._has_deleted = True  # An earlier process may have.

    @property
    def ended_runs(self) -> int:
        """See `Backend`."""
        return self._writer.totals.runs

    def commit(self, records: Sequence[Record], size_bytes: int) -> Changes:
        """See `Backend`."""
        with self._database.transaction():
            changes = self._writer.write(records)
        self._has_deleted = self._has_deleted or bool(changes.runs)
        return changes

    def chore(self, changes: Changes, *, is_idle: bool) -> bool:
        """See `Backend`."""
        if not self._has_deleted:
            return False
        failpoint("chores.before_delete")
        with self._database.transaction():
            self._has_deleted = self._writer.delete_step(changes) > 0
        failpoint("chores.after_delete")
        return True

    def settle(self, changes: Changes) -> None:
        """See `Backend`."""

    @contextmanager
    def reader(self) -> Iterator[JournalReader]:
        """See `Journal`."""
        database = connected(self._settings)
        try:
            yield RecordReader(database, Cells(None))
        finally:
            database.close()

    def sizes(self) -> FileSizes:
        """See `Backend`."""
        database = connected(self._settings)
        try:
            ((size,),) = database.execute(
                "SELECT SUM(pg_total_relation_size(c.oid)) FROM pg_class c WHERE c.relkind = 'r' AND "
                "c.relnamespace = current_schema()::regnamespace"
            )
        finally:
            database.close()
        return FileSizes(int(size or 0))

    def close(self) -> None:
        """See `Backend`."""
        unlock(self._database)


class PostgresDatabase:
    """One connection; see `Database`."""

    def __init__(self, connection: "psycopg.Connection[Row]") -> None:
        self._connection = connection

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """See `Database`."""
        try:
            cursor = self._connection.execute(_with_places(sql), values)
            return cursor.fetchall() if cursor.description is not None else []
        except psycopg.Error as error:
            raise translated(error) from error

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Database`."""
        try:
            with self._connection.cursor() as cursor:
                cursor.executemany(_with_places(sql), rows)
        except psycopg.Error as error:
            raise translated(error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See `Database`."""
        self.execute("BEGIN")
        try:
            yield
            failpoint("commit.before_commit")
            self.execute("COMMIT")
        except BaseException:
            with suppress(psycopg.Error):
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """See `Database`."""
        self._connection.close()


@contextmanager
def stopped_postgres(settings: PostgresSettings) -> Iterator[StoppedJournal]:
    """Open a journal that no server has open, to read it.

    Raises:
        JournalLockedError: a server has it open.
        JournalVersionError: a server of another version wrote it.
        JournalError: there is none.
    """
    database = connected(settings, is_reader=True)
    try:
        if not database.execute("SELECT to_regclass('meta')")[0][0]:
            raise JournalError(f"there is no journal in schema {settings.schema!r} of this database")
        lock(database, settings.schema)
        ((version,),) = database.execute("SELECT value FROM meta WHERE key = 'version'")
        check_version(version, len(MIGRATIONS))
        yield StoppedJournal(database, RecordReader(database, Cells(None)))
    finally:
        unlock(database)


def connected(settings: PostgresSettings, *, is_reader: bool = False) -> PostgresDatabase:
    """Connect to the schema of a journal, which is made unless it is only read. Raises JournalError."""
    name = sql.Identifier(settings.schema)
    try:
        connection = psycopg.connect(settings.database, autocommit=True)
        if not is_reader:
            with suppress(psycopg.errors.UniqueViolation):  # Another one made it at the same moment.
                connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(name))
        connection.execute(sql.SQL("SET search_path TO {}").format(name))
    except psycopg.Error as error:
        raise translated(error) from error
    return PostgresDatabase(connection)


def lock(database: PostgresDatabase, schema: str) -> None:
    """Lock a journal for as long as a connection lasts. Raises JournalLockedError."""
    ((is_locked,),) = database.execute(
        "SELECT pg_try_advisory_lock(hashtext(?), hashtext(?))", ("lattice.journal", schema)
    )
    if not is_locked:
        raise JournalLockedError(
            f"another server, or a `lattice journal` command, uses the journal in schema {schema!r}"
        )


def unlock(database: PostgresDatabase) -> None:
    """Unlock a journal, and close the connection."""
    # The server ends the session, and with it the lock, some time after the connection was closed.
    with suppress(JournalError):
        database.execute("SELECT pg_advisory_unlock_all()")
    database.close()


def translated(error: psycopg.Error) -> JournalError:
    """Return the error of a journal that an exception of psycopg stands for."""
    if error.sqlstate == DISK_FULL:
        return JournalFullError(f"the disk is full: {error}")
    if error.sqlstate in DAMAGED:
        return JournalDamagedError(f"the database is damaged: {error}")
    return JournalBrokenError(f"the journal cannot be used: {error}")


@cache
def _with_places(sql: str) -> Any:
    """Return a statement with the placeholders of psycopg."""
    return sql.replace("?", "%s")
