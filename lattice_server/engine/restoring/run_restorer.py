"""Makes runs again from the journal, on the main thread: live ones after the start, ended ones when a caller asks.

Rule: a run that cannot be read does not stop the others. A run that a caller names is restored before the others.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from lattice_server import background
from lattice_server.core.errors import PreconditionError, UnavailableError
from lattice_server.core.messages import TaskSucceeded
from lattice_server.core.tenancy import Reach, Shelf, key_of
from lattice_server.engine.commands.driver import RunDriver
from lattice_server.engine.commands.starter import RunStarter
from lattice_server.engine.recording.journal_records import DroppedRun, StoredRun
from lattice_server.engine.recording.run_journal import RunJournal, artifacts_of
from lattice_server.engine.restoring.run_maker import UNREADABLE, Made, Recorded, RunMaker, Specs, records_of
from lattice_server.engine.runs.ended_runs import EndedRuns
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.references import RunStores
from lattice_server.engine.slices import Slices

log = logging.getLogger(__name__)


class RunRestorer:
    """Restores runs into `runs`.

    `ended_numbers` has the numbers of the ended runs that the journal has, `waiting` the live runs that are still to be
    restored. `on_restored` is called once when there are no more of these.
    """

    def __init__(
        self,
        runs: Shelf[RunEntry],
        ended: EndedRuns,
        stores: RunStores,
        maker: RunMaker,
        driver: RunDriver,
        starter: RunStarter,
        journal: RunJournal,
        slices: Slices,
    ) -> None:
        self._runs = runs
        self._ended = ended
        self._stores = stores
        self._maker = maker
        self._driver = driver
        self._starter = starter
        self._journal = journal
        self._slices = slices
        self.ended_numbers: Shelf[int] = Shelf()
        self.waiting: Shelf[StoredRun] = Shelf()
        self._deleted: set[int] = set()  # Until the journal has done it.
        self._works: dict[int, asyncio.Task[None]] = {}  # By the number of the run that is being made again.
        self._specs: Specs = {}
        self._restored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_restored: Callable[[], object] = lambda: None
        journal.on_end = self._note_end

    def list_runs(self) -> None:
        """Read which runs the journal has, before the server takes requests."""
        with self._journal.journal.reader() as reader:
            for stored in reader.live_runs():
                self.waiting[key_of(stored.run_id, stored.tenant)] = stored
            live = {stored.run for stored in self.waiting.values()}
            # The oldest come first: a tenant's newest run of an id is meant.
            for number, tenant, run_id in sorted(reader.run_ids()):
                if number not in live:
                    self.ended_numbers[key_of(run_id, tenant)] = number

    async def restore(self) -> None:
        """Restore and continue all live runs, while the server takes requests."""
        for stored in list(self.waiting.values()):
            if key_of(stored.run_id, stored.tenant) in self.waiting:
                await self._once(stored.run, partial(self._restore, stored))
        self._specs.clear()
        self.on_restored()
        self._restored.set_result(None)

    async def restored(self) -> None:
        """Wait until all live runs are restored. Raises UnavailableError when the server stops before."""
        await asyncio.shield(self._restored)

    def stop(self) -> None:
        """Restore no more runs, because the server stops."""
        for work in self._works.values():
            work.cancel()
        if not self._restored.done():
            self._restored.set_exception(_stopping())
            self._restored.exception()  # No call may be waiting.

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
        """Have a run that only the journal has in memory: a live one, or one that has ended.

        Waits for all live runs when there is no run of this id, because the caller may start one.

        Raises:
            PreconditionError: JOURNAL_CORRUPT, its records are damaged.
            UnavailableError: the server is stopping.
        """
        if (stored := self.waiting.find(run_id, reach)) is not None:
            await self._once(stored.run, partial(self._restore, stored))
        if self._runs.find(run_id, reach) is not None:
            return
        if (number := self.ended_numbers.find(run_id, reach)) is not None:
            await self._once(number, partial(self._recall, run_id, reach, number))
        else:
            await self.restored()

    async def _once(self, number: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Make a run again, once for all that wait for it."""
        if (task := self._works.get(number)) is None:
            task = self._works[number] = background.share(work())
            task.add_done_callback(lambda _: self._works.pop(number, None))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise _stopping() from None
            raise

    async def _restore(self, stored: StoredRun) -> None:
        """Restore and continue a live run."""
        key = key_of(stored.run_id, stored.tenant)
        try:
            recorded = await asyncio.to_thread(self._read, stored)
            made = await self._slices.finish(self._maker.making(recorded, self._specs))
            self._continue(made)
        except UNREADABLE as error:
            log.error("a run cannot be restored: %s", error, extra={"run_id": stored.run_id})
            # It counts as ended after the next start as well, and a caller is told why it cannot be read.
            self._journal.give_up(stored.run)
            await self._journal.wait()
            self.ended_numbers[key] = stored.run
        del self.waiting[key]

    async def _recall(self, run_id: str, reach: Reach, number: int) -> None:
        try:
            recorded = await asyncio.to_thread(self._read_ended, number)
            if recorded is None:
                return
            made = await self._slices.finish(self._maker.making(recorded, {}))
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

    def _read(self, stored: StoredRun) -> Recorded:
        with self._journal.journal.reader() as reader:
            return records_of(reader, stored)

    def _read_ended(self, number: int) -> Recorded | None:
        with self._journal.journal.reader() as reader:
            found = reader.ended_runs(before=number + 1, limit=1)
            return records_of(reader, found[0]) if found and found[0].run == number else None

    def _continue(self, made: Made) -> None:
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

    def _hold_values(self, made: Made) -> None:
        """Have a run reference the large values in its parameters and outputs; `RunDriver` adds those in its graph."""
        entry = made.entry
        self._stores.hold_artifacts(entry, artifacts_of(made.parameters.values()), entry.run.tenant)
        for event in entry.log.events:
            if isinstance(event.fact, TaskSucceeded):
                self._stores.hold_outputs(entry, event.fact)
        if entry.ended_s is not None:
            self._stores.hold_graph(entry, entry.run.tenant)


def _stopping() -> UnavailableError:
    return UnavailableError("SHUTTING_DOWN", "the server is stopping", retry_after_s=1.0)
