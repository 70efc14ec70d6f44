"""A journal after the power was cut, on a simulated disk: all that was acknowledged is there."""

import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from lattice_server.engine.recording.journal_port import JournalBrokenError, JournalDamagedError
from lattice_server.journal.files import Files
from lattice_server.journal.sqlite import Sync, open_sqlite
from tests.server.journal.crashing import SETTINGS, Load, Notes, check, fact_of
from tests.server.journal.listening import Listening, accepted, event, store
from tests.server.journal.lossy_disk import LossyDisk


def cuts(folder: Path, sync: Sync, seeds: range) -> None:
    """Cut the power at random moments of one life of a journal after the other, and check what is left of each."""
    for seed in seeds:
        life, left = folder / f"life-{seed}", folder / f"left-{seed}"
        left.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            _live_and_cut(life, left, sync, seed, patch)
        journal = open_sqlite(left / "journal", Listening(), SETTINGS)
        try:
            assert check(left, journal) > 0
        finally:
            journal.close()


def _live_and_cut(life: Path, left: Path, sync: Sync, seed: int, patch: pytest.MonkeyPatch) -> None:
    disk = LossyDisk(life, patch)
    intended, acknowledged = Notes(left / "intended"), Notes(left / "acknowledged")
    listening = Listening()
    journal = open_sqlite(life, listening, replace(SETTINGS, sync=sync, connect=disk.connect))
    load, appended = Load(random.Random(seed)), list[tuple[int, list[str]]]()
    for _ in range(load.random.randint(20, 150)):
        records = load.records()
        facts = [fact_of(record) for record in records]
        intended.add([fact for fact in facts if fact.startswith(("deleted", "unstored", "workflow"))])
        appended.append((journal.append(records), facts))
        if load.random.random() < 0.2:
            listening.wait(appended[-1][0])
    # The acknowledged number is read first: more may be synced when the power is cut.
    listening.wait(appended[len(appended) // 2][0])
    number = listening.number
    disk.cut_power(left / "journal")
    acknowledged.add([fact for reached, facts in appended if reached <= number for fact in facts])
    journal.close()


def test_nothing_acknowledged_is_lost_when_the_power_is_cut(tmp_path: Path) -> None:
    cuts(tmp_path, Sync.FULL, range(8))


def test_check_finds_a_journal_that_does_not_sync_commits(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, sqlite3.Error, JournalDamagedError)):
        cuts(tmp_path, Sync.NORMAL, range(8))


def test_check_finds_a_journal_that_does_not_sync_names_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Files, "sync_names", lambda self: None)
    with pytest.raises(JournalDamagedError, match="value"):
        cuts(tmp_path, Sync.FULL, range(8))


def test_failed_sync_of_a_commit_is_never_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, listening = LossyDisk(tmp_path / "journal", monkeypatch), Listening()
    journal = open_sqlite(tmp_path / "journal", listening, replace(SETTINGS, connect=disk.connect))
    store(journal, listening, accepted(1))
    disk.fails_to_sync = True
    with pytest.raises(JournalBrokenError):
        listening.wait(journal.append([event(1, 1)]))
    disk.fails_to_sync = False
    with pytest.raises(JournalBrokenError):
        journal.append([event(1, 1)])
    assert listening.number == 1
    journal.close()
