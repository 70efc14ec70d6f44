"""A listener for tests, and records that tests write."""

import threading
from collections.abc import Sequence
from typing import Any

from lattice_server.engine.recording.journal_port import Journal, JournalError
from lattice_server.engine.recording.journal_records import (
    Code,
    DroppedRun,
    EventRecorded,
    Record,
    RunAccepted,
    RunEnded,
)

WAIT_S = 30.0


class Listening:
    """Remembers all calls, and waits for them."""

    def __init__(self) -> None:
        self.number = 0
        self.numbers: list[int] = []
        self.error: JournalError | None = None
        self.runs: list[DroppedRun] = []
        self.artifacts: list[str] = []
        self._told = threading.Condition()

    def durable(self, number: int) -> None:
        with self._told:
            self.number = number
            self.numbers.append(number)
            self._told.notify_all()

    def failed(self, error: JournalError) -> None:
        with self._told:
            self.error = error
            self._told.notify_all()

    def dropped(self, runs: Sequence[DroppedRun], artifacts: Sequence[str]) -> None:
        with self._told:
            self.runs += runs
            self.artifacts += artifacts
            self._told.notify_all()

    def wait(self, number: int) -> None:
        """Wait until a commit is durable. Raises the error of a journal that broke."""
        self.until(lambda: self.number >= number or self.error is not None)
        if self.number < number and self.error is not None:
            raise self.error

    def until(self, condition: Any) -> None:
        """Wait until a condition on the calls is true."""
        with self._told:
            assert self._told.wait_for(condition, WAIT_S), "the journal did not tell it in time"


def code(name: str, data: bytes = b"") -> Code:
    content = data or name.encode()
    return Code(f"sha256:{name}", len(content), lambda: content)


def accepted(run: int, tenant: str = "", **changes: Any) -> RunAccepted:
    values: dict[str, Any] = {
        "run_id": f"run-{run}",
        "accepted_s": 1000.0 + run,
        "fingerprint": f"print-{run}",
        "request_id": "",
        "settings": b"settings %d" % run,
        "definition": b"definition %d" % run,
    }
    return RunAccepted(run, tenant, **(values | changes))


def event(run: int, sequence: int, size: int = 0) -> EventRecorded:
    return EventRecorded(run, sequence, b"event %d of run %d " % (sequence, run) + b"." * size)


def ended(run: int, ended_s: float = 0.0) -> RunEnded:
    return RunEnded(run, ended_s or 2000.0 + run, b"summary %d" % run)


def whole(run: int, tenant: str = "", events: int = 2, size: int = 0, **changes: Any) -> list[Record]:
    """Return the records of a run from its start to its end."""
    numbered = [event(run, sequence, size) for sequence in range(1, events + 1)]
    return [accepted(run, tenant, **changes), *numbered, ended(run)]


def store(journal: Journal, listening: Listening, *records: Record) -> None:
    """Append records and wait until they are durable."""
    listening.wait(journal.append(records))
