"""`lattice journal`: damage is found and named, a backup is whole, and an export has every record."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import run_pb2, task_pb2, worker_pb2, workflow_pb2

from lattice_server.engine.recording.journal_port import JournalError
from lattice_server.engine.recording.journal_records import (
    Code,
    EventRecorded,
    Record,
    RunDeleted,
    RunEnded,
    WorkflowStored,
)
from lattice_server.journal import backup
from lattice_server.journal.checking import Damage, JournalCheck
from lattice_server.journal.sqlite import open_sqlite
from lattice_server.journal.stopped import stopped_sqlite
from lattice_server.journal_cli import journal as commands
from tests.examples import examples
from tests.server.journal.crashing import SETTINGS, Acknowledging, Load, Notes, check, fact_of
from tests.server.journal.listening import Listening, accepted, code, store, whole
from tests.server.journal.test_sqlite import change, fill

LARGE = 40_000
CODE = b"code of the function"


def lattice(*arguments: Any) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def found_in(folder: Path) -> list[Damage]:
    with stopped_sqlite(folder) as opened:
        return list(JournalCheck(opened).damages())


def real(run: int, tenant: str = "") -> list[Record]:
    """Return the records of a run that has ended, which are messages of the contract."""
    function = task_pb2.Function(digest="sha256:f", bundle_digest="sha256:b", display_name="f")
    bundle = task_pb2.CodeBundle(digest="sha256:b", zip=CODE)
    spec = workflow_pb2.WorkflowSpec(tasks=[task_pb2.TaskSpec(task_id="t")])
    spec.functions["sha256:f"].digest = "sha256:f"
    settings = run_pb2.Run(run_id=f"run-{run}", labels={"team": "search"})
    event = run_pb2.RunEvent(sequence=1, task_started=run_pb2.TaskStarted(task_id="t", attempt=1))
    used = [Code(m.digest, 1, m.SerializeToString) for m in (function, bundle)]
    made = accepted(
        run, tenant, settings=settings.SerializeToString(), definition=spec.SerializeToString(), code=tuple(used)
    )
    replay = worker_pb2.Report(lease_id="lease-1").SerializeToString()
    summary = run_pb2.Run(run_id=f"run-{run}", state=run_pb2.RUN_STATE_SUCCEEDED).SerializeToString()
    return [made, EventRecorded(run, 1, event.SerializeToString(), replay), RunEnded(run, 2000.0, summary)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A journal with two ended runs, a live one, a large value in each, and a workflow."""
    made = tmp_path / "journal"
    large = {"code": (code("g", b"g" * LARGE),), "definition": b"d" * LARGE}
    live = [accepted(3, "x", run_id="alive"), EventRecorded(3, 1, b"3" * LARGE)]
    stored = WorkflowStored(1, "x", "flow", 1, 5.0, "print", b"flow", (code("h", b"h" * LARGE),))
    fill(made, *whole(1, "x", **large), *whole(2, size=LARGE), *live, stored)
    return made


def test_check_finds_nothing_in_an_undamaged_journal(folder: Path) -> None:
    result = lattice("check", folder)
    assert result.exit_code == 0
    assert result.output == "3 runs, of which 1 have not ended; 5 events; 1 workflows: no damage\n"


def test_check_reads_a_journal_whose_server_was_killed(folder: Path, tmp_path: Path) -> None:
    # A killed server leaves records that are only in the log, and no index of the log.
    listening, copy = Listening(), tmp_path / "copy"
    journal = open_sqlite(folder, listening)
    store(journal, listening, *whole(4))
    shutil.copytree(folder, copy)
    journal.close()
    (copy / "journal.sqlite-shm").unlink()
    assert (copy / "journal.sqlite-wal").stat().st_size > 0
    assert "4 runs" in lattice("check", copy).output
    assert "run-4" in lattice("export", copy, "--run", "run-4").output


def drop_event(folder: Path) -> None:
    change(folder, "DELETE FROM events WHERE run = 1 AND sequence = 1")


def drop_last_event(folder: Path) -> None:
    change(folder, "DELETE FROM events WHERE run = 1 AND sequence = 2")


def change_event(folder: Path) -> None:
    change(folder, "UPDATE events SET body = ? WHERE run = 1", b"\0????other")


def change_settings(folder: Path) -> None:
    change(folder, "UPDATE runs SET settings = ? WHERE number = 1", b"")


def change_summary(folder: Path) -> None:
    change(folder, "UPDATE runs SET summary = ? WHERE number = 1", b"\0????other")


def drop_definition(folder: Path) -> None:
    change(folder, "DELETE FROM definitions WHERE run = 1")


def drop_code(folder: Path) -> None:
    change(folder, "DELETE FROM code WHERE digest = 'sha256:g'")


def drop_value(folder: Path) -> None:
    value_of(folder, b"d").unlink()


def change_value(folder: Path) -> None:
    value_of(folder, b"g").write_bytes(b"G" * LARGE)


def value_of(folder: Path, letter: bytes) -> Path:
    (found,) = [path for path in (folder / "values").iterdir() if path.read_bytes() == letter * LARGE]
    return found


