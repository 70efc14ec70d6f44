"""Owns what references mean in a run: outputs, parameters, items, conditions. Rule: no value is opened,
but that of a condition, if it is JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lattice_server.core.model import Binding, BindingList, Condition, OutputRef, Parameter, Payload, TaskSpec, part_of
from lattice_server.core.run.conditions import is_met
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TASK_TERMINAL

NULL = Payload("application/json", "null")


class Values:
    """The values of one run, as far as they are known."""

    def __init__(self, tasks: Mapping[str, TaskRecord], parameters: Mapping[str, Payload]) -> None:
        self.parameters = parameters
        self._tasks = tasks

    def of(self, reference: OutputRef | Parameter) -> Binding:
        """Return what a reference means; the reference itself while its task has not ended.

        A task that did not succeed gives null, and so does each such item of a mapped task, whose items are known.
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
        """Whether a task runs; None when that cannot be told without opening the value.

        Raises PathError when the value has no such part as the condition selects.
        """
        value = self.of(replace(condition.output, path=()))
        if isinstance(value, BindingList):
            return bool(value.items) is not condition.is_negated
        if not isinstance(value, Payload) or not isinstance(value.content, str):
            return None
        return is_met(condition, value.content)

    def mapped_over(self, spec: TaskSpec) -> Sequence[Payload] | None:
        """Return the items of the list a task is mapped over; None when they did not come one by one."""
        over = spec.inputs[spec.over]
        assert isinstance(over, OutputRef), "the graph was validated"
        source = self._tasks[over.task_id]
        if source.items is not None:
            return self._of_items(source.items, over.output)
        return (source.split or {}).get(over.output)

    def _of_items(self, items: Sequence[str], output: str) -> list[Payload]:
        found = []
        for item in items:
            outputs = self._tasks[item].outputs
            found.append(NULL if outputs is None else outputs[output])
        return found
