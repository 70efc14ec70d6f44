"""The notes by which `lattice stop` finds what runs, and whom they must not obey."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lattice_server import records


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the notes of this user go."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / f"lattice-{os.getuid()}"


@pytest.mark.parametrize("name", ["head-50051", "node-rack/1", "node-../../x", "node-" + "é" * 128])
def test_what_is_noted_is_found_until_it_is_forgotten(name: str, folder: Path) -> None:
    records.note(name)
    assert records.find(name).pid == os.getpid()
    assert len(list(folder.iterdir())) == 1
    records.forget(name)
    with pytest.raises(records.NotRunningError):
        records.find(name)


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
    for use in (records.note, records.find, records.forget):
        with pytest.raises(records.UnsafeError, match=str(folder)):
            use("head-1")
    assert not (folder.parent / "elsewhere" / "head-1.json").exists()


def test_a_number_given_to_another_process_since_is_not_signalled(folder: Path) -> None:
    records.note("head-1")
    note = folder / "head-1.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"started": 1.0}))
    with pytest.raises(records.NotRunningError):
        records.stop("head-1", 0.0)