@pytest.mark.parametrize(
    "damage",
    [
        drop_event,
        drop_last_event,
        change_event,
        change_settings,
        change_summary,
        drop_definition,
        drop_code,
        drop_value,
        change_value,
    ],
)
def test_check_names_the_damaged_run_and_no_other(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder)
    result = lattice("check", folder, "--json")
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert (result.exit_code, found["kind"], found["tenant"], found["name"]) == (1, "run", "x", "run-1")
    assert found["reason"]


def test_check_names_a_damaged_workflow(folder: Path) -> None:
    value_of(folder, b"h").unlink()
    result = lattice("check", folder)
    assert result.exit_code == 1
    assert 'workflow "flow" of tenant "x": code sha256:h: value ' in result.output


def test_check_shows_no_control_characters_of_ids(folder: Path) -> None:
    change(folder, "UPDATE runs SET run_id = ? WHERE number = 1", "\x1b[2Jrun")
    drop_event(folder)
    result = lattice("check", folder)
    assert '"\\u001b[2Jrun"' in result.output
    assert "\x1b" not in result.output


def content(folder: Path) -> list[Any]:
    """Return the values of all records, read as a server reads them."""
    with stopped_sqlite(folder) as opened:
        reader = opened.reader
        runs = [*reader.ended_runs(), *reader.live_runs()]
        return [
            (run.summary, reader.settings(run.run), [*reader.definitions(run.run)], [*reader.events(run.run)])
            for run in runs
        ]


@examples(200)
@given(data=st.data())
def test_check_finds_every_changed_byte_of_a_value(data: st.DataObject, folder: Path, tmp_path: Path) -> None:
    before, copy = content(folder), tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    path = data.draw(st.sampled_from(sorted([copy / "journal.sqlite", *(copy / "values").iterdir()])))
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        is_found = bool(found_in(copy))
    except JournalError:
        is_found = True
    if not is_found:
        assert content(copy) == before


@pytest.mark.parametrize("command", ["check", "export"])
def test_command_is_refused_while_a_server_has_the_journal(command: str, folder: Path) -> None:
    journal = open_sqlite(folder, Listening())
    try:
        result = lattice(command, folder)
    finally:
        journal.close()
    assert result.exit_code == 1
    assert "another server" in result.output
    assert "lattice journal backup" in result.output


@pytest.mark.parametrize("command", [["check"], ["export"], ["backup"]])
def test_command_says_that_there_is_no_journal(command: list[str], tmp_path: Path) -> None:
    result = lattice(*command, tmp_path / "none", *([tmp_path / "copy"] if command == ["backup"] else []))
    assert (result.exit_code, result.output) == (1, f"Error: there is no journal in {tmp_path / 'none'}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["check", "export", "backup"])
def test_command_refuses_a_journal_of_another_version(command: str, folder: Path, tmp_path: Path) -> None:
    change(folder, "PRAGMA user_version = 99")
    result = lattice(command, folder, *([tmp_path / "copy"] if command == "backup" else []))
    assert result.exit_code == 1
    assert "version 99" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"journal"}


