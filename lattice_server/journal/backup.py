"""Owns copying a journal in a folder, also while a server uses it. Rule: a folder of the given name is a whole copy.

The database is copied in one read transaction. Values in files never change, but a server may delete one after the
database was copied, with the run that used it. Then the database is copied again, and only new values after it.
"""

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from lattice_server.engine.recording.journal_port import JournalError
from lattice_server.journal.files import sync_folder
from lattice_server.journal.sqlite import DATABASE, VALUES
from lattice_server.journal.sqlite_database import SqliteDatabase, connect, translated
from lattice_server.journal.stopped import check_sqlite_version

ATTEMPTS = 20
NAMED = "SELECT DISTINCT substr(name, 6) FROM uses WHERE name >= 'file:' AND name < 'file;'"


def back_up(folder: Path, target: Path) -> None:
    """Copy the journal in a folder to a new folder. Raises JournalError, OSError."""
    if not (folder / DATABASE).is_file():
        raise JournalError(f"there is no journal in {folder}")
    if target.exists():
        raise JournalError(f"{target} exists; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (draft / VALUES).mkdir(mode=0o700)
        _copy(folder, draft)
        draft.rename(target)
        sync_folder(target.parent)
    except sqlite3.Error as error:
        raise translated(error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy(folder: Path, draft: Path) -> None:
    missing: set[str] = set()
    for _ in range(ATTEMPTS):
        named = _copy_database(folder, draft)
        # A value that was missing before the database was copied is not one of a deleted run: it is damage.
        if (still_missing := _copy_values(folder, draft, named)) <= missing:
            break
        missing = still_missing
    else:
        raise JournalError(f"runs of the journal in {folder} are deleted faster than they can be copied; try again")
    for name in set(os.listdir(draft / VALUES)) - named:
        (draft / VALUES / name).unlink()
    sync_folder(draft / VALUES)
    sync_folder(draft)


def _copy_database(folder: Path, draft: Path) -> set[str]:
    """Copy the database; return the names of the values in files that the copy needs."""
    with closing(connect(folder / DATABASE, True)) as source, closing(connect(draft / DATABASE, False)) as copy:
        check_sqlite_version(SqliteDatabase(source))
        source.backup(copy)
        return {name for (name,) in copy.execute(NAMED)}


def _copy_values(folder: Path, draft: Path, named: set[str]) -> set[str]:
    """Copy the values that are not there yet; return the names of values that the journal lacks too."""
    missing = set()
    for name in named - set(os.listdir(draft / VALUES)):
        try:
            shutil.copyfile(folder / VALUES / name, draft / VALUES / name)
        except FileNotFoundError:
            missing.add(name)
            continue
        with (draft / VALUES / name).open("rb") as file:
            os.fsync(file.fileno())
    return missing
