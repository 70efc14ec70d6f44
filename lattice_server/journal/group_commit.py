"""Owns the thread that makes records durable. Rule: a commit takes all records that came during the last one; no timer.

A single record waits for one commit. Under load the commits become larger, not the time to wait. A record that nothing
waits for causes no commit of its own, which the next record would have to wait for.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from lattice_server.core.frozen import frozen
from lattice_server.engine.recording.journal_port import (
    JournalBrokenError,
    JournalBusyError,
    JournalError,
    JournalFullError,
    JournalListener,
    JournalReader,
    JournalStats,
    OnCommit,
)
from lattice_server.engine.recording.journal_records import (
    Code,
    EventRecorded,
    Record,
    RunAccepted,
    RunEnded,
    TasksDefined,
    WorkflowStored,
)
from lattice_server.journal.backend import Backend
from lattice_server.journal.failpoints import failpoint
from lattice_server.journal.order import Order
from lattice_server.journal.uses import Changes

MIB = 1024 * 1024
RECORD_BYTES = 200  # The memory of a record besides its values.
LATER_RECORDS = 256  # So many records that nothing waits for are committed by themselves.


@frozen
class Limits:
    """Bounds of one commit, and of the bytes that wait for commits before new work is refused."""

    commit_records: int = 1000
    commit_bytes: int = 4 * MIB
    pending_bytes: int = 64 * MIB


class GroupCommit:
    """A `Journal` over a back end. `append` and `admit` may be called from any thread."""

    def __init__(self, backend: Backend, listener: JournalListener, limits: Limits) -> None:
        self._backend = backend
        self._listener = listener
        self._limits = limits
        self.epoch = backend.opened.epoch
        self.on_commit: OnCommit | None = None
        self._order = Order(dict(backend.opened.live), backend.opened.last_run, backend.opened.last_workflow)
        self._queue = _Queue(limits)
        self._thread = threading.Thread(target=self._run, name="lattice-journal", daemon=True)
        self._thread.start()

    @property
    def last_run(self) -> int:
        """See `Journal`."""
        return self._order.last_run

    @property
    def last_workflow(self) -> int:
        """See `Journal`."""
        return self._order.last_workflow

    @property
    def is_busy(self) -> bool:
        """See `Journal`."""
        return self._queue.pending_bytes > self._limits.pending_bytes

    def append(self, records: Sequence[Record]) -> int:
        """See `Journal`."""
        return self._queue.put(records, self._order)

    def admit(self, records: Sequence[Record]) -> int:
        """See `Journal`."""
        if self._backend.is_full:
            raise JournalFullError("the disk is full, so no new work is accepted")
        if self.is_busy:
            text = (
                f"{self._queue.pending_bytes} bytes wait to become durable; the limit is {self._limits.pending_bytes}"
            )
            raise JournalBusyError(text)
        return self.append(records)

    def append_later(self, record: Record) -> None:
        """See `Journal`."""
        self._queue.put_later(record, self._order)

    def reader(self) -> AbstractContextManager[JournalReader]:
        """See `Journal`."""
        return self._backend.reader()

    def stats(self) -> JournalStats:
        """See `Journal`."""
        sizes = self._backend.sizes()
        return JournalStats(
            self._order.live_runs,
            self._backend.ended_runs,
            self._queue.pending_bytes,
            sizes.file_bytes,
            sizes.log_bytes,
            sizes.free_bytes,
        )

    def close(self) -> None:
        """See `Journal`."""
        self._queue.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            has_chores = True  # An earlier process may have left some.
            while (batch := self._queue.take(waits=not has_chores)) is not None:
                if batch.appends or batch.records:
                    self._commit(batch)
                has_chores = self._chore(is_idle=not batch.appends) or batch.appends > 0
            failpoint("close.before")
            self._backend.close()
        except Exception as error:
            broken = error if isinstance(error, JournalError) else JournalBrokenError(f"the journal failed: {error}")
            self._queue.fail(broken)
            self._listener.failed(broken)
            # The same error may come again, and the listener has been told.
            with suppress(Exception):
                self._backend.close()

    def _commit(self, batch: "_Batch") -> None:
        failpoint("commit.before_begin")
        started_at = time.monotonic()
        changes = self._backend.commit(batch.records, batch.size_bytes) if batch.records else Changes()
        ended_at = time.monotonic()
        failpoint("commit.after_commit")
        self._queue.finish(batch)
        self._listener.durable(batch.number)
        if self.on_commit is not None and batch.records:
            self.on_commit(len(batch.records), batch.size_bytes, ended_at - started_at, ended_at - batch.oldest_at)
        failpoint("commit.after_acknowledge")
        self._settle(changes)

    def _chore(self, *, is_idle: bool) -> bool:
        changes = Changes()
        try:
            has_done = self._backend.chore(changes, is_idle=is_idle)
        except JournalFullError:
            return False  # It is tried again after the next commit.
        self._settle(changes)
        return has_done

    def _settle(self, changes: Changes) -> None:
        self._backend.settle(changes)
        if changes.runs or changes.artifacts:
            self._listener.dropped(changes.runs, changes.artifacts)


@dataclass(slots=True)
class _Batch:
    """The records of some appends, the first at `oldest_at`, and the commit number of the last of them."""

    records: list[Record]
    oldest_at: float = 0.0
    appends: int = 0
    size_bytes: int = 0
    number: int = 0


class _Queue:
    """The records that wait for a commit. Any thread adds records; one thread takes them."""

    def __init__(self, limits: Limits) -> None:
        self.pending_bytes = 0
        self._limits = limits
        self._waiting: deque[tuple[Sequence[Record], int, float]] = deque()
        self._later: list[Record] = []
        self._number = 0
        self._taken = 0
        self._is_closed = False
        self._failure: JournalError | None = None
        self._changed = threading.Condition()

    def put(self, records: Sequence[Record], order: Order) -> int:
        """Add records that are in order. Raises ValueError, JournalBrokenError."""
        with self._changed:
            self._check(records, order)
            return self._add(records)

    def put_later(self, record: Record, order: Order) -> None:
        """Add a record to the next batch, whenever that is. Raises as `put`."""
        with self._changed:
            self._check([record], order)
            self._later.append(record)
            if len(self._later) == LATER_RECORDS:
                later, self._later = self._later, []
                self._add(later)

    def _check(self, records: Sequence[Record], order: Order) -> None:
        if self._failure is not None or self._is_closed:
            raise JournalBrokenError(str(self._failure or "the journal is closed"))
        order.check(records)

    def _add(self, records: Sequence[Record]) -> int:
        size = sum(map(_size_of, records))
        self._waiting.append((records, size, time.monotonic()))
        self.pending_bytes += size
        self._number += 1
        self._changed.notify()
        return self._number

    def take(self, *, waits: bool) -> _Batch | None:
        """Return the next records, within the bounds of one commit; None when closed and empty."""
        with self._changed:
            while waits and not self._waiting and not self._is_closed:
                self._changed.wait()
            if self._is_closed and not self._waiting and not self._later:
                return None
            batch = _Batch([], self._waiting[0][2] if self._waiting else time.monotonic())
            while self._waiting and len(batch.records) < self._limits.commit_records:
                records, size, _ = self._waiting[0]
                if batch.records and batch.size_bytes + size > self._limits.commit_bytes:
                    break
                self._waiting.popleft()
                batch.records += records
                batch.size_bytes += size
                batch.appends += 1
            if batch.records or self._is_closed:
                batch.records += self._later
                self._later = []
            self._taken += batch.appends
            batch.number = self._taken
            return batch

    def finish(self, batch: _Batch) -> None:
        """Count a batch as durable."""
        with self._changed:
            self.pending_bytes -= batch.size_bytes

    def fail(self, failure: JournalError) -> None:
        """Refuse everything from now on."""
        with self._changed:
            self._failure = failure
            self._waiting.clear()

    def close(self) -> None:
        """Take nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()


def _size_of(record: Record) -> int:
    match record:
        case EventRecorded():
            return RECORD_BYTES + len(record.body) + len(record.replay)
        case RunAccepted():
            return RECORD_BYTES + len(record.settings) + len(record.definition) + _code_bytes(record.code)
        case TasksDefined() | WorkflowStored():
            return RECORD_BYTES + len(record.definition) + _code_bytes(record.code)
        case RunEnded():
            return RECORD_BYTES + len(record.summary)
        case _:
            return RECORD_BYTES


def _code_bytes(code: Sequence[Code]) -> int:
    return sum(item.size_bytes for item in code)
