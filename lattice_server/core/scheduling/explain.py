"""Owns the answer to "why does this task wait?". Rule: it changes nothing, and its work is bounded by constants."""

from collections.abc import Iterator
from itertools import islice

from lattice_server.core.messages import Explanation, Reason, ReasonKind
from lattice_server.core.scheduling.earlier_leases import EarlierLeases
from lattice_server.core.scheduling.needs import Needs
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.shortages import shortages
from lattice_server.core.scheduling.waits import Wait, Waits
from lattice_server.core.scheduling.work import Task, TaskGroup

MAX_NODES = 20  # How many nodes are described.
MAX_WAITS = 20  # How many waits of an attempt are described.
MAX_AHEAD = 1000  # Up to how many tasks, tenants or nodes are counted.


def explain(
    task: Task, placer: Placer, registry: NodeRegistry, waits: Waits, needs: Needs, earlier: EarlierLeases, now: float
) -> Explanation:
    """Return why a task that the scheduler has is not running, since when, and when it may start."""
    if task.lease_id:
        return _explain_leased(task, placer, waits, now)
    if task in earlier:
        node_id = earlier.node_of(task)
        text = f"attempt {task.attempt} ran on node {node_id!r} when the server was restarted, and may still run there"
        return Explanation((Reason(ReasonKind.RUNNING, text, node_id=node_id),), now - task.admitted_at, 0.0)
    if task.predecessor is not None:
        source = task.predecessor.ready.spec.task_id
        reason = Reason(ReasonKind.INPUT, f"it waits for task {source!r}", task_id=source)
        return Explanation((reason,), now - task.admitted_at, None)
    if task.retry_at is not None:
        wait_s = max(0.0, task.retry_at - now)
        text = f"attempt {task.attempt} failed; the next one may start in {wait_s:.1f} s"
        return Explanation((Reason(ReasonKind.RETRY, text),), 0.0, wait_s)
    if task in needs.waiting:
        return Explanation(needs.reasons(task), now - needs.waiting[task], None)
    assert task.group is not None, "a task is in one place"
    reasons = tuple(_waiting(task, task.group, placer, registry, now))
    return Explanation(reasons, now - task.waiting_since, _start_in_s(task, task.group, placer, registry, now))


def _explain_leased(task: Task, placer: Placer, waits: Waits, now: float) -> Explanation:
    lease = placer.table.leases[task.lease_id]
    node_id = lease.slot.node_id
    if task.ending is not None:
        text = f"it is being stopped on node {node_id!r}: {task.ending.message}"
        return Explanation((Reason(ReasonKind.RUNNING, text, node_id=node_id),), 0.0, None)
    if found := waits.of(lease.lease_id):
        reasons = tuple(_wait_reason(task, wait, node_id) for wait in found[:MAX_WAITS])
        return Explanation(reasons, now - min(wait.since for wait in found), None)
    if lease.started_at is not None:
        text = f"attempt {task.attempt} runs on node {node_id!r}"
        return Explanation((Reason(ReasonKind.RUNNING, text, node_id=node_id),), now - lease.started_at, 0.0)
    waited_s = now - lease.sent_at
    if task.predecessor is not None:
        source = task.predecessor.ready.spec.task_id
        text = f"it was sent to node {node_id!r} along with task {source!r}, which it waits for"
        return Explanation((Reason(ReasonKind.INPUT, text, source, node_id),), waited_s, None)
    ahead = list(lease.slot.lease_ids).index(lease.lease_id)
    if ahead == 0:
        text = f"it was sent to node {node_id!r}, which has not said that it started"
        return Explanation((Reason(ReasonKind.RUNNING, text, node_id=node_id),), waited_s, 0.0)
    text = f"it was sent to node {node_id!r}, behind {ahead} short ones"
    return Explanation((Reason(ReasonKind.TURN, text, node_id=node_id),), waited_s, lease.slot.backlog_s)


def _wait_reason(task: Task, wait: Wait, node_id: str) -> Reason:
    about = f"attempt {task.attempt} on node {node_id!r} waits for"
    if wait.signal:
        return Reason(ReasonKind.SIGNAL, f"{about} signal {wait.signal!r}", node_id=node_id)
    called = wait.key[1]
    return Reason(ReasonKind.INPUT, f"{about} task {called!r}, which it called", called, node_id)


def _waiting(task: Task, group: TaskGroup, placer: Placer, registry: NodeRegistry, now: float) -> Iterator[Reason]:
    shape = group.shape
    if not registry.nodes:
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
    ahead = group.count_ahead(task, MAX_AHEAD)
    if batched := ahead // group.max_size * group.max_size:
        least = "at least " if ahead == MAX_AHEAD else ""
        yield Reason(ReasonKind.TURN, f"{least}{batched} tasks of its kind go first")
    clocks = placer.queue.clocks
    mine = clocks.time(group.tenant, now)
    # The names of other tenants are not shown.
    if earlier := sum(clocks.time(name, now) < mine for name in islice(placer.queue.tenants, MAX_AHEAD)):
        yield Reason(ReasonKind.TURN, f"tenants that had less of the cluster go first: {earlier}")
    for node in islice(registry.nodes.values(), MAX_NODES):
        for found in shortages(shape, node):
            fields = {"node_id": found.node_id, "resource": found.what, "wanted": found.wanted, "free": found.free}
            yield Reason(ReasonKind.RESOURCES, str(found), **fields)  # type: ignore[arg-type]  # by name
        reserved_for = placer.reservations.group_of(node)
        if reserved_for is not None and reserved_for is not group:
            text = f"node {node.node_id!r} gathers resources for a larger task that waited longer"
            if reserved_for.shape.is_exclusive:
                text = f"node {node.node_id!r} is kept for a task that waited longer and runs alone on it"
            yield Reason(ReasonKind.TURN, text, node_id=node.node_id)


def _start_in_s(task: Task, group: TaskGroup, placer: Placer, registry: NodeRegistry, now: float) -> float | None:
    """Return an estimate: the batches ahead run on the slots of their kind, each for as long as the last ones."""
    expected_s = placer.pipeline.expected_s(task)
    ahead = group.count_ahead(task, MAX_AHEAD)
    if (
        expected_s is None
        or ahead == MAX_AHEAD
        or not any(registry.could_run(group.shape, node) for node in islice(registry.nodes.values(), MAX_AHEAD))
    ):
        return None
    batches = ahead // group.max_size + 1
    side_by_side = max(1, len(placer.table.slots((group.shape, group.concurrency))))
    return max(0.0, group.due_at() - now, batches * expected_s / side_by_side)
