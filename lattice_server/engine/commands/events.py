"""Passes the scheduler's reports about tasks to their runs.

Rule: the events of a run that come together change it one after the other, and their effects are carried out together.
"""

import logging
from collections.abc import Callable, Iterator

from lattice_server.core.messages import (
    QuestionAsked,
    SchedulerEvent,
    TaskAwaits,
    TaskEvent,
    TaskReturned,
    TasksSpawned,
    ToRun,
)
from lattice_server.core.run.open_run import NOT_OPEN, answer_to
from lattice_server.engine.commands.additions import RunAdditions
from lattice_server.engine.commands.driver import AnyEffect, RunDriver
from lattice_server.engine.commands.signals import RunSignals
from lattice_server.engine.runs import calls
from lattice_server.engine.runs.entry import RunEntry

log = logging.getLogger(__name__)

ToMachine = TaskEvent | TaskReturned
Asking = TasksSpawned | QuestionAsked | TaskAwaits


class RunEvents:
    """Takes events. `on_question` is given each question first; it returns whether the question was for the server."""

    def __init__(self, driver: RunDriver, additions: RunAdditions, signals: RunSignals) -> None:
        self._driver, self._additions, self._signals = driver, additions, signals
        self.on_question: Callable[[RunEntry, QuestionAsked], bool] = lambda entry, question: False

    def tell(self, entry: RunEntry, events: Iterator[ToRun], now: float, posts: list[SchedulerEvent]) -> None:
        """Tell a run of events, up to one that it cannot take. Events for the scheduler are added to `posts`."""
        event: ToRun | None = None
        try:
            with self._driver.change(entry, posts) as perform:
                effects: list[AnyEffect] = []
                try:
                    for event in events:
                        if isinstance(event, ToMachine):
                            effects += entry.run.handle(event, now)
                        else:
                            perform(effects)
                            effects = self._effects_of(entry, event, now, posts)
                finally:
                    perform(effects)
        except Exception:
            # An event that breaks the invariants of one run must not stop the others.
            about = {"run_id": entry.run_id, "task_id": "" if event is None else event.task_id}
            log.exception("the run could not take %s", type(event).__name__, extra=about)

    def _effects_of(self, entry: RunEntry, event: Asking, now: float, posts: list[SchedulerEvent]) -> list[AnyEffect]:
        match event:
            case TasksSpawned():
                return [*self._additions.spawn(entry, event, now)]
            case TaskAwaits(signal=None):
                posts += calls.begin(entry, event)
            case TaskAwaits():
                return [*self._signals.wait(entry, event, now)]
            case QuestionAsked() if not self.on_question(entry, event):
                machine = entry.open_run
                return [answer_to(event, NOT_OPEN)] if machine is None else [*machine.ask(event)]
        return []
