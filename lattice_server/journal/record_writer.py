"""Owns the way from records to rows. Rule: a batch is one transaction, and so is each step of a deletion."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from lattice_server.engine.recording.journal_port import JournalDamagedError, JournalRetention
from lattice_server.engine.recording.journal_records import (
    Code,
    DroppedRun,
    EventRecorded,
    Record,
    ResultsRead,
    RunAccepted,
    RunDeleted,
    RunEnded,
    TasksDefined,
    WorkflowDeleted,
    WorkflowStored,
)
from lattice_server.journal.backend import Opened
from lattice_server.journal.cells import Cells
from lattice_server.journal.database import Database, Row
from lattice_server.journal.retention import EndedTotals
from lattice_server.journal.uses import Changes, Uses, run_user, workflow_user

# How many rows one transaction deletes at most: the commits of others wait for it.
STEP_ROWS = 500
VICTIMS = 100
OWN_BYTES = 256  # The size of a row besides its values.
# For each table with rows of a run: the numbers of its first rows, and the deletion of its rows up to a number.
PARTS = (
    (
        "SELECT sequence FROM events WHERE run = ? ORDER BY sequence LIMIT ?",
        "DELETE FROM events WHERE run = ? AND sequence <= ?",
    ),
    (
        "SELECT part FROM definitions WHERE run = ? ORDER BY part LIMIT ?",
        "DELETE FROM definitions WHERE run = ? AND part <= ?",
    ),
)


@dataclass(slots=True)
class _Live:
    """A run that has not ended: its tenant, its newest event, the parts of its definition, and the bytes of all."""

    tenant: str
    sequence: int = 0
    parts: int = 0
    kept_bytes: int = 0


@dataclass(slots=True)
class _Rows:
    """Rows that are inserted together."""

    runs: list[Row] = field(default_factory=list)
    definitions: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    uses: list[Row] = field(default_factory=list)


class RecordWriter:
    """Writes records; to be used by one thread, inside of transactions of `database`.

    After a transaction was rolled back the counts are wrong, and `load` must be called.
    """

    def __init__(self, database: Database, cells: Cells, retention: JournalRetention) -> None:
        self._database = database
        self._cells = cells
        self._retention = retention
        self._uses = Uses(database)
        self.load()

    def load(self) -> None:
        """Count the rows."""
        self._rows = _Rows()
        self.totals = EndedTotals(self._retention)
        self._live: dict[int, _Live] = {}
        read = self._database.execute
        ended = read("SELECT tenant, SUM(kept_bytes), COUNT(*) FROM runs WHERE ended_s IS NOT NULL GROUP BY tenant")
        for tenant, kept_bytes, runs in ended:
            self.totals.add(tenant, int(kept_bytes), runs)
        for run, tenant, own_bytes in read("SELECT number, tenant, kept_bytes FROM runs WHERE ended_s IS NULL"):
            live = self._live[run] = _Live(tenant, kept_bytes=own_bytes)
            try:
                (of_events,) = read("SELECT MAX(sequence), SUM(size) FROM events WHERE run = ?", (run,))
                (of_parts,) = read("SELECT COUNT(*), SUM(size) FROM definitions WHERE run = ?", (run,))
            except JournalDamagedError:
                continue  # Its reader finds out as well.
            live.sequence, live.parts = of_events[0] or 0, of_parts[0]
            live.kept_bytes += int(of_events[1] or 0) + int(of_parts[1] or 0)

    def opened(self) -> Opened:
        """Return the state of the journal."""
        read = self._database.execute
        counted: dict[str, int] = dict(read("SELECT key, value FROM meta"))
        ((last_run,),) = read("SELECT MAX(number) FROM runs")
        ((last_workflow,),) = read("SELECT MAX(number) FROM workflows")
        return Opened(
            counted["epoch"],
            max(last_run or 0, counted["last_run"]),
            max(last_workflow or 0, counted["last_workflow"]),
            {run: live.sequence for run, live in self._live.items()},
        )

    def write(self, records: Sequence[Record]) -> Changes:
        """Write records that come in order."""
        self._rows = _Rows()
        changes, last = Changes(), []
        for record in records:
            match record:
                case RunAccepted():
                    self._accept(record)
                case TasksDefined(run=run):
                    self._define(run, record.definition, record.code, record.artifacts)
                case EventRecorded():
                    self._add_event(record)
                case WorkflowStored():
                    self._store_workflow(record, changes)
                case RunEnded() | ResultsRead() | RunDeleted() | WorkflowDeleted():
                    last.append(record)
                case _:
                    assert_never(record)
        self._insert()
        ended: dict[str, RunEnded] = {}
        for record in last:
            match record:
                case RunEnded():
                    ended[self._end(record)] = record
                case ResultsRead(run=run):
                    self._database.execute("UPDATE runs SET unread = 0 WHERE number = ?", (run,))
                case RunDeleted(run=run):
                    self._delete(run, changes)
                case WorkflowDeleted(number=number):
                    self._note_number("last_workflow", number)
                    self._database.execute("DELETE FROM workflows WHERE number = ?", (number,))
                    user = workflow_user(number)
                    self._uses.drop(user, self._uses.names(user), changes)
        self._retain(ended, changes)
        self._uses.settle(changes)
        return changes

    def delete_step(self, changes: Changes) -> int:
        """Delete some of the remaining rows of deleted runs; return how many those were."""
        budget = STEP_ROWS
        while budget > 0 and (rows := self._database.execute("SELECT run FROM doomed ORDER BY run LIMIT 1")):
            budget -= self._delete_part(rows[0][0], budget, changes)
        return STEP_ROWS - budget

    def _accept(self, record: RunAccepted) -> None:
        live = self._live[record.run] = _Live(record.tenant, kept_bytes=OWN_BYTES + len(record.settings))
        settings = self._pack(run_user(record.run), record.settings)
        texts = (record.run, record.tenant, record.run_id, record.accepted_s, record.fingerprint, record.request_id)
        self._rows.runs.append((*texts, live.kept_bytes, settings))
        self._define(record.run, record.definition, record.code, record.artifacts)

    def _define(self, run: int, definition: bytes, code: Iterable[Code], artifacts: Iterable[str]) -> None:
        live, user = self._live[run], run_user(run)
        self._rows.definitions.append((run, live.parts, len(definition), self._pack(user, definition)))
        live.parts += 1
        live.kept_bytes += len(definition)
        self._refer(user, code, artifacts)

    def _add_event(self, record: EventRecorded) -> None:
        size = OWN_BYTES + len(record.body) + len(record.replay)
        body, body_file = self._cells.pack(record.body)
        replay, replay_file = self._cells.pack(record.replay)
        self._rows.events.append((record.run, record.sequence, size, body, replay))
        if body_file or replay_file or record.artifacts:
            names = [f"file:{file}" for file in (body_file, replay_file) if file]
            names += [f"artifact:{artifact}" for artifact in record.artifacts]
            self._rows.uses += [(run_user(record.run), name) for name in names]
        live = self._live[record.run]
        live.sequence = record.sequence
        live.kept_bytes += size

    def _end(self, record: RunEnded) -> str:
        live = self._live.pop(record.run)
        live.kept_bytes += len(record.summary)
        summary, file = self._cells.pack(record.summary)
        if file:
            self._uses.add([(run_user(record.run), f"file:{file}")])
        self._database.execute(
            "UPDATE runs SET ended_s = ?, sequence = ?, kept_bytes = ?, summary = ? WHERE number = ?",
            (record.ended_s, live.sequence, live.kept_bytes, summary, record.run),
        )
        self.totals.add(live.tenant, live.kept_bytes)
        return live.tenant

    def _retain(self, ended: dict[str, RunEnded], changes: Changes) -> None:
        """Delete runs that are too many, too large or too old; never the newest of the ends of this batch."""
        for tenant, record in ended.items():
            too_old = self._database.execute(
                "SELECT number FROM runs WHERE ended_s < ? ORDER BY ended_s LIMIT ?",
                (self.totals.oldest_s(record.ended_s), STEP_ROWS),
            )
            for (run,) in too_old:
                self._delete(run, changes)
            while self.totals.is_over(tenant):
                victims = self._database.execute(
                    """SELECT number FROM runs WHERE ended_s IS NOT NULL AND tenant = ? AND number <> ?
                    ORDER BY unread, number LIMIT ?""",
                    (tenant, record.run, VICTIMS),
                )
                if not victims:
                    break
                for (run,) in victims:
                    if self.totals.is_over(tenant):
                        self._delete(run, changes)

    def _delete(self, run: int, changes: Changes) -> None:
        found = self._database.execute(
            "SELECT tenant, run_id, fingerprint, kept_bytes FROM runs WHERE number = ? AND ended_s IS NOT NULL", (run,)
        )
        for tenant, run_id, fingerprint, kept_bytes in found:
            self._note_number("last_run", run)
            self._database.execute("DELETE FROM runs WHERE number = ?", (run,))
            self._database.execute("INSERT INTO doomed (run) VALUES (?)", (run,))
            self.totals.remove(tenant, kept_bytes)
            changes.runs.append(DroppedRun(run, tenant, run_id, fingerprint))

    def _note_number(self, key: str, number: int) -> None:
        """Note a number whose row is deleted, so that it is not given out again."""
        self._database.execute("UPDATE meta SET value = ? WHERE key = ? AND value < ?", (number, key, number))

    def _delete_part(self, run: int, budget: int, changes: Changes) -> int:
        """Delete at most about so many rows of a run; return how many those were, at least one."""
        for find, delete in PARTS:
            if found := self._database.execute(find, (run, budget)):
                self._database.execute(delete, (run, found[-1][0]))
                return len(found)
        user = run_user(run)
        if names := self._uses.names(user, budget):
            self._uses.drop(user, names, changes)
            return len(names)
        self._database.execute("DELETE FROM doomed WHERE run = ?", (run,))
        return 1

    def _store_workflow(self, record: WorkflowStored, changes: Changes) -> None:
        user = workflow_user(record.number)
        before = self._uses.names(user)
        definition, file = self._cells.pack(record.definition)
        self._database.execute(
            """INSERT INTO workflows (number, tenant, workflow_id, revision, stored_s, fingerprint, definition)
            VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (number) DO UPDATE SET revision = excluded.revision,
            stored_s = excluded.stored_s, fingerprint = excluded.fingerprint, definition = excluded.definition""",
            (
                record.number,
                record.tenant,
                record.workflow_id,
                record.revision,
                record.stored_s,
                record.fingerprint,
                definition,
            ),
        )
        self._refer(user, record.code, record.artifacts)
        named = {f"code:{code.digest}" for code in record.code}
        named |= {f"artifact:{artifact}" for artifact in record.artifacts}
        if file:
            self._rows.uses.append((user, f"file:{file}"))
            named.add(f"file:{file}")
        self._insert()
        self._uses.drop(user, [name for name in before if name not in named], changes)

    def _pack(self, user: str, data: bytes) -> bytes:
        cell, file = self._cells.pack(data)
        if file:
            self._rows.uses.append((user, f"file:{file}"))
        return cell

    def _refer(self, user: str, code: Iterable[Code], artifacts: Iterable[str]) -> None:
        for item in code:
            self._rows.uses.append((user, f"code:{item.digest}"))
            if not self._database.execute("SELECT 1 FROM code WHERE digest = ?", (item.digest,)):
                cell = self._pack(f"code:{item.digest}", item.encode())
                self._database.execute("INSERT INTO code (digest, cell) VALUES (?, ?)", (item.digest, cell))
        self._rows.uses += [(user, f"artifact:{artifact}") for artifact in artifacts]

    def _insert(self) -> None:
        rows, self._rows = self._rows, _Rows()
        insert = self._database.execute_many
        if rows.runs:
            insert(
                """INSERT INTO runs (number, tenant, run_id, accepted_s, fingerprint, request_id, kept_bytes, settings)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                rows.runs,
            )
        if rows.definitions:
            insert("INSERT INTO definitions (run, part, size, cell) VALUES (?, ?, ?, ?)", rows.definitions)
        if rows.events:
            insert("INSERT INTO events (run, sequence, size, body, replay) VALUES (?, ?, ?, ?, ?)", rows.events)
        self._uses.add(rows.uses)
