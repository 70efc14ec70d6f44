"""Owns the chunks of one run's tasks, and wakes their readers. Rule: a reader is a position for each task, no queue.

The chunks of a task are numbered over all its attempts. A later attempt begins with a mark, and the chunks of earlier
attempts are dropped.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from lattice_server.core.frozen import frozen
from lattice_server.core.model import Payload

BATCH = 512
# The memory of a chunk without its value.
CHUNK_BYTES = 256
# All readers of a run together are sent about 2,000 messages a second; chunks that come sooner share a message.
READER_INTERVAL_S = 0.0005


@frozen
class Chunk:
    """One chunk, or, without a payload, the mark that an attempt replaces earlier ones."""

    sequence: int
    attempt: int
    index: int
    payload: Payload | None

    @property
    def kept_bytes(self) -> int:
        """The memory it takes."""
        return CHUNK_BYTES + (0 if self.payload is None else self.payload.kept_bytes)


@frozen
class Progress:
    """How far an attempt is; the total is None when the task does not know it."""

    attempt: int
    done: float
    total: float | None


class TaskStream:
    """The kept chunks of one task, by dense numbers from 1."""

    def __init__(self) -> None:
        self.attempt = 0
        self.kept_bytes = 0
        self.progress: Progress | None = None
        self.changed_at = 0  # By the count of changes of the run.
        self._last = 0
        self._next_index = 0
        self._chunks: list[Chunk] = []
        self._start = 0  # The position of the oldest kept chunk; those before it are dropped and not yet deleted.

    def __len__(self) -> int:
        return len(self._chunks) - self._start

    def begin(self, attempt: int) -> int:
        """Begin a later attempt; return the bytes that are kept more, a negative number when they are fewer."""
        before = self.kept_bytes
        if attempt > self.attempt:
            has_earlier = self._last > 0
            self.attempt, self._next_index, self.progress = attempt, 0, None
            if has_earlier:
                self._chunks, self._start, self.kept_bytes = [], 0, 0
                self._append(0, None)
        return self.kept_bytes - before

    def append(self, payload: Payload) -> None:
        """Add a chunk of the newest attempt."""
        self._append(self._next_index, payload)
        self._next_index += 1

    def _append(self, index: int, payload: Payload | None) -> None:
        self._last += 1
        chunk = Chunk(self._last, self.attempt, index, payload)
        self._chunks.append(chunk)
        self.kept_bytes += chunk.kept_bytes

    def drop_oldest(self) -> int:
        """Drop the oldest kept chunk; return its bytes."""
        size = self._chunks[self._start].kept_bytes
        self._start += 1
        self.kept_bytes -= size
        if self._start * 2 > len(self._chunks):  # Seldom, so that dropping one takes constant time on average.
            del self._chunks[: self._start]
            self._start = 0
        return size

    def after(self, sequence: int, most: int) -> list[Chunk]:
        """Return up to `most` kept chunks with higher numbers, the oldest first."""
        first = self._last - len(self) + 1
        start = self._start + max(0, sequence + 1 - first)
        return self._chunks[start : start + most]


@dataclass(slots=True)
class Batch:
    """The content of one message to a reader: chunks and progress by task id."""

    chunks: list[tuple[str, Chunk]] = field(default_factory=list)
    progress: dict[str, Progress] = field(default_factory=dict)


class RunChunks:
    """The streams of one run's tasks, and how many `readers` they have; lives on the main thread."""

    def __init__(self) -> None:
        self.streams: OrderedDict[str, TaskStream] = OrderedDict()  # By the time of their last change.
        self._changes = 0
        self._waiting: dict[asyncio.Future[None], None] = {}
        self.readers = 0

    def stream(self, task_id: str) -> TaskStream:
        """Return the stream of a task, which is about to change."""
        stream = self.streams.get(task_id)
        if stream is None:
            stream = self.streams[task_id] = TaskStream()
        self._changes += 1
        stream.changed_at = self._changes
        self.streams.move_to_end(task_id)
        return stream

    def wake(self) -> None:
        """Wake the readers that wait."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def follow(self, task_id: str, after: Mapping[str, int], is_over: Callable[[], bool]) -> AsyncIterator[Batch]:
        """Yield new chunks and progress, until `is_over` and all were yielded.

        Args:
            task_id: the task, or the mapped task of the items, whose chunks are wanted; empty for all tasks.
            after: the number of the last chunk that the reader has, by task id.
            is_over: whether nothing more can come.
        """
        position = _Position(self, task_id, after)
        loop = asyncio.get_running_loop()
        self.readers += 1
        try:
            while True:
                over = is_over()
                batch = position.next()
                if batch is None:
                    if over:
                        return
                    await self._changed()
                    continue
                sent_at = loop.time()
                yield batch
                if not over and (wait_s := sent_at + self.readers * READER_INTERVAL_S - loop.time()) > 0:
                    # Messages to many readers would leave the thread no time for anything else.
                    await asyncio.sleep(wait_s)
        finally:
            self.readers -= 1

    def changed_since(self, change: int) -> tuple[list[str], int]:
        """Return the tasks whose streams changed after a change, and the newest change."""
        found = []
        for task_id in reversed(self.streams):
            if self.streams[task_id].changed_at <= change:
                break
            found.append(task_id)
        found.reverse()
        return found, self._changes

    async def _changed(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            await future
        finally:
            self._waiting.pop(future, None)


class _Position:
    """The position of one reader in the streams of a run."""

    def __init__(self, log: RunChunks, task_id: str, after: Mapping[str, int]) -> None:
        self._log = log
        self._task_id = task_id
        self._after = dict(after)
        self._progress: dict[str, Progress] = {}
        self._seen = 0
        self._unread: dict[str, None] = {}

    def next(self) -> Batch | None:
        """Return new chunks and progress, up to a bound; None when there are none."""
        changed, self._seen = self._log.changed_since(self._seen)
        self._unread |= dict.fromkeys(filter(self._is_wanted, changed))
        batch = Batch()
        while self._unread and len(batch.chunks) < BATCH:
            self._read(next(iter(self._unread)), batch)
        return batch if batch.chunks or batch.progress else None

    def _read(self, task_id: str, batch: Batch) -> None:
        del self._unread[task_id]
        stream = self._log.streams[task_id]
        if (progress := stream.progress) is not None and progress != self._progress.get(task_id):
            batch.progress[task_id] = self._progress[task_id] = progress
        most = BATCH - len(batch.chunks)
        found = stream.after(self._after.get(task_id, 0), most)
        if found:
            self._after[task_id] = found[-1].sequence
            batch.chunks += [(task_id, chunk) for chunk in found]
        if len(found) == most:
            self._unread[task_id] = None  # After the other tasks, so that none waits for another one's end.

    def _is_wanted(self, task_id: str) -> bool:
        wanted = self._task_id
        return not wanted or task_id == wanted or (task_id.startswith(wanted) and task_id[len(wanted)] == "[")
