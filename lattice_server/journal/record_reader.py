"""Owns the way from rows to stored records. Rule: damage in the rows of one run concerns only readers of that run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lattice_server.engine.recording.journal_port import JournalDamagedError
from lattice_server.engine.recording.journal_records import StoredEvent, StoredRun, StoredWorkflow
from lattice_server.journal.cells import Cells
from lattice_server.journal.database import RUN_COLUMNS, WORKFLOW_COLUMNS, Database, Row

# How many rows one statement reads: a long one would keep SQLite from reusing its log.
PAGE_ROWS = 200
ID_ROWS = 5000  # They are small.
TOP = 2**62

LIVE = f"SELECT {RUN_COLUMNS} FROM runs WHERE ended_s IS NULL AND number > ? ORDER BY number LIMIT ?"
BY_ID = f"SELECT {RUN_COLUMNS} FROM runs WHERE tenant = ? AND run_id = ? ORDER BY number DESC LIMIT 1"
ENDED = f"SELECT {RUN_COLUMNS} FROM runs WHERE ended_s IS NOT NULL AND number < ? ORDER BY number DESC LIMIT ?"
ENDED_OF = f"""SELECT {RUN_COLUMNS} FROM runs WHERE ended_s IS NOT NULL AND tenant = ? AND number < ?
    ORDER BY number DESC LIMIT ?"""
# In the order of an index that has all these columns.
IDS = """SELECT number, tenant, run_id FROM runs WHERE (tenant, run_id, number) > (?, ?, ?)
    ORDER BY tenant, run_id, number LIMIT ?"""
WORKFLOWS = f"SELECT {WORKFLOW_COLUMNS} FROM workflows WHERE number > ? ORDER BY number LIMIT ?"
EVENTS = "SELECT sequence, body, replay FROM events WHERE run = ? AND sequence > ? ORDER BY sequence LIMIT ?"
PARTS = "SELECT part, cell FROM definitions WHERE run = ? AND part > ? ORDER BY part LIMIT ?"
ARTIFACTS = """SELECT DISTINCT name FROM uses WHERE name > ? AND name >= 'artifact:' AND name < 'artifact;'
    ORDER BY name LIMIT ?"""


class RecordReader:
    """A `JournalReader` over a connection of its own."""

    def __init__(self, database: Database, cells: Cells) -> None:
        self._database = database
        self._cells = cells

    def live_runs(self) -> Iterator[StoredRun]:
        """See `JournalReader`."""
        for row in self._pages(LIVE, (), 0):
            run = self._run(row)
            try:
                found = self._database.execute("SELECT MAX(sequence) FROM events WHERE run = ?", (run.run,))
                yield replace(run, sequence=found[0][0] or 0)
            except JournalDamagedError as error:
                yield replace(run, damage=str(error))

    def settings(self, run: int) -> bytes:
        """See `JournalReader`."""
        rows = self._database.execute("SELECT settings FROM runs WHERE number = ?", (run,))
        if not rows:
            raise JournalDamagedError(f"there is no run {run}")
        return self._cells.unpack(rows[0][0])

    def definitions(self, run: int) -> Iterator[bytes]:
        """See `JournalReader`."""
        expected = 0
        for part, cell in self._pages(PARTS, (run,), -1):
            if part != expected:
                raise JournalDamagedError(f"part {expected} of the definition of run {run} is missing")
            expected += 1
            yield self._cells.unpack(cell)
        if not expected:
            raise JournalDamagedError(f"the definition of run {run} is missing")

    def events(self, run: int, after: int = 0) -> Iterator[StoredEvent]:
        """See `JournalReader`."""
        newest = after
        for sequence, body, replay in self._pages(EVENTS, (run,), after):
            if sequence != newest + 1:
                if not self._database.execute("SELECT 1 FROM runs WHERE number = ?", (run,)):
                    return
                raise JournalDamagedError(f"event {newest + 1} of run {run} is missing")
            newest = sequence
            yield StoredEvent(sequence, self._cells.unpack(body), self._cells.unpack(replay))
        rows = self._database.execute("SELECT sequence FROM runs WHERE number = ? AND ended_s IS NOT NULL", (run,))
        if rows and newest < rows[0][0]:
            raise JournalDamagedError(f"event {newest + 1} of run {run} is missing")

    def find(self, run_id: str, tenant: str) -> StoredRun | None:
        """See `JournalReader`."""
        rows = self._database.execute(BY_ID, (tenant, run_id))
        return self._run(rows[0]) if rows else None

    def ended_runs(self, *, tenant: str | None = None, before: int | None = None, limit: int = 100) -> list[StoredRun]:
        """See `JournalReader`."""
        top = TOP if before is None else before
        if tenant is None:
            rows = self._database.execute(ENDED, (top, limit))
        else:
            rows = self._database.execute(ENDED_OF, (tenant, top, limit))
        return [self._run(row) for row in rows]

    def run_ids(self) -> Iterator[tuple[int, str, str]]:
        """See `JournalReader`."""
        number, tenant, run_id = -1, "", ""
        while rows := self._database.execute(IDS, (tenant, run_id, number, ID_ROWS)):
            yield from rows
            number, tenant, run_id = rows[-1]

    def workflows(self) -> Iterator[StoredWorkflow]:
        """See `JournalReader`."""
        for number, tenant, workflow_id, revision, stored_s, print_, cell in self._pages(WORKFLOWS, (), 0):
            definition, damage = self._unpacked(cell)
            yield StoredWorkflow(number, tenant, workflow_id, revision, stored_s, print_, definition, damage)

    def code(self, digest: str) -> bytes | None:
        """See `JournalReader`."""
        rows = self._database.execute("SELECT cell FROM code WHERE digest = ?", (digest,))
        return self._cells.unpack(rows[0][0]) if rows else None

    def artifacts(self) -> Iterator[str]:
        """See `JournalReader`."""
        for (name,) in self._pages(ARTIFACTS, (), ""):
            yield name.partition(":")[2]

    def _run(self, row: Row) -> StoredRun:
        run, tenant, run_id, accepted_s, print_, request_id, ended_s, unread, sequence, kept_bytes, cell = row
        summary, damage = self._unpacked(cell)
        named = (run, tenant, run_id, accepted_s, print_, request_id)
        return StoredRun(*named, ended_s, not unread, sequence, kept_bytes, summary, damage)

    def _unpacked(self, cell: bytes | None) -> tuple[bytes, str]:
        """Return a value and the reason why it cannot be read."""
        if cell is None:
            return b"", ""
        try:
            return self._cells.unpack(cell), ""
        except JournalDamagedError as error:
            return b"", str(error)

    def _pages(self, sql: str, values: tuple[Any, ...], after: Any) -> Iterator[Row]:
        """Yield the rows of a statement whose last two values are the first column to begin after, and how many."""
        while rows := self._database.execute(sql, (*values, after, PAGE_ROWS)):
            yield from rows
            if len(rows) < PAGE_ROWS:
                return
            after = rows[-1][0]
