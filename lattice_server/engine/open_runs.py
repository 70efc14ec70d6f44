"""Owns the streams that hold open runs, and the time an open run goes on without one.

Rule: what becomes of a run is decided by its machines; here it is carried from and to the stream.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from lattice_server.core.errors import AbortedError, PreconditionError
from lattice_server.core.messages import (
    AnswerQuestion,
    AskHolder,
    QuestionAsked,
    TaskCancelled,
    TaskFailed,
    TaskSkipped,
    TaskSucceeded,
    WithdrawQuestion,
)
from lattice_server.core.model import Failure, Payload
from lattice_server.core.run.open_run import NOT_OPEN, HolderEffect, OpenRun, answer_to
from lattice_server.core.run.run import Effect
from lattice_server.engine.holder import Holder
from lattice_server.engine.run_entry import RunEntry

# The facts that the stream which holds a run is told.
TOLD = TaskSucceeded | TaskFailed | TaskCancelled | TaskSkipped

Change = Callable[[RunEntry, Callable[[], Sequence[Effect | HolderEffect]]], None]


class OpenRuns:
    """The callers of all open runs; lives on the main thread.

    `change` has a run's machines decide, `send` takes answers for workers.
    """

    def __init__(self, grace_s: float, change: Change, send: Callable[[AnswerQuestion], None]) -> None:
        self._grace_s = grace_s
        self._change = change
        self._send = send

    def open(self, entry: RunEntry) -> None:
        """Have a run that is new wait for the stream that holds it."""
        entry.open_run = OpenRun(entry.run, self._grace_s, time.monotonic())
        self._watch(entry)

    def hold(self, entry: RunEntry) -> Holder:
        """Have a new stream hold a run; an older one is told. Raises PreconditionError."""
        machine = entry.open_run
        if machine is None:
            text = f"run {entry.run_id!r} was not started by OpenRun, so no stream can hold it"
            raise PreconditionError("RUN_NOT_OPEN", text)
        older, holder = entry.holder, Holder()
        if older is not None:
            older.taken_over = AbortedError("RUN_TAKEN_OVER", f"another stream holds run {entry.run_id!r} now")
            older.news.set()
        entry.holder = holder
        self._change(entry, machine.hold)
        self._watch(entry)
        return holder

    def leave(self, entry: RunEntry, holder: Holder) -> None:
        """Note that a stream is over."""
        self.fall_silent(entry, holder)
        if entry.holder is holder:
            entry.holder = None

    def fall_silent(self, entry: RunEntry, holder: Holder) -> None:
        """Note that the caller of a stream says nothing more on it, whether it has broken or is still read."""
        if entry.holder is holder and entry.open_run is not None:
            entry.open_run.leave(time.monotonic())
            self._watch(entry)

    def close(self, entry: RunEntry, holder: Holder) -> None:
        """Have a run end with its tasks."""
        if entry.holder is holder:
            self._change(entry, lambda: entry.run.close(time.monotonic()))

    def answer(self, entry: RunEntry, holder: Holder, question_id: str, answer: Payload | Failure | str) -> bool:
        """Take an answer; return whether the question needs one, and this stream is the one to give it."""
        machine = entry.open_run
        found = None if entry.holder is not holder or machine is None else machine.answer(question_id, answer)
        if found is not None:
            self._send(found)
        return found is not None

    def ask(self, entry: RunEntry, question: QuestionAsked) -> Sequence[HolderEffect]:
        """Return what becomes of a question to the caller of a run."""
        return [answer_to(question, NOT_OPEN)] if entry.open_run is None else entry.open_run.ask(question)

    def perform(self, entry: RunEntry, effect: HolderEffect) -> None:
        """Tell the stream that holds a run, or a worker, something."""
        match effect:
            case AnswerQuestion():
                self._send(effect)
            case AskHolder() if entry.holder is not None:
                entry.holder.ask(effect.question)
            case WithdrawQuestion() if entry.holder is not None:
                entry.holder.withdraw(effect.question_id)

    def _watch(self, entry: RunEntry) -> None:
        """Have what is due done when it is."""
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
            self._change(entry, lambda: machine.tick(time.monotonic()))
            self._watch(entry)
