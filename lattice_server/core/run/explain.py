"""Owns the answer to "why does this task wait?" for a task that the scheduler does not have."""

from collections.abc import Mapping, Sequence

from lattice_server.core.messages import Explanation, Reason, ReasonKind
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TASK_TERMINAL, TaskState


def explain(
    tasks: Mapping[str, TaskRecord], predecessors: Sequence[str], task_id: str, run_started_at: float, now: float
) -> Explanation:
    """Return which of its predecessors a task waits for, or how it ended."""
    record = tasks[task_id]
    if record.state in TASK_TERMINAL:
        waited_s = 0.0 if record.ended_at is None else now - record.ended_at
        return Explanation((Reason(ReasonKind.ENDED, _end_of(record)),), waited_s, None)
    if record.items is not None:
        text = f"{record.open_items} of its {len(record.items)} items have not ended"
        return Explanation((Reason(ReasonKind.RUNNING, text),), now - (record.started_at or now), 0.0)
    reasons = []
    for source in predecessors:
        state = tasks[source].state
        if state not in TASK_TERMINAL:
            reasons.append(Reason(ReasonKind.INPUT, f"task {source!r} is {state.value}", task_id=source))
    if not reasons:
        reasons.append(Reason(ReasonKind.TURN, "it is on its way to the scheduler"))
    return Explanation(tuple(reasons), now - run_started_at, None)


def _end_of(record: TaskRecord) -> str:
    what = "it was skipped" if record.state is TaskState.SKIPPED else f"it has {record.state.value}"
    if record.state is TaskState.CANCELLED:
        what = "it was cancelled"
    if record.failure is not None:
        return f"{what}: {record.failure.message}"
    if record.state is TaskState.SKIPPED:
        return f"{what}: a condition, its own or that of a task it needs, was not met"
    return what
