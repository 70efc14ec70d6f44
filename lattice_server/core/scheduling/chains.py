"""Owns tasks that follow another task of their run. Rule: they are queued when it succeeds, and only then."""

from lattice_server.core.model import Binding, Failure, FailureKind, OutputRef, Outputs, Parameter
from lattice_server.core.references import part_of, resolve
from lattice_server.core.scheduling.work import Task


def follow(task: Task, source: Task) -> None:
    """Have a task wait for another one."""
    task.follows = source
    source.followers[task.ticket] = task


def unfollow(task: Task) -> None:
    """Have a task wait for another one no longer."""
    if task.follows is not None:
        task.follows.followers.pop(task.ticket, None)
        task.follows = None


def release(source: Task, outputs: Outputs) -> list[Task]:
    """Give the followers of a task that succeeded its outputs, and return them."""

    def value_of(reference: OutputRef | Parameter) -> Binding:
        assert isinstance(reference, OutputRef), "the run resolved its parameters"
        return part_of(outputs[reference.output], reference.path)

    released, source.followers = list(source.followers.values()), {}
    for follower in released:
        follower.follows = None
        follower.inputs = {name: resolve(binding, value_of) for name, binding in follower.inputs.items()}
    return released


def drop(source: Task, failure: Failure) -> list[Task]:
    """Return the direct and indirect followers of a task that ended without outputs, unless workers have them.

    A follower that a worker has ends once the worker returns it, which the worker does by itself. Until then it keeps
    following, so that no report about it counts.
    """
    dropped = []
    frontier = [source]
    while frontier:
        task = frontier.pop()
        for follower in task.followers.values():
            if follower.lease_id:
                follower.ending = follower.ending or Failure(FailureKind.CANCELLED, failure.message)
            else:
                follower.follows = None
                dropped.append(follower)
            frontier.append(follower)
        task.followers = {}
    return dropped
