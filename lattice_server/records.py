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
    """Note that this process runs under a name; it keeps the name when it becomes another program."""
    _path(name).write_text(json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()}))


def forget(name: str) -> None:
    """Drop the note of a name."""
    _path(name).unlink(missing_ok=True)


def find(name: str) -> psutil.Process:
    """Return the process that runs under a name. Raises NotRunningError."""
    try:
        known = json.loads(_path(name).read_text())
        process = psutil.Process(known["pid"])
        # A process id may have been given to somebody else since.
        if process.create_time() == known["started"]:
            return process
    except (FileNotFoundError, psutil.NoSuchProcess):
        pass
    forget(name)
    raise NotRunningError(name)


def stop(name: str, wait_s: float) -> None:
    """Ask a process to stop and wait until it has. Raises NotRunningError, psutil.TimeoutExpired."""
    process = find(name)
    process.send_signal(signal.SIGTERM)
    process.wait(wait_s)
    forget(name)
