"""Owns the values of references in a run: outputs, parameters, items.

Rule: no value is decoded except that of a condition, if it is JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lattice_server.core.model import (
    Artifact,
    Binding,
    BindingList,
    Condition,
    Failure,
    FailureKind,
    OutputRef,
    Parameter,
    Payload,
    TaskSpec,
)
from lattice_server.core.references import Leaf, leaves, part_of
from lattice_server.core.run.conditions import PathError, is_met
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TASK_TERMINAL
from lattice_server.core.trust import is_trusted, is_weaker, unpickles

NULL = Payload("application/json", "null")


class Values:
    """The values of one run that are known."""

    def __init__(self, tasks: Mapping[str, TaskRecord], parameters: Mapping[str, Payload]) -> None:
        self.parameters = parameters
        self._tasks = tasks

    def of(self, reference: OutputRef | Parameter) -> Binding:
        """Return the value of a reference; the reference itself while its task has not ended.

        The value is null if the task did not succeed; in the list of a mapped task, each such item is null.
        """
        if isinstance(reference, Parameter):
            return self.parameters[reference.name]
        record = self._tasks[reference.task_id]
        if record.state in TASK_TERMINAL and record.items is not None:
            return part_of(BindingList(tuple(self._of_items(record.items, reference.output))), reference.path)
        if record.outputs is not None:
            return part_of(record.outputs[reference.output], reference.path)
        return NULL if record.state in TASK_TERMINAL else reference

    def is_met(self, condition: Condition) -> bool | None:
        """Whether a condition is met; None when its value is not JSON.

        Raises PathError when the value does not have the part that the condition selects, or is not on the server.
        """
        value = self.of(replace(condition.output, path=()))
        if isinstance(value, BindingList):
            return bool(value.items) is not condition.is_negated
        if isinstance(value, Payload) and isinstance(value.content, Artifact):
            size = value.content.size_bytes
            raise PathError(f"its {size} bytes are too many for a message; return a small output to decide by")
        if not isinstance(value, Payload) or not isinstance(value.content, str):
            return None
        return is_met(condition, value.content)

    def mapped_over(self, spec: TaskSpec) -> Sequence[Payload] | None:
        """Return the items of the list that a task is mapped over; None when they were not reported one by one."""
        over = spec.inputs[spec.over]
        assert isinstance(over, OutputRef), "the graph was validated"
        source = self._tasks[over.task_id]
        if source.items is not None:
            return self._of_items(source.items, over.output)
        return (source.split or {}).get(over.output)

    def untrusted(self, spec: TaskSpec) -> Failure | None:
        """Return why a task may not be given an input whose value is known; None when it may be given all of them."""
        for name, binding in spec.inputs.items():
            for leaf in leaves(binding):
                for value in self._doubtful(spec, name, leaf):
                    if not is_trusted(value, spec.isolation) and unpickles(spec):
                        return _refusal(spec, name, leaf, value)
        return None

    def _doubtful(self, spec: TaskSpec, name: str, leaf: Leaf) -> Sequence[Payload]:
        """Return the known values of a part of an input that a stricter isolated task may have produced."""
        match leaf:
            case Payload():
                return (leaf,)
            case Parameter(parameter):
                return (self.parameters[parameter],)
            case OutputRef() if not is_weaker(spec.isolation, self._tasks[leaf.task_id].spec.isolation):
                return ()
            case _ if name == spec.over:
                return self.mapped_over(spec) or ()
            case _:
                return [value for value in leaves(self.of(leaf)) if isinstance(value, Payload)]

    def _of_items(self, items: Sequence[str], output: str) -> list[Payload]:
        found = []
        for item in items:
            outputs = self._tasks[item].outputs
            found.append(NULL if outputs is None else outputs[output])
        return found


def _refusal(spec: TaskSpec, name: str, leaf: Leaf, value: Payload) -> Failure:
    level = value.produced_at.value
    match leaf:
        case OutputRef(task_id, output):
            source, remedy = f"task {task_id!r} produced it as output {output!r}", f"have {task_id!r} return"
        case Parameter(parameter):
            source, remedy = f"parameter {parameter!r} has a value that a task produced", "pass"
        case _:
            source, remedy = "a task produced it", "pass"
    text = (
        f"input {name!r} would have to be unpickled ({value.media_type}): {source} at isolation {level!r}, and this "
        f"task has isolation {spec.isolation.value!r}, where unpickling could run code of that task's choice; {remedy} "
        f"JSON values, bytes, dates, sets, tuples, arrays or data frames, or give this task isolation {level!r}"
    )
    return Failure(FailureKind.UNTRUSTED_INPUT, text)
