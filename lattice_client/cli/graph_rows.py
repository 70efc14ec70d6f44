"""Owns the tree of a run's graph: its tasks below the tasks that they wait for; in a large run, groups of them.

Rule: it does no I/O and reads no clock.

A large run is shown by groups: tasks of the same function that wait for tasks of the same groups. A group that waits
only for tasks of its own function, such as a chain, is one with them. So a run of thousands of tasks that was written
as a few loops has a few groups.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from statistics import median

from lattice.v1 import run_pb2, workflow_pb2

from lattice_client.cli.progress import fine_span, label_of

# Runs with more tasks are shown by groups.
MAX_SINGLE = 40
# Deeper tasks are not indented further.
MAX_DEPTH = 10
MAX_NAMES = 3


@dataclass(slots=True)
class Group:
    """Tasks that are shown in one row."""

    function: str
    tasks: list[run_pb2.TaskRun]
    predecessors: set[int] = field(default_factory=set)
    depth: int = 0
    above: int | None = None


@dataclass(frozen=True, slots=True)
class TreeRow:
    """A row of the tree. `prefix` draws the branches; the other cells are texts for people."""

    prefix: str
    name: str
    state: str
    attempt: str
    node: str
    queued: str
    ran: str
    after: str


def state_of(task: run_pb2.TaskRun) -> str:
    """Return the state of a task in one word."""
    return run_pb2.TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()


def ran_s(task: run_pb2.TaskRun) -> float | None:
    """Return how long the newest attempt of an ended task ran; None without one."""
    if not task.HasField("start_time") or not task.HasField("end_time"):
        return None
    return max(0.0, (task.end_time.ToNanoseconds() - task.start_time.ToNanoseconds()) / 1e9)


def queued_s(task: run_pb2.TaskRun) -> float | None:
    """Return how long a task waited for its first attempt; None before that."""
    return task.queue_time.ToNanoseconds() / 1e9 if task.HasField("queue_time") else None


def progress_of(task: run_pb2.TaskRun) -> str:
    """Return the newest progress that a task reported, such as `3/10`; empty without one."""
    if not task.HasField("progress"):
        return ""
    found = task.progress
    return f"{found.done:g}/{found.total:g}" if found.HasField("total") else f"{found.done:g}"


def groups_of(
    graph: Sequence[workflow_pb2.GraphTask], tasks: Mapping[str, run_pb2.TaskRun], *, is_grouped: bool
) -> list[Group]:
    """Return the groups of a graph, each after the groups of its predecessors. An ungrouped task is a group."""
    nodes = {task.task_id: task for task in graph if task.task_id in tasks}

    def above(node: workflow_pb2.GraphTask) -> list[str]:
        parents = [node.parent_task_id] if node.parent_task_id else []
        return [name for name in (*node.predecessor_task_ids, *parents) if name in nodes]

    groups: list[Group] = []
    by_key: dict[tuple[str, frozenset[int]], int] = {}
    group_of: dict[str, int] = {}
    for task_id in _ordered({name: above(node) for name, node in nodes.items()}):
        node = nodes[task_id]
        function = node.function_name or node.display_name
        before = frozenset(group_of[name] for name in above(node) if name in group_of)
        found = by_key.get((function, before)) if is_grouped else None
        if is_grouped and len(before) == 1 and groups[min(before)].function == function:
            found = min(before)
        if found is None:
            found = by_key[function, before] = len(groups)
            depth = 1 + max((groups[number].depth for number in before), default=-1)
            nearest = max(before, key=lambda number: (groups[number].depth, number), default=None)
            groups.append(Group(function, [], set(before), depth, nearest))
        group_of[task_id] = found
        groups[found].tasks.append(tasks[task_id])
    return groups


def _ordered(above: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks, each after its predecessors; in the order of definition where that order already fits."""
    seen: set[str] = set()
    for name, before in above.items():
        if not seen.issuperset(before):
            break
        seen.add(name)
    else:
        return [*above]
    try:
        return [*TopologicalSorter(above).static_order()]
    except CycleError:  # A server has no cyclic graphs; one that had would still be shown.
        return [*above]


def tree_rows(groups: Sequence[Group]) -> Iterator[TreeRow]:
    """Yield the rows of the tree, each group below the deepest one that it waits for."""
    below: dict[int | None, list[int]] = {}
    for number, group in enumerate(groups):
        below.setdefault(group.above, []).append(number)
    # A stack, because a chain may be longer than Python's own.
    waiting = [(number, "", "") for number in reversed(below.get(None, []))]
    while waiting:
        number, mark, indent = waiting.pop()
        yield _row(groups, number, mark)
        children = below.get(number, [])
        if groups[number].depth >= MAX_DEPTH:
            waiting += [(child, f"{indent}\u2026 ", indent) for child in reversed(children)]
            continue
        for child in reversed(children):
            is_last = child == children[-1]
            branch, further = ("\u2514\u2500 ", "   ") if is_last else ("\u251c\u2500 ", "\u2502  ")
            waiting.append((child, indent + branch, indent + further))


def _row(groups: Sequence[Group], number: int, prefix: str) -> TreeRow:
    group = groups[number]
    others = sorted(group.predecessors - {group.above} if group.above is not None else group.predecessors)
    after = brief([_name(groups[other]) for other in others])
    if len(group.tasks) == 1:
        (task,) = group.tasks
        attempt, queued, ran = str(task.attempt or ""), queued_s(task), ran_s(task)
        times = ("" if queued is None else fine_span(queued)), (progress_of(task) if ran is None else fine_span(ran))
        return TreeRow(prefix, _name(group), state_of(task), attempt, task.node_id, *times, after)
    states = Counter(map(state_of, group.tasks))
    state = ", ".join(f"{count} {name}" for name, count in states.most_common())
    nodes = {task.node_id for task in group.tasks if task.node_id}
    node = next(iter(nodes)) if len(nodes) == 1 else f"{len(nodes)} nodes" if nodes else ""
    retried = sum(max(0, task.attempt - 1) for task in group.tasks)
    attempt = f"+{retried}" if retried else ""
    waits = [found for task in group.tasks if (found := queued_s(task)) is not None]
    runs = [found for task in group.tasks if (found := ran_s(task)) is not None]
    return TreeRow(prefix, _name(group), state, attempt, node, _times(waits), _times(runs), after)


def brief(names: Sequence[str]) -> str:
    """Return the first of some names, and how many there are besides."""
    more = [f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more])


def _name(group: Group) -> str:
    if len(group.tasks) > 1:
        return f"{group.function} \u00d7 {len(group.tasks):,}"
    return label_of(group.tasks[0].task_id, group.tasks[0].display_name)


def _times(seconds: Sequence[float]) -> str:
    return f"{fine_span(median(seconds))} max {fine_span(max(seconds))}" if seconds else ""
