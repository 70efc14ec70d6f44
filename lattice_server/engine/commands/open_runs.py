"""Owns the streams of open runs, and the grace time of an open run without a stream.

Rule: the machines of a run decide; this class carries requests and timers to them.
"""

import asyncio
import time

from lattice_server.core.errors import AbortedError, PreconditionError
from lattice_server.core.model import Failure, Payload
from lattice_server.core.run.open_run import OpenRun
from lattice_server.engine.commands.driver import RunDriver
from lattice_server.engine.runs.caller_stream import CallerStream
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.log import ENDS

# The facts that the stream of an open run is sent.
TOLD = ENDS


class OpenRuns:
    """The open runs and the streams of their callers; lives on the main thread."""

    def __init__(self, grace_s: float, driver: RunDriver) -> None:
        self._grace_s = grace_s
        self._driver = driver

    def open(self, entry: RunEntry) -> None:
        """Have a new run wait for its stream, for the grace time."""
        grace_s = entry.disconnect_grace_s or self._grace_s
        entry.open_run = OpenRun(entry.run, grace_s, time.monotonic())
        self._set_timer(entry)

    def hold(self, entry: RunEntry) -> CallerStream:
        """Give a run a new stream, which replaces the older one. Raises PreconditionError."""
        machine = entry.open_run
        if machine is None:
            text = f"run {entry.run_id!r} was not started by OpenRun, so no stream can hold it"
            raise PreconditionError("RUN_NOT_OPEN", text)
        older, stream = entry.stream, CallerStream()
        if older is not None:
            older.taken_over = AbortedError("RUN_TAKEN_OVER", f"another stream holds run {entry.run_id!r} now")
            older.news.set()
        entry.stream = stream
        with self._driver.change(entry) as perform:
            perform(machine.hold())
        self._set_timer(entry)
        return stream

    def leave(self, entry: RunEntry, stream: CallerStream) -> None:
        """Note that a stream has ended."""
        self.fall_silent(entry, stream)
        if entry.stream is stream:
            entry.stream = None

    def fall_silent(self, entry: RunEntry, stream: CallerStream) -> None:
        """Note that the caller of a stream sends no more requests on it, whether or not it still reads."""
        if entry.stream is stream and entry.open_run is not None:
            entry.open_run.leave(time.monotonic())
            self._set_timer(entry)

    def close(self, entry: RunEntry, stream: CallerStream) -> None:
        """Have a run accept no more tasks, so that it ends with its last task."""
        if entry.stream is stream:
            self._driver.note_close(entry)
            with self._driver.change(entry) as perform:
                perform(entry.run.close(time.monotonic()))

    def answer(self, entry: RunEntry, stream: CallerStream, question_id: str, answer: Payload | Failure | str) -> bool:
        """Take an answer; return whether the question is open and this stream is the run's newest."""
        machine = entry.open_run
        found = None if entry.stream is not stream or machine is None else machine.answer(question_id, answer)
        if found is not None:
            with self._driver.change(entry) as perform:
                perform([found])
        return found is not None

    def _set_timer(self, entry: RunEntry) -> None:
        """Have the machine's tick called at its next deadline."""
        if entry.grace is not None:
            entry.grace.cancel()
            entry.grace = None
        machine = entry.open_run
        deadline = None if machine is None else machine.next_deadline()
        if deadline is not None:
            delay_s = max(0.0, deadline - time.monotonic())
            entry.grace = asyncio.get_running_loop().call_later(delay_s, self._tick, entry)

    def _tick(self, entry: RunEntry) -> None:
        entry.grace = None
        if (machine := entry.open_run) is not None:
            with self._driver.change(entry) as perform:
                perform(machine.tick(time.monotonic()))
            self._set_timer(entry)
