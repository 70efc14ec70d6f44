"""Owns the event log of each run. Rule: a reader is a position in the log; there is no queue for each reader."""

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from lattice_server.core.errors import RangeError
from lattice_server.core.messages import (
    Fact,
    RunEvent,
    RunFinished,
    SignalReceived,
    TaskAccessedNetwork,
    TaskCancelled,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TasksAdded,
    TaskSkipped,
    TaskSucceeded,
)
from lattice_server.core.model import Failure
from lattice_server.engine.runs.audience import Audience

ENDS = TaskSucceeded | TaskFailed | TaskCancelled | TaskSkipped
BATCH = 512
# The memory of an event without its contents.
EVENT_BYTES = 256
# The output of tasks that a run's log keeps, in bytes.
MAX_OUTPUT_BYTES = 64 * 1024 * 1024


class RunLog:
    """The numbered events of one run, and the memory they take; lives on the main thread.

    Of what tasks write to their output the newest `max_output_bytes` are kept; an older event stays, without its text
    and marked as cut. All other events are kept whole.
    """

    def __init__(self, max_output_bytes: int = MAX_OUTPUT_BYTES) -> None:
        self.events: list[RunEvent] = []
        self._max_output_bytes = max_output_bytes
        self._output_bytes = 0
        self._outputs: deque[int] = deque()  # The positions of events with text.
        self.kept_bytes = 0
        self.is_complete = False
        self._audience = Audience()
        self._ends: dict[str, asyncio.Event] = {}
        self._complete: dict[Callable[[], object], None] = {}

    def append(self, fact: Fact, time_s: float) -> None:
        """Number a fact and wake the readers that wait for one."""
        self.events.append(RunEvent(len(self.events) + 1, time_s, fact))
        self.kept_bytes += EVENT_BYTES + _content_bytes(fact)
        if isinstance(fact, TaskLogged):
            self._outputs.append(len(self.events) - 1)
            self._output_bytes += _content_bytes(fact)
            while self._output_bytes > self._max_output_bytes and len(self._outputs) > 1:
                self._cut(self._outputs.popleft())
        if isinstance(fact, RunFinished):
            self.is_complete = True
            complete, self._complete = self._complete, {}
            for call in complete:
                call()
        if self._ends and isinstance(fact, ENDS) and (end := self._ends.pop(fact.task_id, None)) is not None:
            end.set()
        self._audience.tell()

    def _cut(self, position: int) -> None:
        event = self.events[position]
        assert isinstance(event.fact, TaskLogged), "only events with text are noted"
        cut = replace(event.fact, text="", is_truncated=True)
        freed = _content_bytes(event.fact) - _content_bytes(cut)
        self.events[position] = replace(event, fact=cut)
        self._output_bytes -= _content_bytes(event.fact)
        self.kept_bytes -= freed

    def check_cursor(self, after: int) -> None:
        """Raise RangeError, CURSOR_AHEAD, when number `after` lies beyond the newest event."""
        if after > len(self.events):
            newest = len(self.events)
            raise RangeError(
                "CURSOR_AHEAD",
                f"the run has {newest} events; there is none after {after}",
                metadata={"oldest_sequence": "1", "last_sequence": str(newest)},
            )

    async def follow(self, after: int) -> AsyncIterator[list[RunEvent]]:
        """Yield the events after number `after` in batches, to the run's end.

        Raises:
            RangeError: CURSOR_AHEAD when `after` lies beyond the newest event.
        """
        self.check_cursor(after)
        while True:
            batch = self.events[after : after + BATCH]
            after += len(batch)
            if batch:
                yield batch
            if len(batch) == BATCH:
                continue  # The past is read at the pace of the reader.
            is_behind = after < len(self.events)
            if self.is_complete and not is_behind:
                return
            await self._audience.news(is_behind=is_behind)

    async def task_ended(self, task_id: str) -> None:
        """Wait for the end of a task that has not ended."""
        await self._ends.setdefault(task_id, asyncio.Event()).wait()

    def when_complete(self, call: Callable[[], object]) -> None:
        """Call a function at the run's end, or now if it has ended. The function must not change the run."""
        if self.is_complete:
            call()
        else:
            self._complete[call] = None

    def forget(self, call: Callable[[], object]) -> None:
        """Do not call a function of `when_complete` any more."""
        self._complete.pop(call, None)

    async def completed(self, wait_s: float | None = None) -> None:
        """Wait for the run's end, for `wait_s` seconds at most."""
        ended = asyncio.Event()
        self.when_complete(ended.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await ended.wait()
        finally:
            self.forget(ended.set)


def _content_bytes(fact: Fact) -> int:
    """Return the memory of the contents of a fact. Facts that are not listed share theirs with an earlier fact."""
    match fact:
        case TaskSucceeded():
            outputs = sum(payload.kept_bytes for payload in fact.outputs.values())
            return outputs + sum(payload.kept_bytes for items in fact.split.values() for payload in items)
        case SignalReceived():
            return fact.value.kept_bytes
        case TaskLogged():
            return sys.getsizeof(fact.text)
        case TaskAccessedNetwork():
            return sys.getsizeof(fact.access.host) + sys.getsizeof(fact.access.message)
        case TaskFailed() | TaskRetrying():
            return _failure_bytes(fact.failure)
        case TasksAdded():
            return sys.getsizeof(fact.task_ids)
        case _:
            return 0


def _failure_bytes(failure: Failure) -> int:
    exception = 0 if failure.exception is None else failure.exception.kept_bytes
    return sys.getsizeof(failure.message) + sys.getsizeof(failure.traceback) + exception
