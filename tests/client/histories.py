"""Runs as their events and graphs, without a server, for the tests of the views of runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import run_pb2, workflow_pb2

from lattice_client import RunEvent
from lattice_client.cli.attempts import History, Recorder

STATES = {name: run_pb2.TaskState.Value(f"TASK_STATE_{name.upper()}") for name in ("blocked", "queued", "succeeded")}
FAILURE = {"kind": "USER_ERROR", "type": "ValueError", "message": "no date", "traceback": "", "task_id": ""}


def duration(seconds: float) -> Duration:
    return Duration(nanos=round(seconds * 1e9) % 10**9, seconds=round(seconds * 1e9) // 10**9)


def timestamp(seconds: float) -> Timestamp:
    return Timestamp(nanos=round(seconds * 1e9) % 10**9, seconds=round(seconds * 1e9) // 10**9)


@dataclass
class Script:
    """A run that a test writes. Times are seconds since its begin at 1000."""

    tasks: list[run_pb2.TaskRun] = field(default_factory=list)
    graph: list[workflow_pb2.GraphTask] = field(default_factory=list)
    events: list[RunEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.event(0, "run_started", task_count=0)

    def task(self, task_id: str, *after: str, function: str = "", parent: str = "", **fields: Any) -> run_pb2.TaskRun:
        """Add a task to the graph."""
        if "queued_s" in fields:
            fields["queue_time"] = duration(fields.pop("queued_s"))
        if "state" in fields:
            fields["state"] = STATES[fields["state"]]
        function = function or task_id.partition("[")[0]
        found = run_pb2.TaskRun(run_id="run", task_id=task_id, parent_task_id=parent, **fields)
        self.tasks.append(found)
        node = workflow_pb2.GraphTask(task_id=task_id, predecessor_task_ids=after, parent_task_id=parent)
        node.function_name = function
        self.graph.append(node)
        return found

    def event(self, at_s: float, kind: str, task_id: str = "", **data: Any) -> RunEvent:
        """Add an event."""
        data = {"task_id": task_id, "display_name": "", **data}
        self.events.append(RunEvent(len(self.events) + 1, 1000 + at_s, kind, task_id, data))
        return self.events[-1]

    def started(self, at_s: float, task_id: str, attempt: int = 1, node: str = "n1") -> None:
        self.event(at_s, "task_started", task_id, attempt=attempt, node_id=node, gpu_indices=[])

    def succeeded(self, at_s: float, task_id: str, attempt: int = 1) -> None:
        self.event(at_s, "task_succeeded", task_id, attempt=attempt)

    def ran(self, task_id: str, begin_s: float, end_s: float, *after: str, node: str = "n1", **fields: Any) -> None:
        """Add a task that ran once and succeeded."""
        self.task(task_id, *after, **fields)
        self.started(begin_s, task_id, node=node)
        self.succeeded(end_s, task_id)

    def history(self, at_s: float | None = None) -> History:
        """Return the history of the run: of an ended one, or at a time."""
        self.events.sort(key=lambda event: event.time_s)
        if at_s is None:
            self.event(max(event.time_s for event in self.events) - 1000, "run_finished", state="succeeded")
        recorder = Recorder(self.graph, self.tasks)
        for event in self.events:
            recorder.take(event)
        return recorder.history(1000 + (at_s or 0))


def rows(history: History) -> list[tuple[str, int, str, float, float]]:
    """Return of each attempt its task, number, outcome, and how long it was queued and ran."""
    now_s = history.now_s
    return [
        (a.task_id, a.number, a.outcome, round(a.queued_s(now_s), 6), round(a.ran_s(now_s), 6))
        for a in history.attempts
    ]


def chain(length: int) -> Sequence[str]:
    """Return names of tasks."""
    return [f"t{number}" for number in range(length)]
