"""Owns the records of runs and stored workflows in the journal, on the main thread.

Rule: a decision about accepted work is appended before anything waits for it; new work that cannot be recorded is
refused. Answers wait for the newest append, see `wait`.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from lattice_server.core.errors import ExhaustedError, LatticeError, UnavailableError
from lattice_server.core.messages import TasksAdded, TaskSucceeded
from lattice_server.core.model import Artifact, Function, Payload, TaskSpec
from lattice_server.core.run.dag import artifacts_in
from lattice_server.core.steps import finish
from lattice_server.engine.recording.durability import Durability
from lattice_server.engine.recording.journal_port import Journal, JournalBusyError, JournalError, JournalFullError
from lattice_server.engine.recording.journal_records import (
    EventRecorded,
    Record,
    ResultsRead,
    RunAccepted,
    RunDeleted,
    RunEnded,
    TasksDefined,
    WorkflowDeleted,
    WorkflowStored,
)
from lattice_server.engine.recording.run_codec import RunCodec
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.references import functions_of

RETRY_AFTER_S = 1.0
NEVER = 1 << 62  # The number of an append that the journal did not take.

log = logging.getLogger(__name__)


class StorableWorkflow(Protocol):
    """A stored workflow, as it is recorded; see `WorkflowEntry`."""

    workflow_id: str
    tenant: str
    number: int
    revision: int
    created_s: float
    fingerprint: str
    functions: dict[str, Function]
    definition: object
    artifacts: list[Artifact]


class RunJournal:
    """The journal as the orchestrator and its parts use it. `on_end` is called when the end of a run is recorded."""

    def __init__(self, journal: Journal, durability: Durability, codec: RunCodec) -> None:
        self.journal = journal
        self.codec = codec
        self._durability = durability
        self._newest = 0
        self._is_frozen = False
        self.on_end: Callable[[RunEntry], object] = lambda entry: None

    @property
    def is_durable(self) -> bool:
        """Whether all appended records are durable."""
        return self._newest <= self._durability.number

    async def wait(self) -> None:
        """Wait until all that is appended by now is durable. Raises UnavailableError when it never will be."""
        try:
            await self._durability.wait(self._newest)
        except JournalError as error:
            raise _stopping(error) from None

    def when_durable(self, call: Callable[[], object]) -> None:
        """Call something once all that is appended by now is durable; never when it never will be."""
        self._durability.when(self._newest, call)

    def accept(self, entry: RunEntry, definition: bytes, parameters: Mapping[str, Payload]) -> None:
        """Record a run that is about to start.

        Raises:
            ExhaustedError: JOURNAL_FULL or JOURNAL_BUSY; the run must not start.
            UnavailableError: the server is stopping, because its journal broke.
        """
        if entry.is_transient:
            return
        artifacts = [*entry.run.dag.artifacts, *artifacts_of(parameters.values())]
        self._admit(
            RunAccepted(
                entry.number,
                entry.run.tenant,
                entry.run_id,
                entry.created_s,
                entry.fingerprint,
                entry.request_id,
                self.codec.settings(entry, parameters),
                definition,
                self.codec.code(entry.functions.values()),
                _ids(artifacts),
            )
        )

    def note(self, entry: RunEntry) -> None:
        """Record the events of a run that are new."""
        events = entry.log.events
        if entry.is_transient or entry.recorded == len(events):
            return
        records: list[Record] = []
        for event in events[entry.recorded :]:
            fact = event.fact
            if isinstance(fact, TasksAdded) and not _is_map(entry, fact.parent_task_id):
                records.append(self._addition(entry, [entry.run.tasks[task_id].spec for task_id in fact.task_ids]))
            artifacts: Sequence[Artifact] = ()
            if isinstance(fact, TaskSucceeded):
                split = (payload for items in fact.split.values() for payload in items)
                artifacts = artifacts_of([*fact.outputs.values(), *split])
            body, replay = self.codec.event(entry, event)
            records.append(EventRecorded(entry.number, event.sequence, body, replay, _ids(artifacts)))
        entry.recorded = len(events)
        self._append(records)

    def end(self, entry: RunEntry) -> None:
        """Record the end of a run."""
        if entry.is_transient:
            return
        self._append([RunEnded(entry.number, entry.ended_s or time.time(), self.codec.summary(entry))])
        self.on_end(entry)

    def give_up(self, run: int) -> None:
        """Record the end of a run that cannot be read."""
        self._append([RunEnded(run, time.time(), b"")])

    def close(self, entry: RunEntry) -> None:
        """Record that the caller of an open run closes it."""
        self._append([TasksDefined(entry.number, b"")])

    def delete(self, run: int) -> None:
        """Record that a run which has ended is deleted."""
        self._append([RunDeleted(run)])

    def note_read(self, entry: RunEntry) -> None:
        """Record that a caller was given the results of a run."""
        if entry.is_transient or self._is_frozen:
            return
        # A journal that broke has told its listener.
        with suppress(JournalError):
            self.journal.append_later(ResultsRead(entry.number))

    def store(self, entry: StorableWorkflow) -> None:
        """Record a stored workflow. Raises as `accept`."""
        self._admit(
            WorkflowStored(
                entry.number,
                entry.tenant,
                entry.workflow_id,
                entry.revision,
                entry.created_s,
                entry.fingerprint,
                self.codec.stored(entry.definition),
                self.codec.code(entry.functions.values()),
                _ids(entry.artifacts),
            )
        )

    def unstore(self, number: int) -> None:
        """Record that a stored workflow was deleted."""
        self._append([WorkflowDeleted(number)])

    def freeze(self) -> None:
        """Record nothing more. Earlier records become durable; answers about later changes are not sent."""
        self._newest, self._is_frozen = NEVER, True

    def _addition(self, entry: RunEntry, tasks: Sequence[TaskSpec]) -> TasksDefined:
        definition, entry.definition = entry.definition, None
        code = self.codec.code(finish(functions_of(tasks)).values())
        if definition is None:
            definition = finish(self.codec.tasks(tasks))
        return TasksDefined(entry.number, definition, code, _ids(artifacts_in(tasks)))

    def _admit(self, record: RunAccepted | WorkflowStored) -> None:
        if self._is_frozen:
            raise UnavailableError("SHUTTING_DOWN", "the server is stopping", retry_after_s=RETRY_AFTER_S)
        try:
            self._newest = self.journal.admit([record])
        except JournalFullError as error:
            raise ExhaustedError("JOURNAL_FULL", f"the journal takes no new work: {error}") from None
        except JournalBusyError as error:
            raise ExhaustedError("JOURNAL_BUSY", str(error), retry_after_s=RETRY_AFTER_S) from None
        except JournalError as error:
            raise _stopping(error) from None

    def _append(self, records: Sequence[Record]) -> None:
        if self._is_frozen:
            return
        try:
            self._newest = self.journal.append(records)
        except JournalError as error:
            # The server is about to stop. Until then, no answer reports an unrecorded change.
            if self._newest != NEVER:
                log.critical("the journal takes nothing more: %s", error)
            self._newest = NEVER


def artifacts_of(payloads: Iterable[Payload]) -> list[Artifact]:
    """Return the large values among payloads."""
    return [payload.content for payload in payloads if isinstance(payload.content, Artifact)]


def _is_map(entry: RunEntry, task_id: str) -> bool:
    record = entry.run.tasks.get(task_id)
    return record is not None and bool(record.spec.over)


def _ids(artifacts: Iterable[Artifact]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(artifact.artifact_id for artifact in artifacts))


def _stopping(error: JournalError) -> LatticeError:
    return UnavailableError("SHUTTING_DOWN", f"the server is stopping, because its journal failed: {error}")
