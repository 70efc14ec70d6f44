"""Owns the pid files by which `lattice stop` finds processes. Rule: no process is signalled by its number alone."""

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
    """No process of this user runs under that name."""


class UnsafeError(Exception):
    """Other users may write to the folder of the pid files; the message names it."""


def check() -> Path:
    """Return the folder of the pid files. Raises UnsafeError.

    In a folder for all users, another user may have made a folder of this name. Links in it would make this process
    write anywhere, and pid files in it would make it signal any process of this user.
    """
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"lattice-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeError(f"{folder} is not a folder that only you may write to; remove it, or set XDG_RUNTIME_DIR")
    return folder


def _path(name: str) -> Path:
    # The name of a node may be no file name, or too long for one.
    quoted = quote(name, safe="")
    return check() / f"{quoted if len(quoted) <= MAX_NAME else hashlib.sha256(name.encode()).hexdigest()}.json"


def note(name: str) -> None:
    """Write the pid file of this process under a name; it stays valid when the process executes another program.

    Pid files of processes that were killed are deleted.
    """
    for path in check().glob("*.json"):
        if _process_of(path) is None:
            path.unlink(missing_ok=True)
    path = _path(name)
    # Written and renamed: another process that starts now must not take half a file for that of a killed process.
    whole = path.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()}))
    whole.replace(path)


def forget(name: str) -> None:
    """Delete the pid file of a name."""
    _path(name).unlink(missing_ok=True)


def find(name: str) -> psutil.Process:
    """Return the process that runs under a name. Raises NotRunningError."""
    if (process := _process_of(_path(name))) is None:
        forget(name)
        raise NotRunningError(name)
    return process


def _process_of(path: Path) -> psutil.Process | None:
    """Return the process of a pid file, if it runs."""
    try:
        known = json.loads(path.read_text())
        process = psutil.Process(known["pid"])
        # The process id may belong to another process by now.
        return process if process.create_time() == known["started"] else None
    except (FileNotFoundError, psutil.NoSuchProcess, ValueError, KeyError, TypeError):
        return None


def stop(name: str, wait_s: float) -> None:
    """Ask a process to stop and wait until it has. Raises NotRunningError, psutil.TimeoutExpired."""
    process = find(name)
    process.send_signal(signal.SIGTERM)
    process.wait(wait_s)
    forget(name)
