"""Owns the values of references in a run: outputs, parameters, items.

Rule: no value is decoded except that of a condition, if it is JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lattice_server.core.model import Binding, BindingList, Condition, OutputRef, Parameter, Payload, TaskSpec
from lattice_server.core.references import part_of
from lattice_server.core.run.conditions import is_met
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TASK_TERMINAL

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

        Raises PathError when the value does not have the part that the condition selects.
        """
        value = self.of(replace(condition.output, path=()))
        if isinstance(value, BindingList):
            return bool(value.items) is not condition.is_negated
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

    def _of_items(self, items: Sequence[str], output: str) -> list[Payload]:
        found = []
        for item in items:
            outputs = self._tasks[item].outputs
            found.append(NULL if outputs is None else outputs[output])
        return found
