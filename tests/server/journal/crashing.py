"""A process that writes a journal until it is killed, and the check of its journal.

`python -m tests.server.journal.crashing FOLDER SEED STEPS MUTANT` continues the journal in a folder. It writes to
files beside the journal which deletions it intends, and which records were acknowledged.
"""

import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lattice_server.engine.recording.journal_port import Journal, JournalError, JournalListener
from lattice_server.engine.recording.journal_records import (
    Code,
    DroppedRun,
    EventRecorded,
    Record,
    RunAccepted,
    RunDeleted,
    RunEnded,
    TasksDefined,
    WorkflowDeleted,
    WorkflowStored,
)
from lattice_server.journal.database import Row
from lattice_server.journal.group_commit import GroupCommit
from lattice_server.journal.postgres import PostgresSettings, open_postgres
from lattice_server.journal.sqlite import SqliteSettings, open_sqlite
from lattice_server.journal.uses import Uses

LARGE = 40_000
PLACE = "LATTICE_TEST_POSTGRES"
SETTINGS = SqliteSettings(checkpoint_bytes=512 * 1024, vacuum_pages=8)


def body(run: int, sequence: int) -> bytes:
    """Return the event that a run has under a number; some are large, and some of those equal to others."""
    if (run * 31 + sequence) % 13 == 0:
        return b"large event %d of run %d" % (sequence % 5, run % 25) + bytes(LARGE)
    return b"event %d of run %d " % (sequence, run) + b"." * ((run * 7 + sequence) % 40 * 50)


def definition(run: int) -> bytes:
    """Return the definition of a run."""
    return b"definition %d" % (run % 3) + bytes(LARGE if run % 4 == 0 else 100)


def code(run: int) -> Code:
    """Return the code of a run, which others have too."""
    name = run % 6
    return Code(f"sha256:{name}", LARGE, lambda: b"code %d" % name + bytes(LARGE if name % 2 else 10))


