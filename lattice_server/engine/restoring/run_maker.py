"""Makes runs again from their records in the journal, in steps. Rule: nothing else changes by that."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from lattice_server.core.errors import LatticeError
from lattice_server.core.frozen import frozen
from lattice_server.core.messages import TasksAdded
from lattice_server.core.model import Function, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.restoration import Restoration, RestorationError
from lattice_server.core.run.run import Run
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.steps import STEP_ITEMS, Steps, stepwise
from lattice_server.core.tenancy import key_of
from lattice_server.engine.recording.journal_port import JournalDamagedError, JournalReader
from lattice_server.engine.recording.journal_records import StoredEvent, StoredRun
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.references import functions_of
from lattice_server.engine.workflows.workflow_restorer import code_of

# The errors of a run whose records are damaged, or do not fit together.
UNREADABLE = (JournalDamagedError, RestorationError, LatticeError, ValueError, KeyError)
# Workflows that were read, by the tenant and the digest of the definition.
Specs = dict[tuple[str, bytes], WorkflowSpec]


@frozen
class Recorded:
    """The records of one run in the journal, besides its code."""

    stored: StoredRun
    settings: bytes
    definitions: list[bytes]
    events: list[StoredEvent]


@dataclass(slots=True)
class Made:
    """A run that was made again, and its code."""

    entry: RunEntry
    restoration: Restoration
    functions: dict[str, Function]
    parameters: Mapping[str, Payload]


class RunMaker:
    """Makes runs; lives on the main thread."""

    def __init__(self, admission: Admission, journal: RunJournal) -> None:
        self._admission = admission
        self._journal = journal

    def making(self, recorded: Recorded, known: Specs) -> Steps[Made]:
        """Make a run and apply its events, in steps. Runs with equal definitions share one workflow."""
        stored, codec = recorded.stored, self._journal.codec
        if stored.damage:
            raise JournalDamagedError(stored.damage)
        settings = codec.read_settings(recorded.settings)
        # An empty one notes that its caller closed the run.
        definitions = iter(definition for definition in recorded.definitions if definition)
        definition = next(definitions)
        key = (stored.tenant, sha256(definition).digest())
        if (spec := known.get(key)) is None:
            spec = known[key] = yield from codec.read_workflow(definition, self._code)
        functions = yield from functions_of(spec.tasks)
        graph = yield from dag.building(spec, settings.parameters)
        run = Run(
            key_of(stored.run_id, stored.tenant),
            spec,
            graph,
            settings.workflow_id,
            settings.priority,
            tenant=stored.tenant,
            bounds=self._admission.bounds,
            slice_tasks=STEP_ITEMS,
            is_open=settings.is_open and b"" not in recorded.definitions,
        )
        run.retried_run_id = settings.retried_run_id
        run.provide(settings.parameters)
        entry = RunEntry(
            run,
            stored.run,
            stored.fingerprint,
            stored.accepted_s,
            settings.labels,
            sum(payload.kept_bytes for payload in settings.parameters.values()),
            stored.request_id,
            timeout_s=settings.timeout_s,
            disconnect_grace_s=settings.disconnect_grace_s,
        )
        made = Made(entry, run.restoring(), functions, settings.parameters)
        yield from self._applying(made, recorded, definitions)
        return made

    def _applying(self, made: Made, recorded: Recorded, definitions: Iterator[bytes]) -> Steps[None]:
        entry, codec = made.entry, self._journal.codec
        # The machines count monotonic time, which began anew if the computer was started again.
        now = time.monotonic()
        offset_s = time.time() - now
        for found, is_step in stepwise(recorded.events):
            told = codec.read_event(entry.key, found.body, found.replay)
            fact = told.event.fact
            added: Sequence[TaskSpec] = ()
            if isinstance(fact, TasksAdded) and not _is_map(entry.run.tasks, fact.parent_task_id):
                tasks = (yield from codec.read_workflow(next(definitions, b""), self._code)).tasks
                made.functions |= yield from functions_of(tasks)
                added = tasks
            # Not in the future, where limits would count from: the clock of the computer may have been set back.
            at = min(told.happened_s - offset_s, now)
            made.restoration.apply(fact, at, added=added, queued_s=told.queued_s, is_called=told.is_called)
            entry.note_times(fact, offset_s)
            entry.log.append(fact, told.event.time_s)
            if is_step:
                yield
        entry.recorded = len(recorded.events)

    def _code(self, digest: str) -> bytes:
        with self._journal.journal.reader() as reader:
            return code_of(reader, digest)


def records_of(reader: JournalReader, stored: StoredRun) -> Recorded:
    """Read the records of a run. Raises JournalDamagedError."""
    run = stored.run
    return Recorded(stored, reader.settings(run), list(reader.definitions(run)), list(reader.events(run)))


def _is_map(tasks: Mapping[str, TaskRecord], task_id: str) -> bool:
    record = tasks.get(task_id)
    return record is not None and bool(record.spec.over)
