"""Owns the protocols between the engine and a journal. Rule: the engine names no back end.

An appended record is durable once the listener was called with its commit number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from lattice_server.core.frozen import frozen
from lattice_server.engine.recording.journal_records import DroppedRun, Record, StoredEvent, StoredRun, StoredWorkflow

GIB = 1024 * 1024 * 1024
DAY_S = 86_400.0


# Takes of a commit: its records, their bytes, its duration, and the longest time that one of them has waited.
OnCommit = Callable[[int, int, float, float], object]


class JournalError(Exception):
    """Base of the errors that a journal raises."""


class JournalLockedError(JournalError):
    """Another server uses the journal."""


class JournalVersionError(JournalError):
    """A newer version of the server wrote the journal, or it is no journal at all."""


class JournalFullError(JournalError):
    """There is no room for new work. Records of work that was accepted are still taken."""


class JournalBusyError(JournalError):
    """Too many records wait to become durable; new work may be offered again soon."""


class JournalBrokenError(JournalError):
    """The journal cannot store anything any more, so nothing may be acknowledged: the server must stop."""


class JournalDamagedError(JournalError):
    """Records of one run or workflow cannot be read back. All others can."""


@frozen
class JournalRetention:
    """Bounds of the ended runs: their age, and for each tenant their number and the sum of their bytes.

    The runs whose results were read are deleted first, then the oldest. The end of a run never deletes the run itself.
    """

    age_s: float = 7 * DAY_S
    runs: int = 10_000
    kept_bytes: int = 10 * GIB


@frozen
class JournalStats:
    """The size of a journal: live and ended runs, and bytes.

    `pending_bytes` wait for a commit. `file_bytes` are the database with the values in files, of which `free_bytes` are
    unused and will be returned to the file system. `log_bytes` are the write-ahead log.
    """

    live_runs: int
    ended_runs: int
    pending_bytes: int
    file_bytes: int = 0
    log_bytes: int = 0
    free_bytes: int = 0


class JournalListener(Protocol):
    """Receives the progress of a journal. Called from any thread; must return at once and not raise."""

    def durable(self, number: int) -> None:
        """All records up to this commit number are durable."""

    def failed(self, error: JournalError) -> None:
        """The journal is broken. Nothing more becomes durable."""

    def dropped(self, runs: Sequence[DroppedRun], artifacts: Sequence[str]) -> None:
        """These runs were deleted; nothing that is recorded refers to these artifacts any more."""


class JournalReader(Protocol):
    """Reads durable records. One thread at a time may use a reader; all of its iterators need bounded memory.

    Every method raises JournalDamagedError for records that are damaged.
    """

    def live_runs(self) -> Iterator[StoredRun]:
        """Yield the runs that have not ended, oldest first."""

    def settings(self, run: int) -> bytes:
        """Return the settings of a run."""

    def definitions(self, run: int) -> Iterator[bytes]:
        """Yield the definition of a run, then its additions in order."""

    def events(self, run: int, after: int = 0) -> Iterator[StoredEvent]:
        """Yield the events of a run after a number, in order. Raises JournalDamagedError at the first gap.

        The events end early when the run is deleted meanwhile.
        """

    def find(self, run_id: str, tenant: str) -> StoredRun | None:
        """Return a tenant's newest run of this id; None when there is none."""

    def ended_runs(self, *, tenant: str | None = None, before: int | None = None, limit: int = 100) -> list[StoredRun]:
        """Return runs that have ended, the newest first: of one tenant or of all, and with a number below `before`."""

    def run_ids(self) -> Iterator[tuple[int, str, str]]:
        """Yield the number, the tenant and the id of each run, live ones included, in any order."""

    def workflows(self) -> Iterator[StoredWorkflow]:
        """Yield the stored workflows, oldest first."""

    def code(self, digest: str) -> bytes | None:
        """Return code by its digest; None when there is none."""

    def artifacts(self) -> Iterator[str]:
        """Yield the ids of all artifacts that a run or a workflow refers to."""


class Journal(Protocol):
    """The log of all accepted work, in order, over the life of many servers.

    `epoch` counts the times the journal was opened, from 1. The next run must have a number above `last_run`, the next
    workflow one above `last_workflow`. `on_commit` is called after each commit, on the journal's thread.
    """

    on_commit: OnCommit | None

    @property
    def epoch(self) -> int:
        """See above."""

    @property
    def last_run(self) -> int:
        """See above."""

    @property
    def last_workflow(self) -> int:
        """See above."""

    def append(self, records: Sequence[Record]) -> int:
        """Take records of work that was accepted, all or none; return their commit number. Never waits for the disk.

        Raises:
            JournalBrokenError: the journal is broken or closed.
            ValueError: an event is not the next one of its run, or a record is of a run that is not in its state.
        """

    def admit(self, records: Sequence[Record]) -> int:
        """As `append`, for records that begin new work.

        Raises:
            JournalBusyError: too many bytes wait to become durable.
            JournalFullError: there is no room for new work.
            JournalBrokenError, ValueError: see `append`.
        """

    def append_later(self, record: Record) -> None:
        """Take a record that nothing waits for. It is written with later ones, or when the journal is closed.

        Raises JournalBrokenError, ValueError: see `append`.
        """

    @property
    def is_busy(self) -> bool:
        """Whether so many bytes wait that workers should not be read for now."""

    def reader(self) -> AbstractContextManager[JournalReader]:
        """Return a reader to be used in a `with` statement."""

    def stats(self) -> JournalStats:
        """Return how much there is."""

    def close(self) -> None:
        """Make all appended records durable, and release the journal."""
