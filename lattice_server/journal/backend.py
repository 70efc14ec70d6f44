"""Owns the protocol between the thread that commits records and a database."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from lattice_server.core.frozen import frozen
from lattice_server.engine.recording.journal_port import JournalReader
from lattice_server.engine.recording.journal_records import Record
from lattice_server.journal.uses import Changes


@frozen
class Opened:
    """The state of a journal that was opened: its epoch, the newest numbers, the newest event of each live run."""

    epoch: int
    last_run: int
    last_workflow: int
    live: dict[int, int]


@frozen
class FileSizes:
    """The sizes of the files of a back end; see `JournalStats`."""

    file_bytes: int = 0
    log_bytes: int = 0
    free_bytes: int = 0


class Backend(Protocol):
    """A store of records. Any thread may use `reader`, `sizes` and the properties; one thread uses the rest."""

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
        """Do one short step of upkeep and commit its changes; return whether there was one to do."""

    def settle(self, changes: Changes) -> None:
        """Delete the files that committed changes left without a user."""

    def reader(self) -> AbstractContextManager[JournalReader]:
        """See `Journal`."""

    def sizes(self) -> FileSizes:
        """Return the sizes of the files."""

    def close(self) -> None:
        """Release everything."""
