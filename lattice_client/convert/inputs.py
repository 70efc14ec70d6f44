"""Owns the translation of an input to a binding. Rule: every output in a value is wired, or the value is refused.

Lists and dicts of JSON values and outputs are sent as lists and maps, which a task in any language can read. Any other
value is pickled with numbers in place of the outputs, and is sent as a list: the pickle, then the outputs by number. A
dict of several keys is sent in this way to a task in Python, because the contract's maps have no order.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lattice.v1 import payload_pb2

from lattice_client.code.blame import blame_value
from lattice_client.convert import payloads
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.deferred import IN_TEXT, DeferredValueError
from lattice_client.graph.outputs import WIRES, Scope, TaskOutput, Wire, written_in

Store = Callable[[str, bytes], Awaitable[payload_pb2.Payload]]
# protobuf reads messages nested up to 100 deep; each level of a binding takes two.
MAX_LEVELS = 32


@dataclass(frozen=True, slots=True)
class Binder:
    """Writes one input into a message.

    Attributes:
        where: the name of the input in errors.
        store: uploads an encoding that may be too large for an inline payload; called with media type and encoding.
        scope: the outputs and parameters that the input may be wired to.
        is_for_python: whether the task is written in Python.
    """

    where: str
    store: Store
    scope: Scope
    is_for_python: bool = True

    async def fill(self, message: payload_pb2.Binding, value: Any) -> None:
        """Write a value that may contain outputs. Raises TaskDefinitionError."""
        if isinstance(value, WIRES):
            self._fill_wire(message, value)
            return
        found = payloads.among_json(value, *WIRES)
        holders: dict[int, Any] = {}
        if found == []:
            message.payload.CopyFrom(await self._stored(payloads.JSON, payloads.to_json(value)))
        elif found and _add_holders(value, holders) <= MAX_LEVELS and self._may_be_tree(holders):
            await self._fill_tree(message, value, holders)
        else:
            await self._fill_pickled(message, value)

    def _fill_wire(self, message: payload_pb2.Binding, value: Wire) -> None:
        if isinstance(value, TaskOutput):
            self.fill_reference(message.output, value)
        elif self.scope.parameters.get(value.name) is value:
            message.parameter = value.name
        else:
            raise TaskDefinitionError(f"{self.where} is wired to {value!r} of another workflow")

    def fill_reference(self, message: payload_pb2.OutputRef, output: TaskOutput) -> None:
        """Write a reference to an output. Raises TaskDefinitionError when its task belongs to another run."""
        if not self.scope.has(output):
            raise TaskDefinitionError(
                f"{self.where} is wired to output {output.output!r} of task {output.task_id!r} of another workflow, "
                "which this run does not have"
            )
        message.task_id, message.output, message.optional = output.task_id, output.output, output.is_optional
        for step in output.path:
            if isinstance(step, str):
                message.path.add(key=step)
            else:
                message.path.add(index=step)

    async def payload_of(self, value: Any) -> payload_pb2.Payload:
        """Return the payload of a value without outputs. Raises TaskDefinitionError."""
        try:
            media_type, data = payloads.encode(value)
        except Exception as error:
            raise self._refusal(value, error) from error
        return await self._stored(media_type, data)

    def _may_be_tree(self, holders: dict[int, Any]) -> bool:
        has_order = any(type(holder) is dict and len(holder) > 1 for holder in holders.values())
        return not (has_order and self.is_for_python)

    async def _fill_tree(self, message: payload_pb2.Binding, value: Any, holders: dict[int, Any]) -> None:
        if isinstance(value, WIRES):
            self._fill_wire(message, value)
        elif id(value) not in holders:
            message.payload.CopyFrom(await self._stored(payloads.JSON, payloads.to_json(value)))
        elif type(value) is dict:
            for key, item in value.items():
                self._check_texts(key.encode())
                await self._fill_tree(message.map.entries[key], item, holders)
        else:
            for item in value:
                await self._fill_tree(message.list.items.add(), item, holders)

    async def _fill_pickled(self, message: payload_pb2.Binding, value: Any) -> None:
        try:
            media_type, data = payloads.encode(value)
        except DeferredValueError:
            await self._fill_around(message, value)
        except Exception as error:
            raise self._refusal(value, error) from error
        else:
            message.payload.CopyFrom(await self._stored(media_type, data))

    async def _fill_around(self, message: payload_pb2.Binding, value: Any) -> None:
        try:
            data, wires = payloads.encode_around(value, WIRES)
        except Exception as error:
            raise self._refusal(value, error) from error
        items = message.list.items
        items.add().payload.CopyFrom(await self._stored(payloads.WITH_OUTPUTS, data))
        for wire in wires:
            self._fill_wire(items.add(), wire)

    async def _stored(self, media_type: str, data: bytes) -> payload_pb2.Payload:
        self._check_texts(data)
        if len(data) <= payloads.ALWAYS_INLINE_BYTES:
            return payloads.inline(media_type, data)
        return await self.store(media_type, data)

    def _check_texts(self, data: bytes) -> None:
        """Raise TaskDefinitionError for an encoding with a text that contains an output or a task by its `repr`."""
        if found := written_in(data, self.scope):
            raise TaskDefinitionError(f"{self.where} holds {found} as a text, which has no value yet: {IN_TEXT}")

    def _refusal(self, value: Any, error: Exception) -> TaskDefinitionError:
        dump = partial(payloads.encode_around, kinds=WIRES)
        advice = "pass data from which the task can make it"
        return TaskDefinitionError(blame_value(self.where, value, error, dump, advice))


def _add_holders(value: Any, holders: dict[int, Any]) -> int:
    """Add each container of an output to `holders`, by its identity; return the depth of their nesting."""
    if isinstance(value, WIRES):
        return 1
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    levels = max((_add_holders(item, holders) for item in items), default=0)
    if levels:
        holders[id(value)] = value
        return levels + 1
    return 0
