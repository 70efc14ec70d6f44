"""Owns connections to SQLite. Rule: every error of SQLite becomes one of a journal, by its code."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from lattice_server.engine.recording.journal_port import (
    JournalBrokenError,
    JournalDamagedError,
    JournalError,
    JournalFullError,
)
from lattice_server.journal.database import Row
from lattice_server.journal.failpoints import failpoint
from lattice_server.journal.sqlite_schema import migrate

PAGE_BYTES = 4096  # A commit writes each page that it changes, most of them for a row of a few hundred bytes.
BUSY_MS = 10_000  # How long another program may lock the file before that is an error.
CACHE_KIB = 16 * 1024
# Opens a file; the flag tells whether it is only read.
Connect = Callable[[Path, bool], Any]


class Sync(Enum):
    """When a commit counts as durable."""

    FULL = "FULL"  # Once it is on the disk.
    NORMAL = "NORMAL"  # Once the operating system has it. Decision 29 says which records a power cut may lose.


def connect(path: Path, is_reader: bool) -> Any:
    """Open a file with the sqlite3 of Python. The connection is used by one thread at a time."""
    uri = f"file:{str(path).replace('%', '%25').replace('?', '%3f').replace('#', '%23')}?mode="
    return sqlite3.connect(
        uri + ("ro" if is_reader else "rwc"),
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_MS / 1000,
    )


class SqliteDatabase:
    """One connection; see `Database`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """See `Database`."""
        try:
            rows: list[Row] = self.connection.execute(sql, values).fetchall()
            return rows
        except Exception as error:
            raise translated(error) from error

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Database`."""
        try:
            self.connection.executemany(sql, rows)
        except Exception as error:
            raise translated(error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See `Database`."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            failpoint("commit.before_commit")
            self.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

    def close(self) -> None:
        """See `Database`."""
        self.connection.close()

    def _roll_back(self) -> None:
        # After some errors SQLite has rolled back by itself, and on a broken disk it cannot; neither changes anything.
        try:
            self.connection.execute("ROLLBACK")
        except Exception:
            return


def translated(error: Exception) -> Exception:
    """Return the error of a journal that an exception of SQLite stands for; others are returned as they are."""
    # By the standard library, and by apsw.
    code = getattr(error, "sqlite_errorcode", None) or getattr(error, "extendedresult", None)
    if code is None and isinstance(error, UnicodeDecodeError | sqlite3.OperationalError):
        return JournalDamagedError(f"the file is damaged: a text in it cannot be decoded: {error}")
    if isinstance(error, JournalError) or code is None:
        return error
    match code & 0xFF:
        case 13:
            return JournalFullError(f"the disk is full: {error}")
        case 11 | 26:
            return JournalDamagedError(f"the file is damaged: {error}")
        case _:
            return JournalBrokenError(f"the journal cannot be used: {error} (SQLite {code})")


def opened(path: Path, connect: Connect, sync: Sync) -> SqliteDatabase:
    """Open the database that is written to, with the tables of this version. Raises JournalError."""
    database = SqliteDatabase(connect(path, False))
    try:
        for pragma in (
            f"page_size = {PAGE_BYTES}",
            "auto_vacuum = INCREMENTAL",  # Before the first table: it cannot be set later.
            "journal_mode = WAL",
            f"synchronous = {sync.value}",
            "wal_autocheckpoint = 0",
            f"cache_size = -{CACHE_KIB}",
        ):
            database.execute(f"PRAGMA {pragma}")
        migrate(database)
    except BaseException:
        database.close()
        raise
    return database
