"""A journal in memory, which is the model that the others are compared with. Records count as durable at once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import assert_never

from lattice_server.engine.recording.journal_port import (
    JournalBrokenError,
    JournalDamagedError,
    JournalListener,
    JournalReader,
    JournalRetention,
    JournalStats,
)
from lattice_server.engine.recording.journal_records import (
    Code,
    DroppedRun,
    EventRecorded,
    Record,
    ResultsRead,
    RunAccepted,
    RunDeleted,
    RunEnded,
    StoredEvent,
    StoredRun,
    StoredWorkflow,
    TasksDefined,
    WorkflowDeleted,
    WorkflowStored,
)
from lattice_server.journal.order import Order
from lattice_server.journal.retention import EndedTotals
from lattice_server.journal.uses import run_user, workflow_user


@dataclass(slots=True)
class _Run:
    accepted: RunAccepted
    definitions: list[bytes]
    events: list[StoredEvent] = field(default_factory=list)
    kept_bytes: int = 0
    ended: RunEnded | None = None
    is_read: bool = False

    def stored(self) -> StoredRun:
        """Return the run as a reader sees it."""
        accepted, ended = self.accepted, self.ended
        return StoredRun(
            accepted.run,
            accepted.tenant,
            accepted.run_id,
            accepted.accepted_s,
            accepted.fingerprint,
            accepted.request_id,
            None if ended is None else ended.ended_s,
            self.is_read,
            len(self.events),
            self.kept_bytes,
            b"" if ended is None else ended.summary,
        )


@dataclass(slots=True)
class _Queue:
    """The ended runs of a tenant. Retention deletes the runs that were read first."""

    read: dict[int, None] = field(default_factory=dict)
    unread: dict[int, None] = field(default_factory=dict)

    def note_read(self, number: int) -> None:
        """Have a run deleted among the first."""
        if self.unread.pop(number, 0) is None:
            self.read[number] = None

    def discard(self, number: int) -> None:
        """Forget a run."""
        self.read.pop(number, None)
        self.unread.pop(number, None)


class MemoryJournal:
    """A `Journal`."""

    epoch = 1

    def __init__(self, listener: JournalListener, retention: JournalRetention | None = None) -> None:
        self._listener = listener
        self._retention = retention or JournalRetention()
        self._order = Order({})
        self._totals = EndedTotals(self._retention)
        self._runs: dict[int, _Run] = {}
        self._by_end: dict[int, None] = {}
        self._queues: dict[str, _Queue] = {}
        self._workflows: dict[int, StoredWorkflow] = {}
        self._uses = _Names()
        self._number = 0
        self._dropped: list[DroppedRun] = []
        self._is_closed = False
        self._lock = RLock()

    @property
    def last_run(self) -> int:
        """See `Journal`."""
        return self._order.last_run

    @property
    def last_workflow(self) -> int:
        """See `Journal`."""
        return self._order.last_workflow

    def append_later(self, record: Record) -> None:
        """See `Journal`."""
        self.append([record])

    @property
    def is_busy(self) -> bool:
        """See `Journal`."""
        return False

    def append(self, records: Sequence[Record]) -> int:
        """See `Journal`."""
        with self._lock:
            if self._is_closed:
                raise JournalBrokenError("the journal is closed")
            self._order.check(records)
            for record in records:
                self._take(record)
            self._number += 1
            number = self._number
            runs, self._dropped = self._dropped, []
            artifacts = self._uses.take_dropped()
        self._listener.durable(number)
        if runs or artifacts:
            self._listener.dropped(runs, artifacts)
        return number

    def admit(self, records: Sequence[Record]) -> int:
        """See `Journal`."""
        return self.append(records)

    @contextmanager
    def reader(self) -> Iterator[JournalReader]:
        """See `Journal`."""
        yield _Reader(self._runs, self._workflows, self._uses, self._lock)

    def stats(self) -> JournalStats:
        """See `Journal`."""
        return JournalStats(self._order.live_runs, self._totals.runs, 0)

    def close(self) -> None:
        """See `Journal`."""
        self._is_closed = True

    def _take(self, record: Record) -> None:
        match record:
            case RunAccepted(run=number):
                self._runs[number] = _Run(record, [record.definition])
                self._runs[number].kept_bytes = len(record.settings) + len(record.definition)
                self._uses.add(run_user(number), record.code, record.artifacts)
            case TasksDefined(run=number):
                self._runs[number].definitions.append(record.definition)
                self._runs[number].kept_bytes += len(record.definition)
                self._uses.add(run_user(number), record.code, record.artifacts)
            case EventRecorded(run=number):
                run = self._runs[number]
                run.events.append(StoredEvent(record.sequence, record.body, record.replay))
                run.kept_bytes += len(record.body) + len(record.replay)
                self._uses.add(run_user(number), (), record.artifacts)
            case RunEnded(run=number):
                run = self._runs[number]
                run.ended = record
                run.kept_bytes += len(record.summary)
                self._totals.add(run.accepted.tenant, run.kept_bytes)
                self._by_end[number] = None
                self._queues.setdefault(run.accepted.tenant, _Queue()).unread[number] = None
                self._retain(run.accepted.tenant, record)
            case ResultsRead(run=number):
                if number in self._runs:
                    self._runs[number].is_read = True
                    self._queues[self._runs[number].accepted.tenant].note_read(number)
            case RunDeleted(run=number):
                self._delete(number)
            case WorkflowStored(number=number):
                fields = (record.workflow_id, record.revision, record.stored_s, record.fingerprint, record.definition)
                self._workflows[number] = StoredWorkflow(number, record.tenant, *fields)
                self._uses.replace(workflow_user(number), record.code, record.artifacts)
            case WorkflowDeleted(number=number):
                self._workflows.pop(number, None)
                self._uses.replace(workflow_user(number), (), ())
            case _:
                assert_never(record)

    def _retain(self, tenant: str, record: RunEnded) -> None:
        oldest_s = self._totals.oldest_s(record.ended_s)
        while (ended := self._runs[next(iter(self._by_end))].ended) is not None and ended.ended_s < oldest_s:
            self._delete(ended.run)
        queue = self._queues[tenant]
        while self._totals.is_over(tenant):
            self._delete(next(iter(queue.read or queue.unread)))

    def _delete(self, number: int) -> None:
        run = self._runs.pop(number, None)
        if run is not None:
            accepted = run.accepted
            del self._by_end[number]
            self._queues[accepted.tenant].discard(number)
            self._totals.remove(accepted.tenant, run.kept_bytes)
            self._dropped.append(DroppedRun(number, accepted.tenant, accepted.run_id, accepted.fingerprint))
            self._uses.replace(run_user(number), (), ())


class _Names:
    """Which runs and workflows use which code and artifacts, and the code."""

    def __init__(self) -> None:
        self.code: dict[str, bytes] = {}
        self.artifacts: dict[str, set[str]] = {}
        self._users_of_code: dict[str, set[str]] = {}
        self._names: dict[str, set[tuple[bool, str]]] = {}
        self._dropped: list[str] = []

    def add(self, user: str, code: Iterable[Code], artifacts: Iterable[str]) -> None:
        """Note that a user uses these."""
        names = self._names.setdefault(user, set())
        for item in code:
            if item.digest not in self.code:
                self.code[item.digest] = item.encode()
            self._users_of_code.setdefault(item.digest, set()).add(user)
            names.add((True, item.digest))
        for artifact in artifacts:
            self.artifacts.setdefault(artifact, set()).add(user)
            names.add((False, artifact))

    def replace(self, user: str, code: Sequence[Code], artifacts: Sequence[str]) -> None:
        """Note that a user uses these and nothing else."""
        before = self._names.pop(user, set())
        self.add(user, code, artifacts)
        for is_code, name in before - self._names[user]:
            users = (self._users_of_code if is_code else self.artifacts)[name]
            users.discard(user)
            if not users and is_code:
                del self._users_of_code[name], self.code[name]
            elif not users:
                del self.artifacts[name]
                self._dropped.append(name)
        if not self._names[user]:
            del self._names[user]

    def take_dropped(self) -> list[str]:
        """Return the artifacts that nothing has used since the last call."""
        dropped, self._dropped = self._dropped, []
        return [name for name in dropped if name not in self.artifacts]


class _Reader:
    """A `JournalReader`. It copies before it yields, since the journal changes meanwhile."""

    def __init__(self, runs: dict[int, _Run], workflows: dict[int, StoredWorkflow], names: _Names, lock: RLock) -> None:
        self._runs = runs
        self._workflows = workflows
        self._names = names
        self._lock = lock

    def live_runs(self) -> Iterator[StoredRun]:
        """See `JournalReader`."""
        with self._lock:
            found = [run.stored() for run in self._runs.values() if run.ended is None]
        yield from found

    def settings(self, run: int) -> bytes:
        """See `JournalReader`."""
        return self._find(run).accepted.settings

    def definitions(self, run: int) -> Iterator[bytes]:
        """See `JournalReader`."""
        yield from list(self._find(run).definitions)

    def events(self, run: int, after: int = 0) -> Iterator[StoredEvent]:
        """See `JournalReader`."""
        found = self._runs.get(run)
        yield from found.events[after:] if found is not None else ()

    def find(self, run_id: str, tenant: str) -> StoredRun | None:
        """See `JournalReader`."""
        with self._lock:
            for run in reversed(self._runs.values()):
                if (run.accepted.run_id, run.accepted.tenant) == (run_id, tenant):
                    return run.stored()
        return None

    def ended_runs(self, *, tenant: str | None = None, before: int | None = None, limit: int = 100) -> list[StoredRun]:
        """See `JournalReader`."""
        found: list[StoredRun] = []
        with self._lock:
            for number, run in reversed(self._runs.items()):
                is_wanted = run.ended is not None and tenant in (None, run.accepted.tenant)
                if is_wanted and (before is None or number < before) and len(found) < limit:
                    found.append(run.stored())
        return found

    def run_ids(self) -> Iterator[tuple[int, str, str]]:
        """See `JournalReader`."""
        with self._lock:
            found = [(number, run.accepted.tenant, run.accepted.run_id) for number, run in self._runs.items()]
        yield from found

    def workflows(self) -> Iterator[StoredWorkflow]:
        """See `JournalReader`."""
        with self._lock:
            found = list(self._workflows.values())
        yield from found

    def code(self, digest: str) -> bytes | None:
        """See `JournalReader`."""
        return self._names.code.get(digest)

    def artifacts(self) -> Iterator[str]:
        """See `JournalReader`."""
        with self._lock:
            found = sorted(self._names.artifacts)
        yield from found

    def _find(self, run: int) -> _Run:
        found = self._runs.get(run)
        if found is None:
            raise JournalDamagedError(f"there is no run {run}")
        return found
