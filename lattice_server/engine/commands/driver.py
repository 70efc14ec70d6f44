"""Carries out the decisions of the machines of runs, on the main thread.

Rule: a machine that raises ends its run, so that the run's readers do not wait for ever.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import assert_never
from uuid import uuid4

from lattice_server.core.environment import NO_ENVIRONMENT
from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import (
    AnswerQuestion,
    AskHolder,
    CallEnded,
    CancelRequested,
    Fact,
    RunFinished,
    SchedulerEvent,
    TaskReady,
    TaskSucceeded,
    WithdrawQuestion,
)
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.run.open_run import HolderEffect
from lattice_server.core.run.run import Effect
from lattice_server.core.run.signals import SignalEffect
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.ports import Observer
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.runs import calls, run_logging
from lattice_server.engine.runs.chunk_store import ChunkStore
from lattice_server.engine.runs.ended_runs import EndedRuns
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.log import ENDS
from lattice_server.engine.runs.references import RunStores
from lattice_server.engine.runs.requirements import Requirements
from lattice_server.engine.slices import Slices

log = logging.getLogger(__name__)

AnyEffect = Effect | HolderEffect | SignalEffect
Effects = Sequence[AnyEffect]
NEWS = ENDS | RunFinished


class RunDriver:
    """Carries out effects: tasks go to the scheduler, facts to the log of their run, questions to its caller.

    `answer` sends the answer of a question to a worker. Facts are recorded in the `journal`, if there is one.
    """

    def __init__(
        self,
        bus: MessageBus,
        stores: RunStores,
        ended: EndedRuns,
        slices: Slices,
        answer: Callable[[AnswerQuestion], None],
        chunks: ChunkStore,
        journal: RunJournal | None = None,
    ) -> None:
        self._bus = bus
        self._stores = stores
        self._ended = ended
        self._slices = slices
        self._answer = answer
        self.observers: list[Observer] = []
        self._chunks = chunks
        self._journal = journal
        self.requirements = Requirements()

    @contextmanager
    def change(
        self, entry: RunEntry, posts: list[SchedulerEvent] | None = None, *, uploader: str = ""
    ) -> Iterator[Callable[[Effects], None]]:
        """Yield a function that carries out effects; the block calls it with the decision of a machine.

        A LatticeError of the block is a refusal, which changes nothing. Any other exception ends the run and is raised.

        Args:
            entry: the run that the block changes.
            posts: takes the events for the scheduler; they are posted at once when there is no such list.
            uploader: the tenant of the caller who changes the graph, whose uploads it may name.
        """
        try:
            yield lambda effects: self._perform(entry, effects, posts, uploader)
        except LatticeError:
            raise
        except Exception:
            if not entry.log.is_complete:
                self._abandon(entry, posts)
            raise

    def note_close(self, entry: RunEntry) -> None:
        """Record that the caller of an open run closes it."""
        if self._journal is not None and entry.run.is_open and not entry.run.is_terminal:
            self._journal.close(entry)

    def _abandon(self, entry: RunEntry, posts: list[SchedulerEvent] | None) -> None:
        error_id = uuid4().hex
        log.exception("the run ends by a bug", extra={"run_id": entry.run_id, "error_id": error_id})
        failure = Failure(FailureKind.INTERNAL, f"internal error {error_id}; the server's log has the details")
        self._perform(entry, entry.run.abandon(failure, time.monotonic()), posts)

    def _perform(
        self,
        entry: RunEntry,
        effects: Effects,
        posts: list[SchedulerEvent] | None,
        uploader: str = "",
    ) -> None:
        own: list[SchedulerEvent] = [] if posts is None else posts
        if entry.open_run is not None:
            effects = [*entry.open_run.withdraw(effects), *effects]
        time_s = time.time()
        offset_s = time_s - time.monotonic()
        for effect in effects:
            match effect:
                case TaskReady():
                    own.append(self._filled(entry, effect))
                case CancelRequested() | CallEnded():
                    own.append(effect)
                case AskHolder() | WithdrawQuestion() | AnswerQuestion():
                    self._pass_on(entry, effect)
                case _:
                    self._publish(entry, effect, time_s, offset_s)
                    if entry.calls:
                        own += calls.ended(entry, effect)
        if entry.on_effects is not None and effects:
            entry.on_effects(effects)
        if posts is None:
            self._bus.post(own)
        self._stores.hold_graph(entry, uploader)
        self._stores.count(entry)
        if self._journal is not None:
            self._journal.note(entry)
        if entry.run.is_terminal:
            self._end(entry)
        elif (failure := self._stores.excess(entry)) and (stopping := entry.run.fail(failure, time.monotonic())):
            self._perform(entry, stopping, posts)
        elif entry.run.is_unsettled and not entry.is_continuing:
            entry.is_continuing = True
            self._bus.call_when_taken(lambda: self._slices.call(lambda: self._continue(entry)))

    def _filled(self, entry: RunEntry, ready: TaskReady) -> TaskReady:
        """Return a task with the values of its environment, or with its failure when one is gone."""
        found = self.requirements.secrets.environment(ready.spec, entry.secrets, entry.run.tenant)
        if found is NO_ENVIRONMENT:
            return ready
        return replace(ready, refusal=found) if isinstance(found, Failure) else replace(ready, environment=found)

    def _publish(self, entry: RunEntry, fact: Fact, time_s: float, offset_s: float) -> None:
        if isinstance(fact, TaskSucceeded):
            self._stores.hold_outputs(entry, fact)
        entry.note_times(fact, offset_s)
        entry.log.append(fact, time_s)
        if entry.stream is not None and isinstance(fact, NEWS):
            entry.stream.news.set()
        if entry.chunks is not None:
            self._chunks.note(entry, fact)
        for observer in self.observers:
            observer.note(entry, fact)
        run_logging.note(entry, fact)

    def _pass_on(self, entry: RunEntry, effect: HolderEffect) -> None:
        match effect:
            case AnswerQuestion():
                self._answer(effect)
            case AskHolder():
                if entry.stream is not None:
                    entry.stream.ask(effect.question)
            case WithdrawQuestion():
                if entry.stream is not None:
                    entry.stream.withdraw(effect.question_id)
            case _:
                assert_never(effect)

    def _continue(self, entry: RunEntry) -> None:
        """Have a run submit more of its tasks."""
        entry.is_continuing = False
        with self.change(entry) as perform:
            perform(entry.run.proceed(time.monotonic()))

    def _end(self, entry: RunEntry) -> None:
        if entry.ended_s is None:
            entry.stop_timers()
            entry.ended_s = time.time()
            entry.secrets.clear()
            if self._journal is not None:
                self._journal.end(entry)
            self._stores.release(entry)
            self._ended.add(entry)
