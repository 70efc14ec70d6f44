"""Owns the journal in SQLite. Rule: one thread uses the one connection that writes and checkpoints.

Releases of SQLite before 3.51.3 may damage a file that two connections checkpoint at once. So readers open it to read
only, and nothing checkpoints by itself.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field
from pathlib import Path

from lattice_server.core.frozen import frozen
from lattice_server.engine.recording.journal_port import (
    JournalBrokenError,
    JournalError,
    JournalFullError,
    JournalListener,
    JournalReader,
    JournalRetention,
)
from lattice_server.engine.recording.journal_records import Record
from lattice_server.journal.backend import FileSizes, Opened
from lattice_server.journal.cells import Cells
from lattice_server.journal.disk_space import RESERVE_BYTES, DiskSpace
from lattice_server.journal.failpoints import failpoint
from lattice_server.journal.files import Files
from lattice_server.journal.folder_lock import locked
from lattice_server.journal.group_commit import GroupCommit, Limits
from lattice_server.journal.record_reader import RecordReader
from lattice_server.journal.record_writer import RecordWriter
from lattice_server.journal.sqlite_database import (
    BUSY_MS,
    PAGE_BYTES,
    Connect,
    SqliteDatabase,
    Sync,
    connect,
    opened,
    translated,
)
from lattice_server.journal.uses import Changes

MIB = 1024 * 1024
# The names in the folder.
DATABASE = "journal.sqlite"
VALUES = "values"
LARGE_LOG = 8  # A log of so many times `checkpoint_bytes` is truncated even under load.
COMMIT_BYTES = 4 * PAGE_BYTES  # About how much a commit adds to the log besides its values.


@frozen
class SqliteSettings:
    """How a journal in SQLite is kept.

    A checkpoint is made after about `checkpoint_bytes`. Free pages are returned to the file system, `vacuum_pages` at a
    time, until only that many are left, or a tenth of the file.
    """

    sync: Sync = Sync.FULL
    retention: JournalRetention = field(default_factory=JournalRetention)
    limits: Limits = field(default_factory=Limits)
    reserve_bytes: int = RESERVE_BYTES
    checkpoint_bytes: int = 16 * MIB
    vacuum_pages: int = 200
    connect: Connect = connect


def open_sqlite(folder: Path, listener: JournalListener, settings: SqliteSettings | None = None) -> GroupCommit:
    """Open the journal in a folder, which is made when there is none.

    Raises:
        JournalLockedError: another process has it open.
        JournalVersionError: a newer server wrote it.
        JournalError: it cannot be used.
    """
    chosen = settings or SqliteSettings()
    try:
        backend = SqliteBackend(folder, chosen)
    except OSError as error:
        advice = "name another folder with --journal, or `memory`"
        raise JournalError(f"the journal in {folder} cannot be opened: {error.strerror}; {advice}") from error
    return GroupCommit(backend, listener, chosen.limits)


class SqliteBackend:
    """A folder with the database, the values that are too large for a row, the reserve and the lock."""

    def __init__(self, folder: Path, settings: SqliteSettings) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / DATABASE
        self._lock = locked(folder)
        self._settings = settings
        with ExitStack() as opening:
            opening.callback(os.close, self._lock)
            try:
                self._space = DiskSpace(folder, settings.reserve_bytes)
                self._database = opened(self._path, settings.connect, settings.sync)
                opening.callback(self._database.close)
                self._files = Files(folder / VALUES)
                self._cells = Cells(self._files)
                self._writer = RecordWriter(self._database, self._cells, settings.retention)
                self.opened = self._begin_epoch()
            except Exception as error:
                raise translated(error) from error
            opening.pop_all()
        self._sweeping: Iterator[None] | None = self._files.sweeping(self._is_named)
        self._log_bytes = 0
        self._has_deleted = True  # An earlier process may have.
        self._has_vacuumed = False
        self._has_truncated = False

    @property
    def is_full(self) -> bool:
        """See `Backend`."""
        return self._space.is_full

    @property
    def ended_runs(self) -> int:
        """See `Backend`."""
        return self._writer.totals.runs

    def commit(self, records: Sequence[Record], size_bytes: int) -> Changes:
        """See `Backend`."""
        try:
            changes = self._write(records)
        except JournalFullError:
            if not self._space.release():
                raise
            changes = self._write(records)
        self._log_bytes += size_bytes + COMMIT_BYTES
        self._has_truncated = False
        self._space.look()
        self._has_deleted = self._has_deleted or bool(changes.runs or changes.files)
        return changes

    def chore(self, changes: Changes, *, is_idle: bool) -> bool:
        """See `Backend`."""
        if self._log_bytes > self._settings.checkpoint_bytes:
            self._checkpoint(
                "TRUNCATE" if self._wal_bytes() > LARGE_LOG * self._settings.checkpoint_bytes else "PASSIVE"
            )
        elif self._has_deleted:
            failpoint("chores.before_delete")
            with self._database.transaction():
                rows = self._writer.delete_step(changes)
            self._has_deleted = rows > 0
            self._log_bytes += rows * PAGE_BYTES  # Each may lie in a page of its own.
            failpoint("chores.after_delete")
            self._has_vacuumed = False
        elif self._sweeping is not None:
            failpoint("chores.before_sweep")
            if next(self._sweeping, self) is self:
                self._sweeping = None
        elif not self._has_vacuumed:
            self._has_vacuumed = not self._vacuum()
        elif is_idle and not self._has_truncated and self._wal_bytes() > self._settings.checkpoint_bytes:
            # When a reader is in the way, the next attempt is after another commit.
            self._has_truncated = True
            self._checkpoint("TRUNCATE")
        else:
            return False
        return True

    def settle(self, changes: Changes) -> None:
        """See `Backend`."""
        self._files.delete(changes.files)

    @contextmanager
    def reader(self) -> Iterator[JournalReader]:
        """See `Journal`."""
        with self._reading() as database:
            yield RecordReader(database, self._cells)

    def sizes(self) -> FileSizes:
        """See `Backend`."""
        with self._reading() as database:
            free_bytes = database.execute("PRAGMA freelist_count")[0][0] * database.execute("PRAGMA page_size")[0][0]
        file_bytes = self._path.stat().st_size + self._files.size_bytes()
        return FileSizes(file_bytes, self._wal_bytes(), free_bytes)

    def close(self) -> None:
        """See `Backend`."""
        lock, self._lock = self._lock, -1
        try:
            self._database.close()
        finally:
            if lock >= 0:
                os.close(lock)

    @contextmanager
    def _reading(self) -> Iterator[SqliteDatabase]:
        database = SqliteDatabase(self._settings.connect(self._path, True))
        try:
            yield database
        finally:
            database.close()

    def _write(self, records: Sequence[Record]) -> Changes:
        try:
            with self._database.transaction():
                changes = self._writer.write(records)
                self._files.sync_names()
            return changes
        except OSError as error:
            self._writer.load()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise JournalFullError(f"the disk is full: {error}") from error
            raise JournalBrokenError(f"a value cannot be written: {error}") from error
        except JournalFullError:
            self._writer.load()
            raise

    def _begin_epoch(self) -> Opened:
        failpoint("open.before_epoch")
        with self._database.transaction():
            self._database.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
        failpoint("open.after_epoch")
        return self._writer.opened()

    def _is_named(self, digest: str) -> bool:
        return bool(self._database.execute("SELECT 1 FROM uses WHERE name = ? LIMIT 1", (f"file:{digest}",)))

    def _checkpoint(self, mode: str) -> None:
        """Copy the log into the database, as far as no reader is in the way."""
        failpoint("chores.before_checkpoint")
        self._database.execute("PRAGMA busy_timeout = 0")
        self._database.execute(f"PRAGMA wal_checkpoint({mode})")
        self._database.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        self._log_bytes = 0
        failpoint("chores.after_checkpoint")

    def _vacuum(self) -> bool:
        """Return some free pages to the file system; return whether there were enough of them."""
        read = self._database.execute
        free, pages = read("PRAGMA freelist_count")[0][0], read("PRAGMA page_count")[0][0]
        step = self._settings.vacuum_pages
        if free <= max(step, pages // 10):
            return False
        failpoint("chores.before_vacuum")
        read(f"PRAGMA incremental_vacuum({step})")
        self._log_bytes += step * PAGE_BYTES
        return True

    def _wal_bytes(self) -> int:
        try:
            return os.stat(f"{self._path}-wal").st_size
        except FileNotFoundError:
            return 0
