"""Owns the memory of streamed output. Rule: over a bound the oldest chunks are dropped, and never the newest of a task.

A task has a bound of its own, and so have a tenant and all tenants together. Over one of the latter, the task that has
streamed least recently loses its oldest chunks first.
"""

from lattice_server.core.messages import Fact, RunFinished, TaskProgressed, TaskStarted, TaskStreamed
from lattice_server.core.trust import stamped
from lattice_server.engine.runs.chunk_log import Progress, RunChunks, TaskStream
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.log import ENDS
from lattice_server.engine.stores.usage import Bound, Evictable, Usage

GIB = 1024 * 1024 * 1024
STORE_BOUND = Bound(GIB, share=0.5)
# Of one task.
MAX_CHUNKS = 10_000
MAX_BYTES = 16 * 1024 * 1024


class ChunkStore:
    """The chunks of all runs, by tenant; lives on the main thread.

    It has taken `taken` chunks with `taken_bytes`, and dropped `dropped` of them because of a bound.
    """

    def __init__(self, bound: Bound = STORE_BOUND, max_chunks: int = MAX_CHUNKS, max_bytes: int = MAX_BYTES) -> None:
        self.usage = Usage("streamed output", bound)
        self.taken = self.taken_bytes = self.dropped = 0
        self._evictable = Evictable(self.usage)
        self._streams: dict[str, TaskStream] = {}
        self._max_chunks = max_chunks
        self._max_bytes = max_bytes

    def take(self, entry: RunEntry, event: TaskStreamed | TaskProgressed) -> None:
        """Take a chunk or the progress of an attempt; drop it when the run has ended."""
        if entry.log.is_complete:
            return
        log = log_of(entry)
        stream = log.stream(event.task_id)
        self._begin(entry, event.task_id, stream, event.attempt)
        if isinstance(event, TaskProgressed):
            stream.progress = Progress(event.attempt, event.done, event.total)
        elif event.attempt == stream.attempt:
            self._append(entry, event, stream)
        log.wake()

    def note(self, entry: RunEntry, fact: Fact) -> None:
        """Note a fact of a run that has streams or readers."""
        log = entry.chunks
        if log is None:
            return
        if isinstance(fact, TaskStarted) and fact.task_id in log.streams:
            self._begin(entry, fact.task_id, log.stream(fact.task_id), fact.attempt)
            log.wake()
        elif isinstance(fact, ENDS | RunFinished):
            log.wake()

    def drop(self, entry: RunEntry) -> None:
        """Drop the chunks of a run that is evicted."""
        log, entry.chunks = entry.chunks, None
        for task_id, stream in log.streams.items() if log is not None else ():
            name = _name(entry, task_id)
            self._evictable.discard(entry.run.tenant, name)
            self._streams.pop(name, None)
            self.usage.add(entry.run.tenant, -stream.kept_bytes)

    def _begin(self, entry: RunEntry, task_id: str, stream: TaskStream, attempt: int) -> None:
        if more := stream.begin(attempt):
            self._grow(entry, task_id, stream, more)

    def _append(self, entry: RunEntry, event: TaskStreamed, stream: TaskStream) -> None:
        before, level = stream.kept_bytes, entry.run.tasks[event.task_id].spec.isolation
        for payload in event.chunks:
            stream.append(stamped(payload, level))
        self.taken += len(event.chunks)
        self.taken_bytes += stream.kept_bytes - before
        while len(stream) > 1 and (len(stream) > self._max_chunks or stream.kept_bytes > self._max_bytes):
            stream.drop_oldest()
            self.dropped += 1
        self._grow(entry, event.task_id, stream, stream.kept_bytes - before)

    def _grow(self, entry: RunEntry, task_id: str, stream: TaskStream, more_bytes: int) -> None:
        tenant, name = entry.run.tenant, _name(entry, task_id)
        self._streams[name] = stream
        self.usage.add(tenant, more_bytes)
        self._evictable.add(tenant, name)
        while (victim := self._evictable.victim(tenant)) is not None:
            self._evict(*victim)

    def _evict(self, tenant: str, name: str) -> None:
        stream = self._streams[name]
        if len(stream) > 1:
            self.usage.add(tenant, -stream.drop_oldest())
            self.dropped += 1
        else:
            self._evictable.discard(tenant, name)  # It can be evicted again once it has grown.


def log_of(entry: RunEntry) -> RunChunks:
    """Return the streams of a run, for a writer or a reader."""
    if entry.chunks is None:
        entry.chunks = RunChunks()
    return entry.chunks


def _name(entry: RunEntry, task_id: str) -> str:
    return f"{entry.key} {task_id}"
