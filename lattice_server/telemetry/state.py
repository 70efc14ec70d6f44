"""Reads the numbers that describe a present state: nodes, queue, stores, the process. Rule: it asks the owner of each.

Everything runs on the main thread; the scheduler's numbers come as the answer to a query.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import psutil

from lattice_server.core.messages import NodesDescribed, NodeStatus, NodeView
from lattice_server.core.model import Isolation
from lattice_server.core.services.model import InstanceState, ServiceState
from lattice_server.core.states import RUN_TERMINAL, TASK_TERMINAL, RunState, TaskState
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.recording.journal_port import Journal, JournalStats
from lattice_server.engine.services.services import Services
from lattice_server.engine.stores.usage import Usage
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.telemetry import catalogue
from lattice_server.telemetry.catalogue import Instrument
from lattice_server.telemetry.meters import Histogram, Labels, Reading, totals

LAG_INTERVAL_S = 1.0


class State:
    """The state of one server."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        sessions: Sessions,
        services: Services,
        journal: Journal | None,
        usages: Callable[[], Iterable[Usage]],
    ) -> None:
        self._orchestrator, self._sessions, self._usages = orchestrator, sessions, usages
        self._services, self._journal = services, journal
        self._process = psutil.Process()
        self._lag = Histogram(catalogue.LOOP_LAG)

    async def watch_lag(self) -> None:
        """Record the lag of the event loop; for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            # Lag is seen by a timer only. One a second costs nothing that can be measured.
            await asyncio.sleep(LAG_INTERVAL_S)
            self._lag.record(loop.time() - due)

    async def read(self) -> list[Reading]:
        """Return all numbers."""
        described = await self._orchestrator.queries.nodes()
        # It reads the sizes of files, or asks a database.
        stored = [] if self._journal is None else _stored(await asyncio.to_thread(self._journal.stats))
        return [
            self._lag.read(),
            *stored,
            *self._work(described),
            *self._streamed(),
            *self._serving(),
            *_nodes(described),
            self._runners(),
            *self._stores(),
            *self._own(),
        ]

    def _work(self, described: NodesDescribed) -> Iterator[Reading]:
        live = [entry.run for entry in self._orchestrator.runs.values() if not entry.run.is_terminal]
        yield _by_state(catalogue.RUNS_ACTIVE, Counter(run.state for run in live), set(RunState) - RUN_TERMINAL)
        tasks: Counter[TaskState] = Counter()
        for run in live:
            tasks.update(run.counts)
        yield _by_state(catalogue.TASKS_ACTIVE, tasks, set(TaskState) - TASK_TERMINAL)
        waits = (len(waits) for entry in self._orchestrator.runs.values() for waits in entry.calls.values())
        yield totals(catalogue.CALLS_WAITING, [((), sum(waits))])
        yield totals(catalogue.QUEUE_SIZE, [((), described.queued)])
        yield totals(catalogue.QUEUE_AGE, [((), described.oldest_s)])
        yield totals(catalogue.LEASES, [((), described.leases)])

    def _streamed(self) -> Iterator[Reading]:
        chunks = self._orchestrator.chunks
        yield totals(catalogue.CHUNKS, [((), chunks.taken)])
        yield totals(catalogue.CHUNK_BYTES, [((), chunks.taken_bytes)])
        yield totals(catalogue.CHUNKS_DROPPED, [((), chunks.dropped)])
        logs = (entry.chunks for entry in self._orchestrator.runs.values() if entry.chunks is not None)
        yield totals(catalogue.CHUNK_READERS, [((), sum(log.readers for log in logs))])

    def _serving(self) -> Iterator[Reading]:
        machines = [entry.machine for entry in self._services.all()]
        yield _by_state(catalogue.SERVICES, Counter(machine.state for machine in machines), ServiceState)
        instances = Counter(found.state for machine in machines for found in machine.instances.values())
        yield _by_state(catalogue.INSTANCES, instances, set(InstanceState) - {InstanceState.ENDED})

    def _runners(self) -> Reading:
        counts: list[tuple[Labels, float]] = [((Isolation.NONE.value, state), 0) for state in ("busy", "idle")]
        for session in self._sessions.all():
            for level, (busy, idle) in session.runners.items():
                counts += [((level.value, "busy"), busy), ((level.value, "idle"), idle)]
        return totals(catalogue.RUNNERS, counts)

    def _stores(self) -> Iterator[Reading]:
        usages = list(self._usages())
        yield totals(catalogue.STORE_USAGE, [((usage.what,), usage.total) for usage in usages])
        yield totals(catalogue.STORE_LIMIT, [((usage.what,), usage.bound.total) for usage in usages])

    def _own(self) -> Iterator[Reading]:
        with self._process.oneshot():
            cpu: Any = self._process.cpu_times()
            yield totals(catalogue.CPU_TIME, [(("user",), cpu.user), (("system",), cpu.system)])
            yield totals(catalogue.MEMORY, [((), self._process.memory_info().rss)])
            yield totals(catalogue.DESCRIPTORS, [((), self._process.num_fds())])


def _stored(stats: JournalStats) -> list[Reading]:
    parts = {"data": stats.file_bytes - stats.free_bytes, "free": stats.free_bytes, "log": stats.log_bytes}
    return [
        totals(catalogue.JOURNAL_PENDING, [((), stats.pending_bytes)]),
        totals(catalogue.JOURNAL_SIZE, [((part,), size) for part, size in parts.items()]),
        totals(catalogue.JOURNAL_RUNS, [(("live",), stats.live_runs), (("ended",), stats.ended_runs)]),
    ]


def _nodes(described: NodesDescribed) -> Iterator[Reading]:
    yield _by_state(catalogue.NODES, Counter(node.state for node in described.nodes), NodeStatus)
    numbers: dict[Instrument, Callable[[NodeView], float]] = {
        catalogue.NODE_CPU: lambda node: node.capacity.cpu,
        catalogue.NODE_CPU_USED: lambda node: node.capacity.cpu - node.free.cpu,
        catalogue.NODE_MEMORY: lambda node: node.capacity.memory_bytes,
        catalogue.NODE_MEMORY_USED: lambda node: node.capacity.memory_bytes - node.free.memory_bytes,
        catalogue.NODE_GPUS: lambda node: len(node.capacity.gpus),
        catalogue.NODE_GPUS_USED: lambda node: len(node.capacity.gpus) - node.free_gpu,
    }
    for instrument, number in numbers.items():
        yield totals(instrument, [((node.node_id,), number(node)) for node in described.nodes])


def _by_state(instrument: Instrument, counts: Counter[Any], states: Iterable[Enum]) -> Reading:
    """Return a count for each state, zeros included: a series that is absent cannot be compared with a bound."""
    return totals(instrument, [((state.value,), counts[state]) for state in states])
