"""Owns the log lines about runs. Rule: ids and kinds are logged; values and texts of users are not."""

import logging

from lattice_server.core.messages import RunFinished, RunStarted, TaskFailed, TaskRetrying
from lattice_server.core.run.run import Effect
from lattice_server.engine.run_entry import RunEntry

log = logging.getLogger(__name__)


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
