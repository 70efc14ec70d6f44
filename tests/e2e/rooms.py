"""Rooms: folders in which running tasks and a test meet. Rule: neither sleeps to wait for the other.

A task that enters a room notes its name, stays until the test opens the room, and notes that it leaves.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from lattice_client import Run

WAIT_S = 60.0


def enter(room: str, name: str) -> None:
    """Stay in a room until it is open; called by tasks."""
    note(room, f"+{name}")
    print(f"{name} is in the room")
    pauses = _pauses()
    while not (Path(room) / "open").exists():
        if next(pauses, None) is None:
            raise TimeoutError(f"{room} was not opened")
    note(room, f"-{name}")


def _pauses() -> Iterator[bool]:
    """Pause longer and longer, so that many tasks which wait leave the processor to others; end after a time."""
    deadline, pause_s = time.monotonic() + WAIT_S, 0.01
    while time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.1)
        yield True


def note(room: str, text: str) -> None:
    """Write a line into this room; called by tasks."""
    descriptor = os.open(Path(room) / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


class Room(str):
    """The folder, as the test has it; tasks get it as a string."""

    def open(self) -> None:
        """Let all waiting tasks continue, now and later."""
        (Path(self) / "open").touch()

    def notes(self) -> list[str]:
        """Return the noted lines, in order."""
        path = Path(self) / "notes"
        return path.read_text().splitlines() if path.exists() else []

    def crowd(self) -> int:
        """Return how many were in the room at most at the same time."""
        most = inside = 0
        for line in self.notes():
            inside += {"+": 1, "-": -1}.get(line[0], 0)
            most = max(most, inside)
        return most


def until(run: Run, type_: str, *task_ids: str) -> None:
    """Wait until each of these tasks had an event of this type; it is an error when the run ends before."""
    missing = set(task_ids)
    for event in run.events(timeout=WAIT_S):
        if event.type == type_:
            missing.discard(event.task_id)
        if not missing:
            return
    raise AssertionError(f"no {type_} of {', '.join(missing)}")


def noted(room: Room, text: str) -> None:
    """Wait until a line was written into a room; no server tells of it."""
    pauses = _pauses()
    while text not in room.notes():
        assert next(pauses, None), f"{text!r} was not noted"


def entered(run: Run, *task_ids: str) -> None:
    """Wait until each of these tasks is in a room."""
    until(run, "task_log", *task_ids)


def started(run: Run, *task_ids: str) -> None:
    """Wait until each of these tasks has started."""
    until(run, "task_started", *task_ids)
