"""Owns the log lines about runs. Rule: ids and kinds are logged; values and texts of users are not.

The text that tasks print is logged only where `TaskOutputLog` observes the runs, which the operator asks for.
"""

import logging

from lattice_server.core.messages import (
    Fact,
    RunFinished,
    RunStarted,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TaskSucceeded,
    WorkerEffect,
)
from lattice_server.core.run.run import Effect
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.logs import MAX_TEXT

log = logging.getLogger(__name__)
# Of the text that tasks print. Their records are written at every level of the log.
STDOUT, STDERR = logging.getLogger("lattice_server.task.stdout"), logging.getLogger("lattice_server.task.stderr")


def note(entry: RunEntry, fact: Effect) -> None:
    """Log a fact of a run that an operator looks for: its start and end, and attempts that fail."""
    if not log.isEnabledFor(logging.INFO):
        return
    about = {"run_id": entry.run_id, "trace_id": entry.trace_id}
    match fact:
        case RunStarted():
            log.info("a run of %d tasks starts", fact.task_count, extra=about)
        case RunFinished():
            kind = "" if fact.failure is None else f": {fact.failure.kind.value}"
            log.info("the run ended as %s%s", fact.state.value, kind, extra=about)
            if fact.unread_signals:
                # Their names are the caller's own.
                log.warning("no task took a value of %d of the run's signals", len(fact.unread_signals), extra=about)
        case TaskRetrying() | TaskFailed():
            failure = fact.failure
            what = "the attempt failed and is retried" if isinstance(fact, TaskRetrying) else "the task failed"
            named = f"{failure.kind.value} {failure.type}".rstrip()
            node_id = entry.run.tasks[fact.task_id].node_id
            which = {"task_id": fact.task_id, "attempt": fact.attempt, "node_id": node_id}
            log.info("%s: %s", what, named, extra=about | which)
        case _:
            pass


class TaskOutputLog:
    """An observer that logs each line that a task prints, with its run, task, attempt and node."""

    def __init__(self) -> None:
        for logger in (STDOUT, STDERR):
            logger.setLevel(logging.INFO)
        # The last lines of attempts, without their ends, by run, task and stream.
        self._begun: dict[str, dict[tuple[str, bool], tuple[TaskLogged, str]]] = {}

    def note(self, entry: RunEntry, fact: Fact) -> None:
        """Log the lines that a fact about output completes, and at the end of a task or a run its last line."""
        match fact:
            case TaskLogged():
                self._take(entry, fact)
            case RunFinished():
                for begun in self._begun.pop(entry.key, {}).values():
                    _write(entry, *begun)
            case TaskRetrying() | TaskFailed() | TaskSucceeded():
                lines = self._begun.get(entry.key, {})
                for key in [found for found in lines if found[0] == fact.task_id]:
                    _write(entry, *lines.pop(key))

    def _take(self, entry: RunEntry, fact: TaskLogged) -> None:
        lines, key = self._begun.setdefault(entry.key, {}), (fact.task_id, fact.is_error)
        before = lines.pop(key)[1] if key in lines else ""
        *whole, last = (before + fact.text).split("\n")
        for line in whole:
            _write(entry, fact, line)
        if len(last) > MAX_TEXT:
            _write(entry, fact, last)
        elif last:
            lines[key] = fact, last

    def perform(self, effect: WorkerEffect) -> WorkerEffect:
        """Return an effect as it is."""
        return effect


def _write(entry: RunEntry, fact: TaskLogged, line: str) -> None:
    about = {
        "run_id": entry.run_id,
        "task_id": fact.task_id,
        "attempt": fact.attempt,
        "node_id": entry.run.tasks[fact.task_id].node_id,
        "trace_id": entry.trace_id,
    }
    (STDERR if fact.is_error else STDOUT).info("%s", line, extra=about)
