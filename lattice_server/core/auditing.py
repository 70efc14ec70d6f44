"""Owns what must hold of the scheduler's machine at any time. Rule: it reads everything and changes nothing."""

from collections.abc import Mapping

from lattice_server.core.attempts import Lease, Task
from lattice_server.core.leases import Node, held_leases
from lattice_server.core.placement import suits
from lattice_server.core.queue import Queue
from lattice_server.core.timers import Timers


def check(
    tasks: Mapping[tuple[str, str], Task],
    nodes: Mapping[str, Node],
    leases: Mapping[str, Lease],
    queue: Queue,
    backoff: Timers,
    timeouts: Timers,
) -> None:
    """Assert what must hold between the parts of the machine; each checks itself as well."""
    for node in nodes.values():
        node.check()
    assert sorted(held_leases(nodes)) == sorted(leases)
    for lease in leases.values():
        _check_lease(lease, nodes[lease.slot.node_id])
    waiting = [task for collector in queue.collectors() for task in collector.tasks()]
    assert len(waiting) == sum(collector.count for collector in queue.collectors())
    assert all(task.collector is not None and not task.lease_id for task in waiting)
    backing_off = backoff.tasks()
    assert all(task.retry_at is not None for task in backing_off)
    leased = [task for lease in leases.values() for task in lease.members()]
    following = [task for task in tasks.values() if task.follows is not None and not task.lease_id]
    places = [id(task) for task in (*waiting, *backing_off, *leased, *following)]
    assert len(places) == len(set(places)), "a task is in two places"
    assert set(places) == {id(task) for task in tasks.values()}, "a task is nowhere"
    timed = {id(task) for task in timeouts.tasks()}
    for key, task in tasks.items():
        assert key == (task.ready.run_id, task.ready.spec.task_id)
        _check_task(task, tasks)
        if task.ready.spec.total_timeout_s is not None and task.follows is None and task.ending is None:
            assert id(task) in timed, "nobody watches the time of a task"


def _check_lease(lease: Lease, node: Node) -> None:
    assert lease.slot.slot_id in node.slots
    assert lease.members(), "a lease of nothing"
    assert all(task.lease_id == lease.lease_id for task in lease.members())
    assert len({id(task) for task in lease.tasks}) == len(lease.tasks), "a task is in a batch twice"
    assert lease.shape == lease.tasks[0].shape
    assert lease.slot.resources == lease.shape.resources, "a slot holds what its lease does not need"
    assert suits(lease.shape, node)
    for task in lease.tasks:
        assert (task.shape, task.ready.tenant) == (lease.shape, lease.tenant), "strangers in a batch"
    if lease.started_at is not None:
        assert lease.tasks[0].follows is None, "a task went ahead of its input"


def _check_task(task: Task, tasks: Mapping[tuple[str, str], Task]) -> None:
    retry = task.ready.spec.retry
    assert not task.is_over
    assert task.failures < retry.max_attempts
    assert task.losses < retry.max_worker_losses
    assert task.attempt >= 0
    if task.follows is not None:
        assert not task.follows.is_over, "a task follows one that ended"
        assert task.follows.followers[task.ticket] is task
    assert all(follower.follows is task for follower in task.followers.values())
    assert task.ending is None or task.lease_id, "a task that must end, and that nobody holds, has not ended"