class Notes:
    """A file of lines that outlives the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, lines: Sequence[str]) -> None:
        """Add lines at once."""
        os.write(self._file, "".join(f"{line}\n" for line in lines).encode())


class Acknowledging:
    """Notes what became durable."""

    def __init__(self, notes: Notes) -> None:
        self.number = 0
        self._notes = notes
        self._appended: deque[tuple[int, list[str]]] = deque()

    def expect(self, number: int, facts: list[str]) -> None:
        """Have facts noted when a commit is durable."""
        self._appended.append((number, facts))
        self._note()

    def durable(self, number: int) -> None:
        self.number = number
        self._note()

    def failed(self, error: JournalError) -> None:
        # Not by `print`: the main thread may be ending the interpreter, which then aborts on the lock of the stream.
        os.write(1, f"failed: {error!r}\n".encode())
        os._exit(3)

    def dropped(self, runs: Sequence[DroppedRun], artifacts: Sequence[str]) -> None:
        pass

    def _note(self) -> None:
        # Both threads may do it; a fact noted twice is the same fact.
        while self._appended and self._appended[0][0] <= self.number:
            self._notes.add(self._appended[0][1])
            try:
                self._appended.popleft()
            except IndexError:
                return


def fact_of(record: Record) -> str:
    match record:
        case RunAccepted(run=run):
            return f"accepted {run}"
        case EventRecorded(run=run, sequence=sequence):
            return f"event {run} {sequence}"
        case TasksDefined(run=run):
            return f"defined {run}"
        case RunEnded(run=run):
            return f"ended {run}"
        case RunDeleted(run=run):
            return f"deleted {run}"
        case WorkflowStored(number=number, revision=revision):
            return f"workflow {number} {revision}"
        case WorkflowDeleted(number=number):
            return f"unstored {number}"
        case _:
            return "nothing"


@dataclass
class Load:
    """Makes random records in order, continuing the content of a journal."""

    random: random.Random
    live: dict[int, int] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    workflows: dict[int, int] = field(default_factory=dict)
    last_run: int = 0
    last_workflow: int = 0

    def read(self, journal: Journal) -> None:
        """Read the content of a journal."""
        self.last_run, self.last_workflow = journal.last_run, journal.last_workflow
        with journal.reader() as reader:
            self.live = {run.run: run.sequence for run in reader.live_runs()}
            self.ended = [run.run for run in reader.ended_runs(limit=100_000)]
            self.workflows = {found.number: found.revision for found in reader.workflows()}

    def records(self) -> list[Record]:
        """Return the next records."""
        dice = self.random.random()
        if dice < 0.2 or not self.live:
            self.last_run += 1
            run = self.last_run
            self.live[run] = 0
            return [RunAccepted(run, f"t{run % 3}", f"r{run}", 1.0, "p", "", b"s", definition(run), (code(run),))]
        run = self.random.choice(list(self.live))
        if dice < 0.35 and self.live[run] > 3:
            del self.live[run]
            self.ended.append(run)
            return [RunEnded(run, 2.0, b"summary %d" % run)]
        if dice < 0.43 and self.ended:
            return [RunDeleted(self.ended.pop(self.random.randrange(len(self.ended))))]
        if dice < 0.46:
            return [TasksDefined(run, b"added", (code(run + 1),))]
        if dice < 0.50:
            return [self._workflow()]
        first = self.live[run] + 1
        self.live[run] += self.random.choice((1, 1, 1, 5, 40))
        return [EventRecorded(run, sequence, body(run, sequence)) for sequence in range(first, self.live[run] + 1)]

    def _workflow(self) -> Record:
        if self.workflows and self.random.random() < 0.6:
            number = self.random.choice(list(self.workflows))
            if self.random.random() < 0.3:
                del self.workflows[number]
                return WorkflowDeleted(number)
        else:
            self.last_workflow += 1
            number = self.last_workflow
        revision = self.workflows[number] = self.workflows.get(number, 0) + 1
        used = (code(number + revision),)
        return WorkflowStored(number, "", f"w{number}", revision, 1.0, "p", definition(number + revision), used)


def opened(folder: Path, listener: JournalListener) -> Journal:
    """Open the journal in a folder, or in the database and schema that the environment names."""
    if place := os.environ.get(PLACE):
        database, schema = place.split("|")
        return open_postgres(listener, PostgresSettings(database, schema))
    return open_sqlite(folder / "journal", listener, SETTINGS)


def write(folder: Path, seed: int, steps: int) -> None:
    """Write a journal for so many steps."""
    intended, acknowledged = Notes(folder / "intended"), Acknowledging(Notes(folder / "acknowledged"))
    journal = opened(folder, acknowledged)
    load = Load(random.Random(seed))
    load.read(journal)
    for _ in range(steps):
        records = load.records()
        facts = [fact_of(record) for record in records]
        intended.add([fact for fact in facts if fact.startswith(("deleted", "unstored", "workflow"))])
        number = journal.append(records)
        acknowledged.expect(number, facts)
        if load.random.random() < 0.4:
            while acknowledged.number < number:
                time.sleep(0.0005)
    journal.close()


def lines(path: Path) -> Iterator[list[str]]:
    """Yield the words of each line of notes; the last may be cut."""
    if path.exists():
        for line in path.read_text().splitlines():
            yield line.split()


def check(folder: Path, journal: Journal) -> int:
    """Assert that a journal has all that was acknowledged, once and in order; return how many facts those were."""
    intended = {tuple(words) for words in lines(folder / "intended")}
    told = {tuple(words) for words in lines(folder / "acknowledged")}
    sequences: dict[int, int] = {}
    with journal.reader() as reader:
        stored = [*reader.live_runs(), *reader.ended_runs(limit=100_000)]
        runs = {run.run: run for run in stored}
        assert len(runs) == len(stored), "a run is there twice"
        for number, run in runs.items():
            assert not run.damage
            bodies = [event.body for event in reader.events(number)]
            assert bodies == [body(number, n) for n in range(1, len(bodies) + 1)]
            assert run.sequence == len(bodies)
            assert next(reader.definitions(number)) == definition(number)
            assert reader.code(code(number).digest) == code(number).encode()
            if run.ended_s is not None:
                assert run.summary == b"summary %d" % number
            sequences[number] = len(bodies)
        workflows = {found.number: found for found in reader.workflows()}
        for number, found in workflows.items():
            assert found.definition == definition(number + found.revision)
            assert reader.code(code(number + found.revision).digest) is not None
    for kind, *rest in told:
        number = int(rest[0])
        is_gone = ("deleted", rest[0]) in intended and number not in runs
        match kind:
            case "deleted":
                assert number not in runs, f"run {number} is back"
            case "accepted":
                assert is_gone or number in runs, f"run {number} is lost"
            case "event":
                assert is_gone or sequences[number] >= int(rest[1]), f"event {rest[1]} of run {number} is lost"
            case "ended":
                assert is_gone or runs[number].ended_s is not None, f"the end of run {number} is lost"
            case "workflow":
                is_unstored = ("unstored", rest[0]) in intended and number not in workflows
                assert is_unstored or workflows[number].revision >= int(rest[1]), f"workflow {number} is lost"
            case "unstored":
                assert number not in workflows, f"workflow {number} is back"
    return len(told)


def mutate(name: str) -> None:
    """Break a rule of the journal, for the check to find out."""
    add = Uses.add

    def acknowledges_first(self: GroupCommit, batch: Any) -> None:
        self._listener.durable(batch.number)
        self._queue.finish(batch)
        self._settle(self._backend.commit(batch.records, batch.size_bytes))

    def notes_no_files(self: Uses, rows: list[Row]) -> None:
        add(self, [row for row in rows if not row[1].startswith("file:")])

    match name:
        case "acknowledges_first":
            GroupCommit._commit = acknowledges_first  # type: ignore[method-assign]
        case "notes_no_files":
            Uses.add = notes_no_files  # type: ignore[method-assign]


if __name__ == "__main__":
    mutate(sys.argv[4])
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
