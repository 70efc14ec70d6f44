"""Owns the answer to "why does this task wait?". Rule: it reads the machines' state and changes nothing."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lattice_server.core.messages import Explanation, Reason, ReasonKind
from lattice_server.core.scheduling.batching import TaskGroup
from lattice_server.core.scheduling.node_registry import Fleet
from lattice_server.core.scheduling.placement import shortages
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Task
from lattice_server.core.states import TASK_TERMINAL, TaskState

if TYPE_CHECKING:
    from lattice_server.core.run.run import Run

MAX_NODES = 20


def explain(task: Task, placer: Placer, fleet: Fleet, now: float) -> Explanation:
    """Return why a task that was handed over is not running, since when, and when it may start."""
    if task.lease_id:
        return _explain_leased(task, placer, now)
    if task.follows is not None:
        source = task.follows.ready.spec.task_id
        reason = Reason(ReasonKind.INPUT, f"it waits for task {source!r}", task_id=source)
        return Explanation((reason,), now - task.admitted_at, None)
    if task.retry_at is not None:
        wait_s = max(0.0, task.retry_at - now)
        text = f"attempt {task.attempt} failed; the next one may start in {wait_s:.1f} s"
        return Explanation((Reason(ReasonKind.RETRY, text),), 0.0, wait_s)
    assert task.group is not None, "a task is in one place"
    reasons = tuple(_waiting(task, task.group, placer, fleet, now))
    return Explanation(reasons, now - task.waiting_since, _start_in_s(task, task.group, placer, fleet, now))


def _explain_leased(task: Task, placer: Placer, now: float) -> Explanation:
    lease = placer.table.leases[task.lease_id]
    node_id = lease.slot.node_id
    if task.ending is not None:
        text = f"it is being stopped on node {node_id!r}: {task.ending.message}"
        return Explanation((Reason(ReasonKind.RUNNING, text, node_id=node_id),), 0.0, None)
    if lease.started_at is not None:
        text = f"attempt {task.attempt} runs on node {node_id!r}"
        return Explanation((Reason(ReasonKind.RUNNING, text, node_id=node_id),), now - lease.started_at, 0.0)
    waited_s = now - lease.sent_at
    if task.follows is not None:
        source = task.follows.ready.spec.task_id
        text = f"it was sent to node {node_id!r} along with task {source!r}, which it waits for"
        return Explanation((Reason(ReasonKind.INPUT, text, source, node_id),), waited_s, None)
    ahead = list(lease.slot.lease_ids).index(lease.lease_id)
    if ahead == 0:
        text = f"it was sent to node {node_id!r}, which has not said that it started"
        return Explanation((Reason(ReasonKind.RUNNING, text, node_id=node_id),), waited_s, 0.0)
    text = f"it was sent to node {node_id!r}, behind {ahead} short ones"
    return Explanation((Reason(ReasonKind.TURN, text, node_id=node_id),), waited_s, lease.slot.backlog_s)


def _waiting(task: Task, group: TaskGroup, placer: Placer, fleet: Fleet, now: float) -> Iterator[Reason]:
    shape = group.shape
    if not fleet.nodes:
        yield Reason(ReasonKind.NODES, "no node is connected")
        return
    due_s = group.due_at() - now
    if due_s > 0:
        size = group.max_size
        yield Reason(ReasonKind.BATCH, f"its batch has {group.count} of {size} tasks and leaves in {due_s:.1f} s")
    concurrency = group.concurrency
    if concurrency is not None and not placer.permits.has_free(concurrency):
        taken, limit = placer.permits.taken(concurrency.key), placer.permits.limit(concurrency)
        yield Reason(ReasonKind.LIMIT, f"{taken} calls of {concurrency.key!r} run, the limit is {limit}")
    elif concurrency is not None and placer.queue.is_exhausted(concurrency.key):
        text = f"a call of {concurrency.key!r} that allows fewer of them goes first"
        yield Reason(ReasonKind.LIMIT, text)
    ahead = _batches_ahead(task, group) * group.max_size
    if ahead:
        yield Reason(ReasonKind.TURN, f"{ahead} tasks of its kind go first")
    clocks = placer.queue.clocks
    mine = clocks.turn(group.tenant, now)
    # Their names are no other tenant's business.
    if earlier := sum(clocks.turn(name, now) < mine for name in placer.queue.tenants):
        yield Reason(ReasonKind.TURN, f"tenants that had less of the cluster go first: {earlier}")
    for node in list(fleet.nodes.values())[:MAX_NODES]:
        for found in shortages(shape, node):
            fields = {"node_id": found.node_id, "resource": found.what, "wanted": found.wanted, "free": found.free}
            yield Reason(ReasonKind.RESOURCES, str(found), **fields)  # type: ignore[arg-type]  # by name
        keeper = placer.reservations.group_of(node)
        if keeper is not None and keeper is not group:
            text = f"node {node.node_id!r} gathers resources for a larger task that waited longer"
            if keeper.shape.is_exclusive:
                text = f"node {node.node_id!r} is kept for a task that waited longer and runs alone on it"
            yield Reason(ReasonKind.TURN, text, node_id=node.node_id)


def _batches_ahead(task: Task, group: TaskGroup) -> int:
    mine = (*task.rank, task.ticket)
    return sum((*other.rank, other.ticket) < mine for other in group.tasks()) // group.max_size


def _start_in_s(task: Task, group: TaskGroup, placer: Placer, fleet: Fleet, now: float) -> float | None:
    """Return a guess: the batches ahead, side by side on what its kind uses today, each as long as the last ones."""
    expected_s = placer.ahead.expected_s(task)
    if expected_s is None or not any(fleet.could_run(group.shape, node) for node in fleet.nodes.values()):
        return None
    batches = _batches_ahead(task, group) + 1
    side_by_side = max(1, len(placer.table.slots((group.shape, group.concurrency))))
    return max(0.0, group.due_at() - now, batches * expected_s / side_by_side)


def explain_in_run(run: "Run", task_id: str, now: float) -> Explanation:
    """Return why a task that the scheduler does not have is where it is."""
    record = run.tasks[task_id]
    if record.state in TASK_TERMINAL:
        waited_s = 0.0 if record.ended_at is None else now - record.ended_at
        what = "it was skipped" if record.state is TaskState.SKIPPED else f"it has {record.state.value}"
        if record.state is TaskState.CANCELLED:
            what = "it was cancelled"
        if record.failure is not None:
            what = f"{what}: {record.failure.message}"
        elif record.state is TaskState.SKIPPED:
            what = f"{what}: a condition, its own or that of a task it needs, was not met"
        return Explanation((Reason(ReasonKind.ENDED, what),), waited_s, None)
    if record.items is not None:
        text = f"{record.open_items} of its {len(record.items)} items have not ended"
        return Explanation((Reason(ReasonKind.RUNNING, text),), now - (record.started_at or now), 0.0)
    reasons = []
    for source in run.dag.predecessors[task_id]:
        other = run.tasks[source]
        if other.state not in TASK_TERMINAL:
            reasons.append(Reason(ReasonKind.INPUT, f"task {source!r} is {other.state.value}", task_id=source))
    if not reasons:
        reasons.append(Reason(ReasonKind.TURN, "it is on its way to the scheduler"))
    return Explanation(tuple(reasons), now - run.started_at, None)