def test_backup_has_all_records_and_can_be_continued(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "backups" / "today"
    result = lattice("backup", folder, copy)
    assert result.exit_code == 0, result.output
    assert "3 runs" in result.output
    assert content(copy) == content(folder)
    assert os.listdir(tmp_path / "backups") == ["today"]
    assert {path.name for path in (copy / "values").iterdir()} == {path.name for path in (folder / "values").iterdir()}
    fill(copy, EventRecorded(3, 2, b"more"))
    assert not found_in(copy)


def test_backup_refuses_a_folder_that_exists(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    result = lattice("backup", folder, tmp_path / "copy")
    assert result.exit_code == 1
    assert "exists" in result.output


def test_backup_copies_a_damaged_journal_and_names_the_damaged_run(folder: Path, tmp_path: Path) -> None:
    drop_value(folder)
    result = lattice("backup", folder, tmp_path / "copy")
    assert result.exit_code == 1
    assert 'run "run-1" of tenant "x": value ' in result.output
    assert len(found_in(tmp_path / "copy")) == 1


def test_backup_leaves_nothing_when_it_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup.shutil, "copyfile", fails)
    result = lattice("backup", folder, tmp_path / "copy")
    assert (result.exit_code, "No space left" in result.output) == (1, True)
    assert os.listdir(tmp_path) == ["journal"]


def test_backup_has_the_values_of_its_runs_when_a_run_is_deleted_meanwhile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, copy_database, copies = Listening(), backup._copy_database, list[set[str]]()
    journal = open_sqlite(folder, listening)

    def deletes_after(*folders: Path) -> set[str]:
        named = copy_database(*folders)
        copies.append(named)
        if len(copies) == 1:
            values = len(os.listdir(folder / "values"))
            store(journal, listening, RunDeleted(1), RunDeleted(2))
            while len(os.listdir(folder / "values")) == values:
                time.sleep(0.001)
            store(journal, listening, *whole(4, size=LARGE))
        return named

    monkeypatch.setattr(backup, "_copy_database", deletes_after)
    try:
        backup.back_up(folder, tmp_path / "copy")
    finally:
        journal.close()
    assert len(copies) == 2
    assert not found_in(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy" / "values").iterdir()} == copies[1]


@pytest.mark.slow
def test_backups_of_a_journal_under_load_have_all_that_was_acknowledged_before(tmp_path: Path) -> None:
    source, is_over = tmp_path / "journal", threading.Event()
    intended, notes = Notes(tmp_path / "intended"), tmp_path / "acknowledged"
    acknowledging = Acknowledging(Notes(notes))
    journal = open_sqlite(source, acknowledging, SETTINGS)

    def work() -> None:
        load = Load(Random(1))
        while not is_over.is_set():
            records = load.records()
            facts = [fact_of(record) for record in records]
            intended.add([fact for fact in facts if fact.startswith(("deleted", "unstored", "workflow"))])
            number = journal.append(records)
            acknowledging.expect(number, facts)
            while acknowledging.number < number and not is_over.is_set():
                time.sleep(0.0005)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for number in range(5):
            before = tmp_path / f"before-{number}"
            before.mkdir()
            while not notes.exists() or notes.stat().st_size < 2000 * (number + 1):
                assert worker.is_alive()
            shutil.copyfile(notes, before / "acknowledged")
            backup.back_up(source, before / "journal")
            shutil.copyfile(tmp_path / "intended", before / "intended")
    finally:
        is_over.set()
        worker.join()
        journal.close()
    for number in range(5):
        before = tmp_path / f"before-{number}"
        assert not found_in(before / "journal")
        copy = open_sqlite(before / "journal", Listening(), SETTINGS)
        try:
            assert check(before, copy) > 0
        finally:
            copy.close()


def test_export_has_every_record_as_json(tmp_path: Path) -> None:
    folder, output = tmp_path / "journal", tmp_path / "out.jsonl"
    fill(folder, *real(1, "x"), *real(2), WorkflowStored(1, "x", "flow", 2, 5.0, "print", b""))
    result = lattice("export", folder, "--output", output)
    assert (result.exit_code, result.output) == (0, "")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = ["run", "bundle", "function", "definition", "event"]
    assert [line["kind"] for line in lines] == [*kinds, "run", "definition", "event", "workflow"]
    run, bundle, function, definition, event = lines[:5]
    assert run == {
        "kind": "run",
        "run": 2,
        "tenant": "",
        "run_id": "run-2",
        "accepted": "1970-01-01T00:16:42.000+00:00",
        "ended": "1970-01-01T00:33:20.000+00:00",
        "results_read": False,
        "settings": {"run_id": "run-2", "labels": {"team": "search"}},
        "summary": {"run_id": "run-2", "state": "RUN_STATE_SUCCEEDED"},
    }
    assert bundle["bundle"] == {"digest": "sha256:b", "zip": "Y29kZSBvZiB0aGUgZnVuY3Rpb24="}
    assert function["function"]["display_name"] == "f"
    assert definition["definition"]["tasks"] == [{"task_id": "t"}]
    assert event["event"] == {"sequence": "1", "task_started": {"task_id": "t", "attempt": 1}}
    assert event["replay"] == {"lease_id": "lease-1"}
    assert lines[-1] == {
        "kind": "workflow",
        "tenant": "x",
        "workflow_id": "flow",
        "revision": 2,
        "stored": "1970-01-01T00:00:05.000+00:00",
        "definition": {},
    }


def test_export_has_the_runs_that_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "journal", *real(1), *real(2), *real(3))
    result = lattice("export", tmp_path / "journal", "--run", "run-1", "--run", "run-3")
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["run"] for line in lines if line["kind"] == "run"] == [3, 1]


def test_export_fails_when_there_is_no_run_of_a_given_id(tmp_path: Path) -> None:
    fill(tmp_path / "journal", *real(1))
    result = lattice("export", tmp_path / "journal", "--run", "run-1", "--run", "run-9")
    assert result.exit_code == 1
    assert result.stderr == 'Error: the journal has no run "run-9"\n'
    assert json.loads(result.stdout.partition("\n")[0])["kind"] == "run"


@pytest.mark.parametrize(
    "sql", ["UPDATE events SET body = x'00' WHERE run = 1", "DELETE FROM code WHERE digest = 'sha256:f'"]
)
def test_export_has_the_other_runs_when_one_is_damaged(sql: str, tmp_path: Path) -> None:
    fill(tmp_path / "journal", *real(1), *(real(2) if "events" in sql else []))
    change(tmp_path / "journal", sql)
    result = CliRunner().invoke(commands, ["export", str(tmp_path / "journal")])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.exit_code, lines[-1]["kind"], lines[-1]["run_id"]) == (1, "damage", "run-1")
    assert "1 runs or workflows are damaged" in result.stderr
    assert sum(line["kind"] == "event" for line in lines) == ("events" in sql)


def test_export_names_a_run_whose_event_is_no_message(tmp_path: Path) -> None:
    fill(tmp_path / "journal", *real(1)[:1], EventRecorded(1, 1, b"not a message"))
    result = lattice("export", tmp_path / "journal")
    assert result.exit_code == 1
    assert "a record is no RunEvent" in result.output
