"""Owns the check of a journal. Rule: every record is read, and each damaged run or workflow is named once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from lattice_server.core.frozen import frozen
from lattice_server.engine.recording.journal_port import JournalDamagedError, JournalReader
from lattice_server.engine.recording.journal_records import StoredRun
from lattice_server.journal.stopped import StoppedJournal
from lattice_server.journal.uses import run_user, workflow_user

PAGE_RUNS = 100


@frozen
class Damage:
    """Records that cannot be read: `kind` is `run`, `workflow` or `database`; `tenant` and `name` say which one."""

    kind: str
    reason: str
    tenant: str = ""
    name: str = ""


@dataclass(slots=True)
class JournalCheck:
    """A check of one journal, and the number of records that it has read so far."""

    journal: StoppedJournal
    runs: int = 0
    live_runs: int = 0
    events: int = 0
    workflows: int = 0
    _code: dict[str, str] = field(default_factory=dict)  # The damage of each digest; "" for undamaged code.

    def damages(self) -> Iterator[Damage]:
        """Read all records; yield each damage. Values in files are compared with their digests."""
        for text in self.journal.damaged_pages():
            yield Damage("database", text)
        try:
            for run in runs_of(self.journal.reader):
                self.runs += 1
                self.live_runs += run.ended_s is None
                if reason := run.damage or self._damage_of(run):
                    yield Damage("run", reason, run.tenant, run.run_id)
            for workflow in self.journal.reader.workflows():
                self.workflows += 1
                if reason := workflow.damage or self._damage_of_code(workflow_user(workflow.number)):
                    yield Damage("workflow", reason, workflow.tenant, workflow.workflow_id)
        except JournalDamagedError as error:
            yield Damage("database", f"the list of runs or workflows cannot be read: {error}")

    def _damage_of(self, run: StoredRun) -> str:
        """Return why a run cannot be read; "" for an undamaged one."""
        reader = self.journal.reader
        try:
            reader.settings(run.run)
            for _ in reader.definitions(run.run):
                pass
            for _ in reader.events(run.run):
                self.events += 1
        except JournalDamagedError as error:
            return str(error)
        return self._damage_of_code(run_user(run.run))

    def _damage_of_code(self, user: str) -> str:
        sql = 'SELECT name FROM uses WHERE "user" = ?'
        try:
            names = [name for (name,) in self.journal.database.execute(sql, (user,))]
        except JournalDamagedError as error:
            return str(error)
        for name in names:
            kind, _, digest = name.partition(":")
            if kind == "code" and (reason := self._damage_of_digest(digest)):
                return reason
        return ""

    def _damage_of_digest(self, digest: str) -> str:
        if digest not in self._code:
            try:
                is_there = self.journal.reader.code(digest) is not None
                self._code[digest] = "" if is_there else f"code {digest} is missing"
            except JournalDamagedError as error:
                self._code[digest] = f"code {digest}: {error}"
        return self._code[digest]


def runs_of(reader: JournalReader) -> Iterator[StoredRun]:
    """Yield all runs: ended runs, the newest first, then live runs, the oldest first."""
    before = None
    while found := reader.ended_runs(before=before, limit=PAGE_RUNS):
        yield from found
        before = found[-1].run
    yield from reader.live_runs()
