"""Owns the translation of task outputs to the result of a run. Rule: the graph decides the shape of the result."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lattice.v1 import payload_pb2, run_pb2

from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import TaskOutput

T = TypeVar("T")
# Takes a value, and its name in errors.
Decode = Callable[[payload_pb2.Payload, str], Awaitable[Any]]
# The names of the outputs of tasks in the order of their declaration, by task id, as far as this client knows them.
Declared = Mapping[str, Sequence[str]]


def ordered(outputs: Mapping[str, T], declared: Sequence[str] = ()) -> dict[str, T]:
    """Return outputs in the order of their declaration, then the others by name: a map of the contract has no order."""
    first = [name for name in declared if name in outputs]
    return {name: outputs[name] for name in [*first, *sorted(set(outputs).difference(first))]}


async def result_of(tasks: Iterable[run_pb2.TaskRun], decode: Decode, declared: Declared) -> dict[str, Any]:
    """Return the outputs of the final tasks of an ended run: of a single task by name, of several tasks by task id.

    A final task that did not succeed counts as one of several; its entry is None.
    """
    final: dict[str, run_pb2.TaskRun] = {}
    items: dict[str, list[run_pb2.TaskRun]] = {}
    for task in tasks:
        if task.parent_task_id in items:
            items[task.parent_task_id].append(task)
            continue
        final[task.task_id] = task
        if task.HasField("item_count"):
            items[task.task_id] = []
    found = {
        name: await outputs_of(one, items.get(name, ()), decode, declared.get(name, ())) for name, one in final.items()
    }
    if len(found) == 1:
        (outputs,) = found.values()
        return outputs or {}
    return found


async def outputs_of(
    task: run_pb2.TaskRun, items: Sequence[run_pb2.TaskRun], decode: Decode, declared: Sequence[str]
) -> dict[str, Any] | None:
    """Return the outputs of a task by name; None when it did not succeed.

    The outputs of a mapped task are lists, with None for each of its `items` that has no such output.
    """
    if not items:
        if task.state != run_pb2.TASK_STATE_SUCCEEDED:
            return None
        return await decode_all(task.task_id, ordered(task.outputs, declared), decode)
    names = ordered(dict.fromkeys(name for item in items for name in item.outputs), declared)
    if not names:
        return None
    return {
        name: [
            await decode(item.outputs[name], named(item.task_id, name)) if name in item.outputs else None
            for item in items
        ]
        for name in names
    }


async def decode_all(task_id: str, outputs: Mapping[str, payload_pb2.Payload], decode: Decode) -> dict[str, Any]:
    """Return the outputs of a task by name, as `decode` returns them."""
    return {name: await decode(payload, named(task_id, name)) for name, payload in outputs.items()}


def named(task_id: str, output: str) -> str:
    """Return the name of an output in errors."""
    return f"output {output!r} of task {task_id!r}"


def value_of(outputs: dict[str, Any], task: LatticeTask | TaskOutput | str) -> Any:
    """Return a task's outputs as `AsyncRun.output` does: the value of a single output, or all outputs by name.

    The definition of the task decides whether it has a single output. For a task given by its id, where no definition
    is known, the returned outputs decide.
    """
    if isinstance(task, TaskOutput):
        return outputs.get(task.output)
    names = tuple(outputs) if isinstance(task, str) else task.definition.outputs
    is_single = len(names) == 1 and (isinstance(task, str) or not task.definition.may_return_more)
    return outputs.get(names[0]) if is_single else outputs


def declared_by(tasks: Iterable[LatticeTask]) -> dict[str, Sequence[str]]:
    """Return the output names of those tasks with several outputs, in the order of their declaration."""
    return {task.task_id: task.definition.outputs for task in tasks if len(task.definition.outputs) > 1}
