"""Lists runs, the live ones and the ended ones. Rule: a run is listed once, by its number, newest first."""

import asyncio
import heapq
from collections.abc import Container, Iterable, Mapping

from lattice.v1 import run_pb2

from lattice_server.core.frozen import frozen
from lattice_server.core.tenancy import Reach
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.rpc.convert.runs import RUN_STATE_TO_PROTO, run_to_view

PAGE = 200
Item = RunEntry | run_pb2.Run


@frozen
class RunFilter:
    """Which runs a caller asks for: in one of these states, with these labels, of one tenant or within reach."""

    states: Container[int]
    labels: Mapping[str, str]
    tenant: str
    reach: Reach

    def has(self, entry: RunEntry) -> bool:
        """Whether a run in memory is one of them."""
        return self._has(RUN_STATE_TO_PROTO[entry.run.state], entry.run.tenant, entry.labels)

    def has_recorded(self, run: run_pb2.Run) -> bool:
        """Whether a run of the journal is one of them."""
        return self._has(run.state, run.tenant, run.labels)

    def _has(self, state: int, tenant: str, labels: Mapping[str, str]) -> bool:
        return (
            (not self.states or state in self.states)
            and (tenant == self.tenant if self.tenant else self.reach.covers(tenant))
            and all(labels.get(key) == value for key, value in self.labels.items())
        )


async def rows_of(
    orchestrator: Orchestrator, wanted: RunFilter, before: int | None, limit: int
) -> Iterable[tuple[int, Item]]:
    """Return the runs that a filter admits, with a number below `before`, for a page of `limit` rows.

    A run that only the journal has comes as its summary.
    """
    recorded: list[tuple[int, Item]] = []
    if orchestrator.journal is not None:
        known = {entry.number for entry in orchestrator.runs.values()}
        # One row more than the page has, which tells that there is another page.
        recorded = await asyncio.to_thread(_recorded, orchestrator.journal, wanted, before, limit + 1, known)
    numbers = {number for number, _ in recorded}
    held = (
        (entry.number, entry)
        for entry in reversed(orchestrator.runs.values())
        if (before is None or entry.number < before) and entry.number not in numbers and wanted.has(entry)
    )
    # Runs that were restored, or read again, are not in the order of their numbers.
    in_order = held if orchestrator.journal is None else sorted(held, key=_newest_first)
    return heapq.merge(in_order, recorded, key=_newest_first)


def shown(item: Item, *, is_full: bool) -> run_pb2.Run:
    """Return a run as lists show it."""
    return item if isinstance(item, run_pb2.Run) else run_to_view(item, is_full=is_full)


def _newest_first(row: tuple[int, Item]) -> int:
    return -row[0]


def _recorded(
    journal: RunJournal, wanted: RunFilter, before: int | None, limit: int, known: Container[int]
) -> list[tuple[int, Item]]:
    """Return the newest ended runs of the journal that a filter admits and that are not `known`. Reads the disk."""
    found: list[tuple[int, Item]] = []
    tenant = wanted.tenant or (None if wanted.reach.is_any else wanted.reach.tenant)
    with journal.journal.reader() as reader:
        while page := reader.ended_runs(tenant=tenant, before=before, limit=PAGE):
            for stored in page:
                # A run that could not be restored has no summary.
                if stored.run in known or not stored.summary:
                    continue
                run = run_pb2.Run.FromString(stored.summary)
                if wanted.has_recorded(run):
                    found.append((stored.run, run))
                    if len(found) == limit:
                        return found
            before = page[-1].run
    return found
