"""The pid files by which `lattice stop` finds processes, and pid files that it must not trust."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lattice_server import pidfile

WAIT_S = 30.0
# Takes a signal for what its argument says.
PROGRAM = """
import signal, sys
from lattice_server import pidfile
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pidfile.note("it")
print("noted", flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the notes of this user go."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / f"lattice-{os.getuid()}"


@pytest.mark.parametrize("name", ["head-50051", "node-rack/1", "node-../../x", "node-" + "é" * 128])
def test_a_process_is_found_until_its_pid_file_is_deleted(name: str, folder: Path) -> None:
    pidfile.note(name)
    assert pidfile.find(name).pid == os.getpid()
    assert len(list(folder.iterdir())) == 1
    pidfile.forget(name)
    with pytest.raises(pidfile.NotRunningError):
        pidfile.find(name)


def test_notes_of_processes_that_were_killed_are_dropped(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"noted\n"
    pidfile.note("mine")
    assert sorted(path.name for path in folder.iterdir()) == ["it.json", "mine.json"]
    process.kill()
    process.wait()
    process.stdout.close()
    (folder / "damaged.json").write_text("{")
    pidfile.note("mine")
    assert [path.name for path in folder.iterdir()] == ["mine.json"]


def linked(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def a_file(folder: Path) -> None:
    folder.write_text("")


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def of_another(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    os.chown(folder, 65534, 65534)


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")


@pytest.mark.parametrize("made", [linked, a_file, open_to_all, pytest.param(of_another, marks=root_only)])
def test_a_folder_others_may_write_to_is_neither_written_nor_read(made: Callable[[Path], None], folder: Path) -> None:
    made(folder)
    for use in (pidfile.note, pidfile.find, pidfile.forget):
        with pytest.raises(pidfile.UnsafeError, match=str(folder)):
            use("head-1")
    assert not (folder.parent / "elsewhere" / "head-1.json").exists()


def test_a_number_given_to_another_process_since_is_not_signalled(folder: Path) -> None:
    pidfile.note("head-1")
    note = folder / "head-1.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"started": 1.0}))
    with pytest.raises(pidfile.NotRunningError):
        pidfile.stop("head-1", 0.0)


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """A process that noted itself as `it`."""
    how = getattr(request, "param", "")
    with subprocess.Popen([sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, text=True) as found:
        assert found.stdout is not None
        assert found.stdout.readline() == "noted\n"
        yield found
        found.kill()


def test_a_stopped_process_loses_its_pid_file(program: "subprocess.Popen[str]", folder: Path) -> None:
    pidfile.note("another")
    pidfile.stop("it", WAIT_S)
    assert not psutil.pid_exists(program.pid)
    assert [note.name for note in folder.iterdir()] == ["another.json"]
    with pytest.raises(pidfile.NotRunningError):
        pidfile.stop("it", WAIT_S)


def test_a_process_that_is_gone_is_not_found_and_its_pid_file_deleted(
    program: "subprocess.Popen[str]", folder: Path
) -> None:
    program.kill()
    program.wait()
    with pytest.raises(pidfile.NotRunningError):
        pidfile.find("it")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("program", ["deaf"], indirect=True)
def test_a_process_that_does_not_stop_in_time_keeps_its_pid_file(program: "subprocess.Popen[str]") -> None:
    with pytest.raises(psutil.TimeoutExpired):
        pidfile.stop("it", 0.1)
    assert pidfile.find("it").pid == program.pid


def test_a_folder_of_pid_files_is_writable_to_its_user_only(folder: Path) -> None:
    pidfile.note("it")
    assert folder.stat().st_mode & 0o777 == 0o700
