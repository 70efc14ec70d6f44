"""Owns what must hold of the machines at any time. Rule: it reads everything and changes nothing."""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

from lattice_server.core.deadlines import Deadlines
from lattice_server.core.scheduling.nodes import Node, held_leases
from lattice_server.core.scheduling.placement import suits
from lattice_server.core.scheduling.queue import Queue
from lattice_server.core.scheduling.work import Lease, Task
from lattice_server.core.states import TASK_TERMINAL, RunState, TaskState

if TYPE_CHECKING:
    from lattice_server.core.run.run import Run
    from lattice_server.core.run.task_table import TaskRecord

AHEAD_OF_INPUTS = frozenset({TaskState.QUEUED, TaskState.RUNNING, TaskState.SUCCEEDED})


def check(
    tasks: Mapping[tuple[str, str], Task],
    nodes: Mapping[str, Node],
    leases: Mapping[str, Lease],
    queue: Queue,
    backoff: Deadlines[Task],
    timeouts: Deadlines[Task],
) -> None:
    """Assert what must hold between the parts of the machine; each checks itself as well."""
    for node in nodes.values():
        node.check()
    assert sorted(held_leases(nodes)) == sorted(leases)
    for lease in leases.values():
        _check_lease(lease, nodes[lease.slot.node_id])
    waiting = [task for group in queue.groups() for task in group.tasks()]
    assert len(waiting) == sum(group.count for group in queue.groups())
    assert all(task.group is not None and not task.lease_id for task in waiting)
    backing_off = list(backoff)
    assert all(task.retry_at is not None for task in backing_off)
    leased = [task for lease in leases.values() for task in lease.members()]
    following = [task for task in tasks.values() if task.follows is not None and not task.lease_id]
    places = [id(task) for task in (*waiting, *backing_off, *leased, *following)]
    assert len(places) == len(set(places)), "a task is in two places"
    assert set(places) == {id(task) for task in tasks.values()}, "a task is nowhere"
    timed = {id(task) for task in timeouts}
    for key, task in tasks.items():
        assert key == (task.ready.run_id, task.ready.spec.task_id)
        _check_task(task)
        if task.ready.spec.total_timeout_s is not None and task.follows is None and task.ending is None:
            assert id(task) in timed, "nobody watches the time of a task"


def _check_lease(lease: Lease, node: Node) -> None:
    assert lease.slot.slot_id in node.slots
    assert lease.members(), "a lease of nothing"
    assert all(task.lease_id == lease.lease_id for task in lease.members())
    assert len({id(task) for task in lease.tasks}) == len(lease.tasks), "a task is in a batch twice"
    assert lease.slot.resources == lease.shape.resources, "a slot holds what its lease does not need"
    assert suits(lease.shape, node)
    for task in lease.members():
        assert (task.shape, task.ready.tenant) == (lease.shape, lease.tenant), "strangers in a batch"
    if lease.started_at is not None:
        assert lease.tasks[0].follows is None, "a task went ahead of its input"


def _check_task(task: Task) -> None:
    retry = task.ready.spec.retry
    assert not task.is_over
    assert task.failures < retry.max_attempts
    assert task.losses < retry.max_worker_losses
    assert task.attempt >= 0
    if task.follows is not None and task.ending is None:
        assert not task.follows.is_over, "a task follows one that ended"
        assert task.follows.followers[task.ticket] is task
    assert all(follower.follows is task for follower in task.followers.values())
    assert task.ending is None or task.lease_id, "a task that must end, and that nobody holds, has not ended"


def check_run(run: "Run") -> None:
    """Assert what must hold of a run that has started."""
    assert run.counts == {state: sum(r.state is state for r in run.tasks.values()) for state in TaskState}
    assert run.is_terminal == (run.open_tasks == 0 and not run.is_open), "a run ends with its last task"
    assert not run.is_open or run.state is RunState.RUNNING, "a run that stops is open"
    assert run.tasks.keys() == run.dag.tasks.keys()
    to_come = {*run.handover.added, *run.handover.ready, *run.handover.stopping}
    for task_id, record in run.tasks.items():
        _check_record(run, task_id, record, to_come)
    failed = {TaskState.FAILED, TaskState.CANCELLED}
    if run.state is RunState.SUCCEEDED:
        assert run.failure is None
        assert not any(record.state in failed for record in run.tasks.values())
    if run.state is RunState.FAILED:
        assert run.failure is not None


def _check_record(run: "Run", task_id: str, record: "TaskRecord", to_come: Container[str]) -> None:
    sources = [(source, run.tasks[source].state) for source in run.dag.predecessors[task_id]]
    met = [
        state is TaskState.SUCCEEDED or (state in TASK_TERMINAL and (source, task_id) in run.dag.optional)
        for source, state in sources
    ]
    if record.state is TaskState.BLOCKED and run.state is RunState.RUNNING:
        assert record.missing == len(met) - sum(met)
    if record.state is TaskState.BLOCKED and task_id not in to_come:
        assert record.missing > 0, f"{task_id} is ready and nobody was told"
        assert run.state is RunState.RUNNING, f"{task_id} waits in a run that is over"
        assert all(state not in TASK_TERMINAL or ok for (_, state), ok in zip(sources, met, strict=True))
    if record.state in AHEAD_OF_INPUTS:
        assert all(met), f"{task_id} went ahead of its inputs"
    if record.state is TaskState.SUCCEEDED:
        assert record.failure is None
        assert record.items is not None or record.outputs is not None
    if record.items is not None:
        states = [run.tasks[item].state for item in record.items]
        assert record.open_items == sum(state not in TASK_TERMINAL for state in states)
        assert (record.open_items == 0) == (record.state in TASK_TERMINAL)
        assert (record.state is TaskState.SUCCEEDED) == all(state is TaskState.SUCCEEDED for state in states)
    assert (record.ended_at is not None) == (record.state in TASK_TERMINAL)
