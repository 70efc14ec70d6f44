"""Owns chains: tasks that were sent with a predecessor of their run, and are queued when it succeeds, only then."""

from lattice_server.core.model import Binding, Failure, FailureKind, OutputRef, Outputs, Parameter
from lattice_server.core.references import part_of, resolve
from lattice_server.core.scheduling.work import Task


def link(task: Task, source: Task) -> None:
    """Have a task wait for its predecessor."""
    task.predecessor = source
    source.dependents[task.ticket] = task


def unlink(task: Task) -> None:
    """Have a task no longer wait for its predecessor."""
    if task.predecessor is not None:
        task.predecessor.dependents.pop(task.ticket, None)
        task.predecessor = None


def release(source: Task, outputs: Outputs) -> list[Task]:
    """Give the dependents of a task that succeeded its outputs, and return them."""

    def value_of(reference: OutputRef | Parameter) -> Binding:
        assert isinstance(reference, OutputRef), "the run resolved its parameters"
        return part_of(outputs[reference.output], reference.path)

    released, source.dependents = list(source.dependents.values()), {}
    for dependent in released:
        dependent.predecessor = None
        dependent.inputs = {name: resolve(binding, value_of) for name, binding in dependent.inputs.items()}
    return released


def drop(source: Task, failure: Failure) -> list[Task]:
    """Return the direct and indirect dependents of a task that ended without outputs, unless workers have them.

    A dependent that a worker has ends once the worker returns it, which the worker does by itself. Until then it stays
    linked, so that no report about it counts.
    """
    dropped = []
    frontier = [source]
    while frontier:
        task = frontier.pop()
        for dependent in task.dependents.values():
            if dependent.lease_id:
                dependent.ending = dependent.ending or Failure(FailureKind.CANCELLED, failure.message)
            else:
                dependent.predecessor = None
                dropped.append(dependent)
            frontier.append(dependent)
        task.dependents = {}
    return dropped
