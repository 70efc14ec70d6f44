"""What only the journal in SQLite does: locks, versions, damage, full disks, sizes."""

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_server.engine.recording.journal_port import (
    Journal,
    JournalBrokenError,
    JournalBusyError,
    JournalDamagedError,
    JournalError,
    JournalLockedError,
    JournalReader,
    JournalRetention,
    JournalVersionError,
)
from lattice_server.engine.recording.journal_records import Record, ResultsRead, RunDeleted
from lattice_server.journal.failpoints import FAILPOINTS
from lattice_server.journal.group_commit import LATER_RECORDS, Limits
from lattice_server.journal.record_writer import STEP_ROWS, RecordWriter
from lattice_server.journal.sqlite import SqliteBackend, SqliteSettings, Sync, open_sqlite
from lattice_server.journal.sqlite_database import PAGE_BYTES, connect
from lattice_server.journal.uses import Changes
from tests.server.journal.listening import Listening, accepted, code, ended, event, store, whole

LARGE = 40_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def failpoints() -> Iterator[Callable[[str], None]]:
    """Sets failpoints until the test ends."""
    yield FAILPOINTS.set
    FAILPOINTS.set("")


def fill(folder: Path, *records: Record) -> None:
    listening = Listening()
    journal = open_sqlite(folder, listening)
    store(journal, listening, *records)
    journal.close()
    assert listening.error is None


def change(folder: Path, sql: str, *values: Any) -> None:
    connection = sqlite3.connect(folder / "journal.sqlite")
    with connection:
        assert connection.execute(sql, values).rowcount != 0
    connection.close()


def query(folder: Path, sql: str) -> list[Any]:
    connection = sqlite3.connect(f"file:{folder}/journal.sqlite?mode=ro", uri=True)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def read(folder: Path, what: Callable[[JournalReader], Any]) -> Any:
    journal = open_sqlite(folder, Listening())
    try:
        with journal.reader() as reader:
            return what(reader)
    finally:
        journal.close()


