"""Owns what stores records for the thread that commits them, as a protocol."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from lattice_server.engine.journal_port import JournalReader
from lattice_server.engine.journal_records import Record
from lattice_server.journal.uses import Changes


@dataclass(frozen=True, slots=True)
class Opened:
    """What a back end found: how often it was opened, the newest numbers, and the newest event of each live run."""

    epoch: int
    last_run: int
    last_workflow: int
    live: dict[int, int]


@dataclass(frozen=True, slots=True)
class FileSizes:
    """What the files of a back end take; see `JournalStats`."""

    file_bytes: int = 0
    log_bytes: int = 0
    free_bytes: int = 0


class Backend(Protocol):
    """Where records are stored. But for `reader`, `is_full` and `sizes`, only the thread of `GroupCommit` uses it."""

    opened: Opened

    @property
    def is_full(self) -> bool:
        """Whether new work is to be refused."""

    @property
    def ended_runs(self) -> int:
        """How many runs have ended."""

    def commit(self, records: Sequence[Record], size_bytes: int) -> Changes:
        """Make records durable. Raises JournalError, after which nothing may be committed."""

    def chore(self, changes: Changes, *, is_idle: bool) -> bool:
        """Do one short step of upkeep, whose changes are committed then; return whether there was one to do."""

    def settle(self, changes: Changes) -> None:
        """Delete what committed changes leave without a user."""

    def reader(self) -> AbstractContextManager[JournalReader]:
        """See `Journal`."""

    def sizes(self) -> FileSizes:
        """Return what the files take."""

    def close(self) -> None:
        """Release everything."""
