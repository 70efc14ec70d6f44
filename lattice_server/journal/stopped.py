"""Owns reading a journal that no server has open. Rule: nothing is written, and no server can open it meanwhile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lattice_server.core.frozen import frozen
from lattice_server.engine.recording.journal_port import JournalDamagedError, JournalError, JournalVersionError
from lattice_server.journal.cells import Cells
from lattice_server.journal.database import Database
from lattice_server.journal.files import Files
from lattice_server.journal.folder_lock import locked
from lattice_server.journal.record_reader import RecordReader
from lattice_server.journal.sqlite import DATABASE, VALUES
from lattice_server.journal.sqlite_database import SqliteDatabase, connect
from lattice_server.journal.sqlite_schema import APPLICATION_ID, MIGRATIONS


@frozen
class StoppedJournal:
    """A journal that no server has open. `files` is None where all values lie in rows."""

    database: Database
    reader: RecordReader
    files: Files | None = None

    def damaged_pages(self) -> Iterator[str]:
        """Yield what SQLite finds wrong with the file as a whole."""
        if self.files is None:
            return
        try:
            for (text,) in self.database.execute("PRAGMA integrity_check"):
                if text != "ok":
                    yield from text.splitlines()
        except JournalDamagedError as error:
            yield str(error)


@contextmanager
def stopped_sqlite(folder: Path) -> Iterator[StoppedJournal]:
    """Open the journal in a folder.

    Raises:
        JournalLockedError: a server has it open.
        JournalVersionError: a server of another version wrote it, or it is no journal.
        JournalError: there is none.
    """
    path = folder / DATABASE
    if not path.is_file():
        raise JournalError(f"there is no journal in {folder}")
    lock = locked(folder)
    try:
        database = SqliteDatabase(connect(path, True))
        try:
            check_sqlite_version(database)
            files = Files(folder / VALUES)
            yield StoppedJournal(database, RecordReader(database, Cells(files)), files)
        finally:
            database.close()
    finally:
        os.close(lock)


def check_sqlite_version(database: Database) -> None:
    """Raise JournalVersionError for a file whose tables are not those of this version."""
    ((version,),) = database.execute("PRAGMA user_version")
    ((application,),) = database.execute("PRAGMA application_id")
    if application != APPLICATION_ID:
        raise JournalVersionError("the file is no journal of Lattice")
    check_version(version, len(MIGRATIONS))


def check_version(version: int, known: int) -> None:
    """Raise JournalVersionError for tables that are not those of this version."""
    if version != known:
        text = f"the journal has version {version}, and this command reads version {known}"
        raise JournalVersionError(f"{text}: use the command of the server that wrote it, or start this server once")
