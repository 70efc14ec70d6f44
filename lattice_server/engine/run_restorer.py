"""Makes runs again from the journal, on the main thread: live ones at the start, ended ones when a caller asks.

Rule: a run that cannot be read does not stop the others.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lattice_server.core.errors import LatticeError, PreconditionError
from lattice_server.core.frozen import frozen
from lattice_server.core.messages import TasksAdded, TaskSucceeded
from lattice_server.core.model import Function, Payload, TaskSpec
from lattice_server.core.run import dag
from lattice_server.core.run.restoration import Restoration, RestorationError
from lattice_server.core.run.run import Run
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.steps import STEP_ITEMS, Steps, finish, stepwise
from lattice_server.core.tenancy import Reach, Shelf, key_of
from lattice_server.engine.admission import Admission
from lattice_server.engine.ended_runs import EndedRuns
from lattice_server.engine.journal_port import JournalDamagedError, JournalReader
from lattice_server.engine.journal_records import DroppedRun, StoredEvent, StoredRun
from lattice_server.engine.run_driver import RunDriver
from lattice_server.engine.run_entry import RunEntry
from lattice_server.engine.run_journal import RunJournal, artifacts_of
from lattice_server.engine.run_starter import RunStarter
from lattice_server.engine.run_stores import RunStores, functions_of
from lattice_server.engine.slices import Slices
from lattice_server.engine.workflow_restorer import code_of

UNREADABLE = (JournalDamagedError, RestorationError, LatticeError, ValueError, KeyError)
PAGE = 1000

log = logging.getLogger(__name__)


@frozen
class _Recorded:
    """The records of one run in the journal, besides its code."""

    stored: StoredRun
    settings: bytes
    definitions: list[bytes]
    events: list[StoredEvent]


@dataclass(slots=True)
class _Made:
    """A run that was made again, and its code."""

    entry: RunEntry
    restoration: Restoration
    functions: dict[str, Function]
    parameters: Mapping[str, Payload]


class RunRestorer:
    """Restores runs into `runs`. `ended_numbers` has the numbers of the ended runs that the journal has."""

    def __init__(
        self,
        runs: Shelf[RunEntry],
        ended: EndedRuns,
        stores: RunStores,
        admission: Admission,
        driver: RunDriver,
        starter: RunStarter,
        journal: RunJournal,
        slices: Slices,
    ) -> None:
        self._runs = runs
        self._ended = ended
        self._stores = stores
        self._admission = admission
        self._driver = driver
        self._starter = starter
        self._journal = journal
        self._slices = slices
        self.ended_numbers: Shelf[int] = Shelf()
        self._deleted: set[int] = set()  # Until the journal has done it.
        self._recalls: dict[int, asyncio.Task[None]] = {}
        journal.on_end = self._note_end

    def restore(self) -> None:
        """Restore and continue all live runs, before the server takes requests."""
        with self._journal.journal.reader() as reader:
            before: int | None = None
            while page := reader.ended_runs(before=before, limit=PAGE):
                for stored in page:
                    # The newest come first, and a tenant's newest run of an id is meant.
                    key = key_of(stored.run_id, stored.tenant)
                    if key not in self.ended_numbers:
                        self.ended_numbers[key] = stored.run
                before = page[-1].run
            for stored in list(reader.live_runs()):
                try:
                    made = finish(self._making(_read(reader, stored)))
                    self._continue(made)
                except UNREADABLE as error:
                    log.error("a run cannot be restored: %s", error, extra={"run_id": stored.run_id})
                    self._give_up(stored)

    def _note_end(self, entry: RunEntry) -> None:
        self.ended_numbers[entry.key] = entry.number

    def delete(self, run_id: str, reach: Reach) -> bool:
        """Delete an ended run from the journal without reading it; return whether the journal has it."""
        number = self.ended_numbers.find(run_id, reach)
        if number is None or number in self._deleted:
            return False
        self._deleted.add(number)
        self._journal.delete(number)
        return True

    def forget(self, dropped: Sequence[DroppedRun]) -> None:
        """Note that the journal has deleted runs."""
        for run in dropped:
            key = key_of(run.run_id, run.tenant)
            self._deleted.discard(run.run)
            if self.ended_numbers.get(key) == run.run:
                del self.ended_numbers[key]
                self._ended.note_evicted(key, run.fingerprint)

    async def recall(self, run_id: str, reach: Reach) -> None:
        """Have an ended run that only the journal has in memory again; do nothing for any other run.

        Raises PreconditionError, JOURNAL_CORRUPT, when its records are damaged.
        """
        if self._runs.find(run_id, reach) is not None:
            return
        number = self.ended_numbers.find(run_id, reach)
        if number is None:
            return
        if (task := self._recalls.get(number)) is None:
            task = self._recalls[number] = asyncio.ensure_future(self._recall(run_id, reach, number))
            task.add_done_callback(lambda _: self._recalls.pop(number, None))
        await asyncio.shield(task)

    async def _recall(self, run_id: str, reach: Reach, number: int) -> None:
        try:
            recorded = await asyncio.to_thread(self._read_ended, number)
            if recorded is None:
                return
            made = await self._slices.finish(self._making(recorded))
        except UNREADABLE as error:
            log.error("a run cannot be read: %s", error, extra={"run_id": run_id})
            text = f"the records of run {run_id!r} are damaged, so it cannot be shown: {error}"
            raise PreconditionError("JOURNAL_CORRUPT", text, metadata={"run_id": run_id}) from None
        entry, stored = made.entry, recorded.stored
        entry.ended_s = stored.ended_s
        if entry.key in self._runs:
            return
        self._runs[entry.key] = entry
        entry.functions = made.functions
        self._hold_values(made)
        self._ended.add(entry)
        if stored.is_read:
            self._ended.note_read(entry)

    def _read_ended(self, number: int) -> _Recorded | None:
        with self._journal.journal.reader() as reader:
            found = reader.ended_runs(before=number + 1, limit=1)
            return _read(reader, found[0]) if found and found[0].run == number else None

    def _code(self, digest: str) -> bytes:
        with self._journal.journal.reader() as reader:
            return code_of(reader, digest)

    def _making(self, recorded: _Recorded) -> Steps[_Made]:
        """Make a run and apply its events, in steps."""
        stored, codec = recorded.stored, self._journal.codec
        if stored.damage:
            raise JournalDamagedError(stored.damage)
        settings = codec.read_settings(recorded.settings)
        # An empty one notes that its caller closed the run.
        definitions = iter(definition for definition in recorded.definitions if definition)
        spec = yield from codec.read_workflow(next(definitions), self._code)
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
        made = _Made(entry, run.restoring(), functions, settings.parameters)
        yield from self._applying(made, recorded, definitions)
        return made

    def _applying(self, made: _Made, recorded: _Recorded, definitions: Iterator[bytes]) -> Steps[None]:
        entry, codec = made.entry, self._journal.codec
        # The machines count monotonic time, which began anew if the computer was started again.
        offset_s = time.time() - time.monotonic()
        for found, is_step in stepwise(recorded.events):
            told = codec.read_event(entry.key, found.body, found.replay)
            fact = told.event.fact
            added: Sequence[TaskSpec] = ()
            if isinstance(fact, TasksAdded) and not _is_map(entry.run.tasks, fact.parent_task_id):
                tasks = (yield from codec.read_workflow(next(definitions, b""), self._code)).tasks
                made.functions |= yield from functions_of(tasks)
                added = tasks
            at = told.happened_s - offset_s
            made.restoration.apply(fact, at, added=added, queued_s=told.queued_s, is_called=told.is_called)
            entry.note_times(fact, offset_s)
            entry.log.append(fact, told.event.time_s)
            if is_step:
                yield
        entry.recorded = len(recorded.events)

    def _continue(self, made: _Made) -> None:
        entry = made.entry
        self._stores.hold_code(entry, made.functions)
        self._runs[entry.key] = entry
        self._hold_values(made)
        self._starter.arm(entry)
        with self._driver.change(entry) as perform:
            if entry.log.events:
                perform(entry.run.resume(made.restoration, time.monotonic()))
            else:
                perform(entry.run.start(made.parameters, time.monotonic()))

    def _hold_values(self, made: _Made) -> None:
        """Have a run reference the large values in its parameters and outputs; `RunDriver` adds those in its graph."""
        entry = made.entry
        self._stores.hold_artifacts(entry, artifacts_of(made.parameters.values()), entry.run.tenant)
        for event in entry.log.events:
            if isinstance(event.fact, TaskSucceeded):
                self._stores.hold_outputs(entry, event.fact)
        if entry.ended_s is not None:
            self._stores.hold_graph(entry, entry.run.tenant)

    def _give_up(self, stored: StoredRun) -> None:
        """End a run that cannot be restored, so that it counts as ended after the next start as well."""
        self._journal.give_up(stored.run)
        self.ended_numbers[key_of(stored.run_id, stored.tenant)] = stored.run


def _read(reader: JournalReader, stored: StoredRun) -> _Recorded:
    run = stored.run
    return _Recorded(stored, reader.settings(run), list(reader.definitions(run)), list(reader.events(run)))


def _is_map(tasks: Mapping[str, TaskRecord], task_id: str) -> bool:
    record = tasks.get(task_id)
    return record is not None and bool(record.spec.over)
