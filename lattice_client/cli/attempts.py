"""Owns the history of a run: its attempts with their times, the critical path, and summaries by node and function.

Rule: it does no I/O and reads no clock. Times are seconds since 1970 on the server's clock.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from lattice.v1 import run_pb2, workflow_pb2

from lattice_client.cli.progress import label_of
from lattice_client.convert.events import RunEvent

OUTCOMES = {
    "task_succeeded": "succeeded",
    "task_failed": "failed",
    "task_retrying": "failed",
    "task_cancelled": "cancelled",
}
# A node is compared with the others by functions that it ran at least this often.
MIN_COMPARED = 3


@dataclass(slots=True)
class Attempt:
    """One try of a task, or the wait for its first one.

    Attributes:
        number: from 1; 0 for a task that waits for its first attempt.
        ready_s: when it could start: its inputs were there, and its backoff was over.
        start_s: when it started; None while it waits.
        end_s: when it ended; None before.
        outcome: `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    """

    task_id: str
    label: str
    function: str
    number: int
    ready_s: float
    start_s: float | None = None
    end_s: float | None = None
    node_id: str = ""
    gpu_indices: tuple[int, ...] = ()
    outcome: str = "queued"
    failure: str = ""
    is_critical: bool = False

    def queued_s(self, now_s: float) -> float:
        """Return how long it waited for resources, up to `now_s`."""
        return max(0.0, (now_s if self.start_s is None else self.start_s) - self.ready_s)

    def ran_s(self, now_s: float) -> float:
        """Return how long it ran, up to `now_s`."""
        return 0.0 if self.start_s is None else max(0.0, (now_s if self.end_s is None else self.end_s) - self.start_s)


@dataclass(frozen=True, slots=True)
class NodeUse:
    """The attempts of one node. `slowdown` compares its run times with those of other nodes; None without any."""

    node_id: str
    attempts: int
    failed: int
    busy_s: float
    slowdown: float | None


@dataclass(frozen=True, slots=True)
class FunctionUse:
    """The attempts of one function. Times in seconds."""

    function: str
    attempts: int
    failed: int
    median_ran_s: float
    max_ran_s: float
    median_queued_s: float
    max_queued_s: float


@dataclass
class History:
    """The attempts of a run, in the order of their starts; queued attempts are last."""

    begin_s: float
    now_s: float
    attempts: list[Attempt]
    path: list[str] = field(default_factory=list)

    def on_path(self) -> list[Attempt]:
        """Return the attempts on the critical path, in order."""
        order = {task_id: index for index, task_id in enumerate(self.path)}
        return sorted((a for a in self.attempts if a.is_critical), key=lambda a: (order[a.task_id], a.number))

    def nodes(self) -> list[NodeUse]:
        """Return the use of each node, the slowest first."""
        found: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            if attempt.node_id:
                found[attempt.node_id].append(attempt)
        slowdowns = self._slowdowns()
        uses = [
            NodeUse(node_id, len(all_), _failed(all_), sum(a.ran_s(self.now_s) for a in all_), slowdowns.get(node_id))
            for node_id, all_ in found.items()
        ]
        return sorted(uses, key=lambda use: (-(use.slowdown or 0), use.node_id))

    def functions(self) -> list[FunctionUse]:
        """Return the use of each function; the function with the longest total run time is first."""
        found: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            found[attempt.function].append(attempt)
        uses = []
        for function, all_ in found.items():
            ran = [a.ran_s(self.now_s) for a in all_ if a.start_s is not None] or [0.0]
            queued = [a.queued_s(self.now_s) for a in all_]
            number = sum(a.number > 0 for a in all_)
            times = median(ran), max(ran), median(queued), max(queued)
            uses.append((sum(ran), FunctionUse(function, number, _failed(all_), *times)))
        return [use for _, use in sorted(uses, key=lambda pair: (-pair[0], pair[1].function))]

    def _slowdowns(self) -> dict[str, float]:
        """Return by node its run time over the run time on other nodes, both from the medians of each function.

        Long functions count more: the times of short ones are mostly noise.
        """
        times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for attempt in self.attempts:
            if attempt.outcome == "succeeded":
                times[attempt.function][attempt.node_id].append(attempt.ran_s(self.now_s))
        here: dict[str, float] = defaultdict(float)
        elsewhere: dict[str, float] = defaultdict(float)
        for by_node in times.values():
            compared = {node: median(found) for node, found in by_node.items() if len(found) >= MIN_COMPARED}
            for node_id, here_s in compared.items():
                others = [seconds for other, seconds in compared.items() if other != node_id]
                if others:
                    here[node_id] += here_s * len(by_node[node_id])
                    elsewhere[node_id] += median(others) * len(by_node[node_id])
        return {node_id: here[node_id] / total_s for node_id, total_s in elsewhere.items() if total_s > 0}


def _failed(attempts: Iterable[Attempt]) -> int:
    return sum(attempt.outcome == "failed" for attempt in attempts)


class Recorder:
    """Collects the attempts of a run from its events, in their order."""

    def __init__(self, graph: Sequence[workflow_pb2.GraphTask], tasks: Sequence[run_pb2.TaskRun]) -> None:
        self._functions = {task.task_id: task.function_name or task.display_name for task in graph}
        self._tasks = {task.task_id: task for task in tasks}
        self._predecessors = predecessors_of(graph, tasks)
        self._begin_s = self._newest_s = 0.0
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._last: dict[str, Attempt] = {}
        self._may_retry_s: dict[str, float] = {}
        self._is_over = False

    def take(self, event: RunEvent) -> None:
        """Apply the next event."""
        self._newest_s = max(self._newest_s, event.time_s)
        match event.type:
            case "run_started":
                self._begin_s = event.time_s
            case "run_finished":
                self._is_over = True
            case "task_started":
                self._start(event)
            case kind if kind in OUTCOMES:
                self._end(event)

    def _start(self, event: RunEvent) -> None:
        task_id, number = event.task_id, event.data["attempt"]
        start_s = self._time_of(event, "start_time")
        earlier = self._last.get(task_id)
        if earlier is None:
            task = self._tasks.get(task_id)
            waited_s = task.queue_time.ToNanoseconds() / 1e9 if task is not None else 0.0
            ready_s = start_s - waited_s
        else:
            ready_s = self._may_retry_s.pop(task_id, earlier.end_s or start_s)
        attempt = self._new(task_id, number, min(ready_s, start_s), event.data["display_name"])
        attempt.start_s, attempt.outcome = start_s, "running"
        attempt.node_id, attempt.gpu_indices = event.data["node_id"], tuple(event.data["gpu_indices"])
        self._attempts[task_id, number] = self._last[task_id] = attempt

    def _end(self, event: RunEvent) -> None:
        attempt = self._attempts.get((event.task_id, event.data["attempt"]))
        if attempt is None:  # It failed or was cancelled before it started, or its outputs are those of a retried run.
            return
        attempt.end_s, attempt.outcome = self._time_of(event, "end_time"), OUTCOMES[event.type]
        failure = event.data.get("failure")
        if failure:
            text = f"{failure['type']}: {failure['message']}" if failure["type"] else failure["message"]
            attempt.failure = f"{failure['kind']}: {text}"
        if event.type == "task_retrying":
            self._may_retry_s[event.task_id] = max(event.time_s, event.data["retry_time_s"])

    def _time_of(self, event: RunEvent, name: Literal["start_time", "end_time"]) -> float:
        """Return when an attempt started or ended: on the worker's clock for the newest one, else when it was told.

        A worker reports the start of a short function together with its end.
        """
        task = self._tasks.get(event.task_id)
        if task is None or task.attempt != event.data["attempt"] or not task.HasField(name):
            return event.time_s
        found_s: float = getattr(task, name).ToNanoseconds() / 1e9
        return found_s

    def _new(self, task_id: str, number: int, ready_s: float, name: str) -> Attempt:
        return Attempt(task_id, label_of(task_id, name), self._functions.get(task_id) or name, number, ready_s)

    def history(self, clock_s: float) -> History:
        """Return the history up to the time `clock_s`, or to the end of a run that has ended."""
        now_s = self._newest_s if self._is_over else max(self._newest_s, clock_s)
        started = sorted(self._attempts.values(), key=lambda attempt: (attempt.start_s, attempt.task_id))
        found = History(self._begin_s, now_s, [*started, *([] if self._is_over else self._waiting(now_s))])
        found.path = self._critical_path(now_s)
        critical = set(found.path)
        for attempt in found.attempts:
            attempt.is_critical = attempt.task_id in critical
        return found

    def _waiting(self, now_s: float) -> Iterator[Attempt]:
        """Yield an attempt for each task that waits for resources or for its backoff."""
        for task_id, task in self._tasks.items():
            if task.state != run_pb2.TASK_STATE_QUEUED:
                continue
            earlier = self._last.get(task_id)
            if earlier is not None:
                ready_s = self._may_retry_s.get(task_id, earlier.end_s or now_s)
            else:
                ends = [self._last[name].end_s for name in self._predecessors(task_id) if name in self._last]
                ready_s = max([self._begin_s, *(end for end in ends if end is not None)])
            yield self._new(task_id, task.attempt + 1 if earlier else 0, min(ready_s, now_s), task.display_name)

    def _critical_path(self, now_s: float) -> list[str]:
        """Return the critical path in order: before each task comes the predecessor that ended last."""

        def end_s(task_id: str) -> float:
            end = self._last[task_id].end_s
            return now_s if end is None else end

        path: list[str] = []
        names: Iterable[str] = self._last
        while following := [name for name in names if name in self._last and name not in path]:
            path.append(max(following, key=end_s))
            names = self._predecessors(path[-1])
        return path[::-1]


def predecessors_of(
    graph: Sequence[workflow_pb2.GraphTask], tasks: Sequence[run_pb2.TaskRun]
) -> Callable[[str], Sequence[str]]:
    """Return a function from a task to the tasks that it waits for.

    A mapped task never runs: its items stand for it, and have its predecessors.
    """
    nodes: Mapping[str, workflow_pb2.GraphTask] = {task.task_id: task for task in graph}
    mapped = {task.task_id for task in tasks if task.HasField("item_count")}
    items: dict[str, list[str]] = defaultdict(list)
    for task in graph:
        if task.parent_task_id in mapped:
            items[task.parent_task_id].append(task.task_id)

    def find(task_id: str) -> list[str]:
        found: list[str] = []
        if (node := nodes.get(task_id)) is None:
            return found
        direct = list(node.predecessor_task_ids)
        if node.parent_task_id in mapped:
            direct += nodes[node.parent_task_id].predecessor_task_ids if node.parent_task_id in nodes else ()
        elif node.parent_task_id:
            direct.append(node.parent_task_id)
        for name in dict.fromkeys(direct):
            found += items[name] if name in mapped else [name]
        return found

    return find
