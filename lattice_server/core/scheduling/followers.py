"""Owns what waits for another task of its run. Rule: it goes on when that one succeeds, and never without it."""

from lattice_server.core.model import Binding, Failure, FailureKind, OutputRef, Outputs, Parameter, part_of, resolve
from lattice_server.core.scheduling.work import Task


def follow(task: Task, source: Task) -> None:
    """Let a task wait for another."""
    task.follows = source
    source.followers[task.ticket] = task


def leave(task: Task) -> None:
    """Let a task wait for another no longer."""
    if task.follows is not None:
        task.follows.followers.pop(task.ticket, None)
        task.follows = None


def release(source: Task, outputs: Outputs) -> list[Task]:
    """Give what follows a task that succeeded its outputs, and return it."""

    def value_of(reference: OutputRef | Parameter) -> Binding:
        assert isinstance(reference, OutputRef), "the run resolved its parameters"
        return part_of(outputs[reference.output], reference.path)

    released, source.followers = list(source.followers.values()), {}
    for follower in released:
        follower.follows = None
        follower.inputs = {name: resolve(binding, value_of) for name, binding in follower.inputs.items()}
    return released


def drop(source: Task, failure: Failure) -> list[Task]:
    """Return all that will never have its inputs now, however far behind, and that no worker holds.

    What a worker holds of it must end once the worker gave it back, which it does by itself; until then it goes on
    waiting, for what will not come, so that nothing else is believed of it.
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
