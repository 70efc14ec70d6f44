"""Owns the notes by which `lattice stop` finds what runs here. Rule: nothing is signalled by its number alone."""

import hashlib
import json
import os
import signal
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psutil

MAX_NAME = 200


class NotRunningError(Exception):
    """Nothing of this user runs under that name."""


class UnsafeError(Exception):
    """Others may write where the notes are to lie; the message names the place."""


def check() -> Path:
    """Return the folder of the notes. Raises UnsafeError.

    Where all users keep what is temporary, another may have made a folder of this name: its links would have this
    process write anywhere, and its notes would have it signal any process of this user.
    """
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"lattice-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeError(f"{folder} is not a folder that only you may write to; remove it, or set XDG_RUNTIME_DIR")
    return folder


def _path(name: str) -> Path:
    # A node may be called what is no name of a file, or too long for one.
    quoted = quote(name, safe="")
    return check() / f"{quoted if len(quoted) <= MAX_NAME else hashlib.sha256(name.encode()).hexdigest()}.json"


def note(name: str) -> None:
    """Note that this process runs under a name; it keeps the name when it becomes another program.

    Notes of processes that were killed are dropped.
    """
    for path in check().glob("*.json"):
        if _process_of(path) is None:
            path.unlink(missing_ok=True)
    path = _path(name)
    # In one step: another process that starts now must not take half a note for one of a process that was killed.
    whole = path.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()}))
    whole.replace(path)


def forget(name: str) -> None:
    """Drop the note of a name."""
    _path(name).unlink(missing_ok=True)


def find(name: str) -> psutil.Process:
    """Return the process that runs under a name. Raises NotRunningError."""
    if (process := _process_of(_path(name))) is None:
        forget(name)
        raise NotRunningError(name)
    return process


def _process_of(path: Path) -> psutil.Process | None:
    """Return the process that a note is about, if it runs."""
    try:
        known = json.loads(path.read_text())
        process = psutil.Process(known["pid"])
        # A process id may have been given to somebody else since.
        return process if process.create_time() == known["started"] else None
    except (FileNotFoundError, psutil.NoSuchProcess, ValueError, KeyError, TypeError):
        return None


def stop(name: str, wait_s: float) -> None:
    """Ask a process to stop and wait until it has. Raises NotRunningError, psutil.TimeoutExpired."""
    process = find(name)
    process.send_signal(signal.SIGTERM)
    process.wait(wait_s)
    forget(name)
