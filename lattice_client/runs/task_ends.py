"""Owns the ends of tasks that the stream of an open run reported. Rule: the outputs of the newest ends stay in memory.

The ids of all ended tasks are known; dropped outputs can be read from the server.
"""

from collections import deque
from collections.abc import Iterable

from lattice.v1 import run_pb2

from lattice_client.transport.requests import made

RETAINED_BYTES = 64 * 1024 * 1024
STATES = {
    "task_succeeded": run_pb2.TASK_STATE_SUCCEEDED,
    "task_failed": run_pb2.TASK_STATE_FAILED,
    "task_cancelled": run_pb2.TASK_STATE_CANCELLED,
    "task_skipped": run_pb2.TASK_STATE_SKIPPED,
}


class TaskEnds:
    """The ended tasks of one run, by task id."""

    def __init__(self) -> None:
        # None for an end whose outputs were dropped.
        self._events: dict[str, run_pb2.RunEvent | None] = {}
        self._retained: deque[str] = deque()
        self._retained_bytes = 0

    def add(self, event: run_pb2.RunEvent) -> None:
        """Add the end of a task; drop the oldest ends beyond RETAINED_BYTES."""
        task_id = getattr(event, event.WhichOneof("event") or "").task_id
        self._events[task_id] = event
        self._retained.append(task_id)
        self._retained_bytes += event.ByteSize()
        while self._retained_bytes > RETAINED_BYTES:
            oldest = self._retained.popleft()
            dropped, self._events[oldest] = self._events[oldest], None
            self._retained_bytes -= dropped.ByteSize() if dropped is not None else 0

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._events

    def has_any(self, task_ids: Iterable[str]) -> bool:
        """Whether one of some tasks has ended."""
        return any(task_id in self._events for task_id in task_ids)

    def find(self, run_id: str, task_id: str) -> run_pb2.TaskRun | None:
        """Return an ended task with its outputs; None when they are not here and must be read from the server."""
        event = self._events.get(task_id)
        if event is None:
            return None
        kind = event.WhichOneof("event") or ""
        body = getattr(event, kind)
        if kind == "task_succeeded" and not body.outputs:
            return None  # the outputs of a mapped task are those of its items
        return made(
            run_pb2.TaskRun,
            run_id=run_id,
            task_id=task_id,
            display_name=body.display_name,
            state=STATES[kind],
            outputs=body.outputs if kind == "task_succeeded" else None,
            failure=None if kind == "task_succeeded" or not body.HasField("failure") else body.failure,
        )
