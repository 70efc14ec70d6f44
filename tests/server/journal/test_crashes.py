"""A journal after its process was killed: all that was acknowledged is there, once and in order."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lattice_server.engine.recording.journal_port import JournalDamagedError
from lattice_server.journal.failpoints import NAMES, VARIABLE
from lattice_server.journal.sqlite import open_sqlite
from tests.server.journal.crashing import PLACE, SETTINGS, check
from tests.server.journal.listening import Listening

pytestmark = pytest.mark.slow

STEPS = 250
# Reached once in the life of a process, or of a journal.
ONCE = frozenset(name for name in NAMES if name.startswith(("open.", "close.")) or name == "chores.before_sweep")


def start(
    folder: Path, seed: int, failpoints: str = "", steps: int = STEPS, mutant: str = "", place: str = ""
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.server.journal.crashing", str(folder), str(seed), str(steps), mutant]
    return subprocess.Popen(command, env=os.environ | {VARIABLE: failpoints, PLACE: place}, stdout=subprocess.PIPE)


def died(process: "subprocess.Popen[bytes]") -> int:
    output, _ = process.communicate(timeout=100)
    assert not output, output
    return process.returncode


def checked(folder: Path) -> tuple[int, int]:
    """Check the journal in a folder, and that no file is left that nothing uses; return its epoch and the facts."""
    listening = Listening()
    journal = open_sqlite(folder / "journal", listening, SETTINGS)
    try:
        facts = check(folder, journal)
        deadline = time.monotonic() + 20.0
        # The journal deletes files meanwhile, so the two lists are read again until they agree.
        while (found := (files(folder), used_files(folder)))[0] != found[1] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert listening.error is None
        assert found[0] == found[1]
        return journal.epoch, facts
    finally:
        journal.close()


def files(folder: Path) -> set[str]:
    return set(os.listdir(folder / "journal" / "values"))


def used_files(folder: Path) -> set[str]:
    connection = sqlite3.connect(f"file:{folder}/journal/journal.sqlite?mode=ro", uri=True)
    try:
        rows = connection.execute("SELECT DISTINCT name FROM uses WHERE name LIKE 'file:%'").fetchall()
    finally:
        connection.close()
    return {name.partition(":")[2] for (name,) in rows}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_nothing_acknowledged_is_lost_when_killed_at(name: str, tmp_path: Path) -> None:
    first = died(start(tmp_path, 1, f"{name}=kill@1"))
    assert first == -signal.SIGKILL, "the point was not reached"
    if (tmp_path / "journal" / "journal.sqlite").exists():
        checked(tmp_path)
    if name not in ONCE:
        assert died(start(tmp_path, 2, f"{name}=kill@3")) == -signal.SIGKILL
    assert died(start(tmp_path, 3, steps=60)) == 0
    _, facts = checked(tmp_path)
    assert facts


@pytest.mark.parametrize(
    ("mutant", "point"),
    [("acknowledges_first", "commit.before_commit"), ("notes_no_files", "commit.after_commit")],
)
def test_check_finds_a_journal_that(mutant: str, point: str, tmp_path: Path) -> None:
    for seed, reached in enumerate(range(3, 20)):
        assert died(start(tmp_path, seed, f"{point}=kill@{reached}", mutant=mutant)) == -signal.SIGKILL
        try:
            checked(tmp_path)
        except (AssertionError, JournalDamagedError):
            return
    pytest.fail("the check passes")


@pytest.mark.parametrize("name", ["file.before_sync", "file.before_rename", "commit.before_commit"])
def test_nothing_is_acknowledged_after_the_disk_failed_at(name: str, tmp_path: Path) -> None:
    process = start(tmp_path, 1, f"{name}=error@3")
    output, _ = process.communicate(timeout=100)
    # The journal's thread tells of the failure, and meanwhile an append may be refused for it.
    assert process.returncode in {1, 3}
    assert b"JournalBrokenError" in output
    checked(tmp_path)


def test_nothing_acknowledged_is_lost_when_killed_again_and_again(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 5)


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_nothing_acknowledged_is_lost_when_killed_a_hundred_times(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 100)


def kill_at_random(folder: Path, times: int) -> None:
    dice, epochs, facts, acknowledged = random.Random(7), [0], [0], folder / "acknowledged"
    for seed in range(times):
        process = start(folder, seed, steps=100_000)
        goal = count(acknowledged) + dice.randint(1, 300)
        deadline = time.monotonic() + 60.0
        while count(acknowledged) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(dice.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert died(process) == -signal.SIGKILL
        epoch, found = checked(folder)
        epochs.append(epoch)
        facts.append(found)
    assert epochs == list(range(0, 2 * times + 1, 2))
    assert facts == sorted(set(facts))


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