def test_journal_is_refused_while_another_process_has_it(folder: Path) -> None:
    script = "import sys, fcntl, os; f = os.open(sys.argv[1], os.O_RDWR); fcntl.flock(f, fcntl.LOCK_EX); print(1)"
    fill(folder)
    command = [sys.executable, "-c", f"{script}; sys.stdout.flush(); sys.stdin.read()", str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(JournalLockedError, match="another server"):
            open_sqlite(folder, Listening())
        other.communicate()
    fill(folder)


def test_journal_is_refused_twice_in_one_process(folder: Path) -> None:
    journal = open_sqlite(folder, Listening())
    with pytest.raises(JournalLockedError):
        open_sqlite(folder, Listening())
    journal.close()
    fill(folder)


def test_journal_of_a_newer_server_is_refused(folder: Path) -> None:
    fill(folder)
    change(folder, "PRAGMA user_version = 99")
    with pytest.raises(JournalVersionError, match="version 99"):
        open_sqlite(folder, Listening())


def test_file_that_is_no_journal_is_refused(folder: Path) -> None:
    folder.mkdir()
    connection = sqlite3.connect(folder / "journal.sqlite")
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(JournalVersionError, match="no journal"):
        open_sqlite(folder, Listening())
    (folder / "journal.sqlite").write_bytes(b"something else " * 1000)
    with pytest.raises(JournalError):
        open_sqlite(folder, Listening())


@pytest.mark.parametrize("sync", list(Sync))
def test_log_is_synced_as_the_settings_say(folder: Path, sync: Sync) -> None:
    made: list[sqlite3.Connection] = []

    def connecting(path: Path, is_reader: bool) -> Any:
        made.append(connect(path, is_reader))
        return made[-1]

    # Without the thread of a journal, which would use the connection at the same time.
    backend = SqliteBackend(folder, SqliteSettings(sync=sync, connect=connecting))
    assert made[0].execute("PRAGMA synchronous").fetchone() == ({Sync.NORMAL: 1, Sync.FULL: 2}[sync],)
    assert made[0].execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert made[0].execute("PRAGMA auto_vacuum").fetchone() == (2,)
    backend.close()


def test_damaged_event_fails_only_its_run(folder: Path) -> None:
    fill(folder, *whole(1, events=3), *whole(2, events=3))
    ((cell,),) = query(folder, "SELECT body FROM events WHERE run = 1 AND sequence = 2")
    change(folder, "UPDATE events SET body = ? WHERE run = 1 AND sequence = 2", cell.replace(b"event", b"evenT"))
    with pytest.raises(JournalDamagedError, match="checksum"):
        read(folder, lambda reader: list(reader.events(1)))
    assert len(read(folder, lambda reader: list(reader.events(2)))) == 3


@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_missing_event_fails_its_run(folder: Path, sequence: int) -> None:
    fill(folder, *whole(1, events=3))
    change(folder, "DELETE FROM events WHERE sequence = ?", sequence)
    with pytest.raises(JournalDamagedError, match=f"event {sequence} of run 1 is missing"):
        read(folder, lambda reader: list(reader.events(1)))


def test_damaged_summary_is_told_in_its_row_of_a_list(folder: Path) -> None:
    fill(folder, *whole(1), *whole(2))
    change(folder, "UPDATE runs SET summary = x'0011223344556677' WHERE number = 1")
    two, one = read(folder, lambda reader: reader.ended_runs())
    assert (two.summary, two.damage) == (b"summary 2", "")
    assert (one.summary, bool(one.damage)) == (b"", True)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_value_in_a_file_fails_only_its_run(folder: Path, damage: str) -> None:
    fill(folder, accepted(1, definition=b"d" * LARGE), accepted(2, definition=b"e" * LARGE))
    (path,) = (path for path in (folder / "values").iterdir() if path.read_bytes()[0] == ord("d"))
    path.unlink() if damage == "missing" else path.write_bytes(b"D" + b"d" * (LARGE - 1))
    with pytest.raises(JournalDamagedError, match="value"):
        read(folder, lambda reader: list(reader.definitions(1)))
    assert read(folder, lambda reader: list(reader.definitions(2))) == [b"e" * LARGE]


def test_damaged_pages_fail_some_runs_and_others_are_read(folder: Path) -> None:
    runs = range(1, 9)
    fill(folder, *(record for run in runs for record in (accepted(run), *(event(run, n, 500) for n in range(1, 200)))))
    path = folder / "journal.sqlite"
    content = bytearray(path.read_bytes())
    (place,) = (content.index(b"event 100 of run 4 "),)
    page = place // PAGE_BYTES * PAGE_BYTES
    content[page : page + PAGE_BYTES] = bytes(PAGE_BYTES)
    path.write_bytes(content)
    listening = Listening()
    journal = open_sqlite(folder, listening)
    failed = set()
    with journal.reader() as reader:
        for run in reader.live_runs():
            try:
                assert len(list(reader.events(run.run))) == 199
            except JournalDamagedError:
                failed.add(run.run)
    assert 4 in failed
    assert len(failed) <= 2
    store(journal, listening, ended(4), *whole(9))
    journal.close()


def test_file_shrinks_when_runs_are_deleted(folder: Path) -> None:
    settings = SqliteSettings(Sync.NORMAL, checkpoint_bytes=64 * 1024, vacuum_pages=8)
    listening = Listening()
    journal = open_sqlite(folder, listening, settings)
    for run in range(1, 11):
        store(journal, listening, *whole(run, events=20, size=20_000))
    before = journal.stats()
    store(journal, listening, *(RunDeleted(run) for run in range(1, 10)))
    wait_for(lambda: not query(folder, "SELECT 1 FROM doomed"))
    wait_for(lambda: journal.stats().free_bytes <= max(8 * 8192, journal.stats().file_bytes // 10))
    journal.close()
    after = (folder / "journal.sqlite").stat().st_size
    assert before.file_bytes + before.log_bytes > 10 * 20 * 20_000
    assert after < 2 * 20 * 20_000


def test_log_stays_small_while_many_runs_are_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, limit_bytes = 800, 256 * 1024
    fill(folder, *(record for run in range(1, runs + 1) for record in whole(run, events=9, size=3_000)))
    steps: list[tuple[int, int]] = []
    step = RecordWriter.delete_step

    def noted(writer: RecordWriter, changes: Changes) -> int:
        rows = step(writer, changes)
        steps.append((rows, (folder / "journal.sqlite-wal").stat().st_size))
        return rows

    monkeypatch.setattr(RecordWriter, "delete_step", noted)
    settings = SqliteSettings(Sync.NORMAL, JournalRetention(runs=1), checkpoint_bytes=limit_bytes)
    listening = Listening()
    journal = open_sqlite(folder, listening, settings)
    store(journal, listening, *whole(runs + 1))
    wait_for(lambda: not query(folder, "SELECT 1 FROM doomed"))
    journal.close()
    assert sum(rows for rows, _ in steps) >= 10 * runs
    assert len(steps) < runs / 10, "one transaction deletes many small runs"
    assert max(size for _, size in steps) < limit_bytes + 2 * STEP_ROWS * PAGE_BYTES


def test_log_is_brought_into_the_file_and_cut_off(folder: Path) -> None:
    listening = Listening()
    journal = open_sqlite(folder, listening, SqliteSettings(checkpoint_bytes=256 * 1024))
    for run in range(1, 20):
        store(journal, listening, *whole(run, events=10, size=10_000))
    wait_for(lambda: journal.stats().log_bytes <= 256 * 1024)
    journal.close()


def test_reader_that_is_open_hinders_no_commit(folder: Path) -> None:
    listening = Listening()
    journal = open_sqlite(folder, listening, SqliteSettings(checkpoint_bytes=64 * 1024))
    store(journal, listening, accepted(1), *(event(1, n, 500) for n in range(1, 400)))
    with journal.reader() as reader:
        events = reader.events(1)
        assert next(events).sequence == 1
        for n in range(400, 460):
            store(journal, listening, event(1, n, 20_000))
        assert len(list(events)) == 458
    journal.close()


def test_append_of_nothing_is_durable_with_all_before_it(folder: Path) -> None:
    listening = Listening()
    journal = open_sqlite(folder, listening)
    journal.append([accepted(1)])
    listening.wait(journal.append([]))
    assert read_live(journal) == [1]
    journal.close()


def test_new_work_is_refused_while_too_much_waits(folder: Path, failpoints: Callable[[str], None]) -> None:
    listening, entered, leave = Listening(), threading.Event(), threading.Event()

    def encode() -> bytes:
        entered.set()
        assert leave.wait(30)
        return b"code"

    blocking = code("slow")
    blocking = type(blocking)(blocking.digest, 4, encode)
    journal = open_sqlite(folder, listening, SqliteSettings(limits=Limits(pending_bytes=1000)))
    journal.append([accepted(1, code=(blocking,))])
    assert entered.wait(30)
    number = journal.append([event(1, 1, 1000)])
    assert journal.is_busy
    with pytest.raises(JournalBusyError):
        journal.admit([accepted(2)])
    assert listening.number == 0
    leave.set()
    listening.wait(number)
    assert not journal.is_busy
    listening.wait(journal.admit([accepted(2)]))
    journal.close()


def test_records_that_come_during_a_commit_share_the_next_one(folder: Path) -> None:
    listening, entered, leave = Listening(), threading.Event(), threading.Event()

    def encode() -> bytes:
        entered.set()
        assert leave.wait(30)
        return b"code"

    first = code("slow")
    journal = open_sqlite(folder, listening)
    journal.append([accepted(1, code=(type(first)(first.digest, 4, encode),))])
    assert entered.wait(30)
    numbers = [journal.append([event(1, n)]) for n in range(1, 101)]
    leave.set()
    listening.wait(numbers[-1])
    assert listening.numbers == [1, 101]
    journal.close()


@pytest.mark.parametrize("point", ["commit.before_commit", "file.before_sync"])
def test_failed_sync_breaks_the_journal_for_good(folder: Path, failpoints: Callable[[str], None], point: str) -> None:
    listening = Listening()
    journal = open_sqlite(folder, listening)
    store(journal, listening, accepted(1))
    failpoints(f"{point}=error")
    number = journal.append([event(1, 1, LARGE)])
    with pytest.raises(JournalBrokenError):
        listening.wait(number)
    failpoints("")
    with pytest.raises(JournalBrokenError):
        journal.append([event(1, 2)])
    assert listening.number == 1
    journal.close()
    assert read(folder, lambda reader: list(reader.events(1))) == []


def test_full_disk_refuses_new_work_and_lets_running_work_end(tmp_path: Path) -> None:
    """On a file system of 48 MiB, in a namespace of its own."""
    script = f"""
mount -t tmpfs -o size=48m tmpfs {tmp_path}
exec {sys.executable} -m tests.server.journal.filling {tmp_path}
"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "full\nended\nroom again\n"


def read_live(journal: Journal) -> list[int]:
    with journal.reader() as reader:
        return [run.run for run in reader.live_runs()]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_record_without_a_waiter_is_committed_when_the_journal_closes(folder: Path) -> None:
    listening, commits = Listening(), [0]

    def count(records: int, size_bytes: int, seconds: float, waited_s: float) -> None:
        commits.append(records)

    journal = open_sqlite(folder, listening)
    journal.on_commit = count
    for run in (1, 2, 3):
        store(journal, listening, *whole(run))
    journal.append_later(ResultsRead(2))
    store(journal, listening, *whole(4, events=0))
    journal.append_later(ResultsRead(3))
    journal.close()
    assert commits[-2:] == [3, 1], "with the next records, and by the end"
    journal = open_sqlite(folder, Listening())
    with journal.reader() as reader:
        assert {found.run for found in reader.ended_runs() if found.is_read} == {2, 3}
    journal.close()


def test_many_records_that_nothing_waits_for_are_committed_by_themselves(folder: Path) -> None:
    listening = Listening()
    journal = open_sqlite(folder, listening)
    store(journal, listening, *whole(1))
    for _ in range(LATER_RECORDS - 1):
        journal.append_later(ResultsRead(1))
    with journal.reader() as reader:
        assert not reader.ended_runs()[0].is_read
        journal.append_later(ResultsRead(1))
        listening.until(lambda: reader.ended_runs()[0].is_read)
    journal.close()
