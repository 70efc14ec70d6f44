"""Owns the notes by which `lattice stop` finds what runs here. Rule: nothing is signalled by its number alone."""

import json
import os
import signal
import tempfile
from pathlib import Path

import psutil


class NotRunningError(Exception):
    """Nothing of this user runs under that name."""


def _path(name: str) -> Path:
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"lattice-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{name}.json"


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
