"""Owns placeholders for values that tasks will produce. Rule: every operation that would read such a value raises.

The `repr` of a placeholder is for people, and is the only text that it gives.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from lattice_client.errors import TaskDefinitionError

IN_TEXT = 'to put it into a text, use template("... {x} ...", x=task.output)'
AS_VALUE = "give it to a task as an input, and look into it inside that task"
AS_CONDITION = "to run a task only if it is true, use add_task(..., when=task.output)"
AS_COMPARISON = "to run a task only if it has a value, use add_task(..., when=task.output, equals=...)"
# The special methods of operators, calls and conversions.
BINARY = [
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "divmod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "xor",
]
UNARY = ["neg", "pos", "abs", "invert", "int", "float", "complex", "index", "round", "call", "lt", "le", "gt", "ge"]
OPERATORS = [f"__{side}{name}__" for name in [*BINARY, "or"] for side in ("", "r")] + [f"__{name}__" for name in UNARY]

UNSET = object()


class DeferredValueError(TaskDefinitionError):
    """A value that exists only during a run cannot be pickled here."""


class DeferredAttributeError(TaskDefinitionError, AttributeError):
    """An attribute of a value that exists only during a run cannot be read here."""


if TYPE_CHECKING:

    class _AnyValue(Any):  # type: ignore[misc]  # a value of any type, for `TaskDefinition.bind`
        pass
else:

    class _AnyValue:
        __slots__ = ()


class Deferred(_AnyValue):
    """A value that exists only after tasks have run. Type checkers accept it where any type is expected."""

    __slots__ = ()

    def _unknown(self, advice: str) -> TaskDefinitionError:
        return TaskDefinitionError(f"{self!r} has no value yet: {advice}")

    if not TYPE_CHECKING:  # type checkers see `_AnyValue`

        def __getattr__(self, name: str) -> NoReturn:
            # Libraries probe any object for names with an underscore; for those it has no attribute.
            if name.startswith("_") or name in self.__slots__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise DeferredAttributeError(f"{self!r} has no value yet: {AS_VALUE}")

    def __str__(self) -> str:
        raise self._unknown(IN_TEXT)

    def __format__(self, spec: str) -> str:
        raise self._unknown(IN_TEXT)

    def __bytes__(self) -> bytes:
        raise self._unknown(IN_TEXT)

    def __iter__(self) -> Iterator[Any]:
        raise self._unknown(AS_VALUE)

    def __len__(self) -> int:
        raise self._unknown(AS_VALUE)

    def __contains__(self, item: object) -> bool:
        raise self._unknown(AS_VALUE)

    def __getitem__(self, key: Any) -> Any:
        raise self._unknown(AS_VALUE)

    def __bool__(self) -> bool:
        raise self._unknown(AS_CONDITION)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Deferred):
            return self._is(other)
        raise self._unknown(AS_COMPARISON)

    __hash__ = object.__hash__

    def _is(self, other: "Deferred") -> bool:
        """Whether both stand for one value."""
        return self is other

    def __copy__(self) -> "Deferred":
        return self

    def __deepcopy__(self, memo: object) -> "Deferred":
        return self


def _unreadable(self: Deferred, *_: object, **__: object) -> NoReturn:
    raise self._unknown(AS_VALUE)


def _unreadable_in_text(self: Deferred, other: object) -> NoReturn:
    raise self._unknown(IN_TEXT if isinstance(other, str) else AS_VALUE)


for _name in OPERATORS:
    setattr(Deferred, _name, _unreadable_in_text if _name in {"__add__", "__radd__"} else _unreadable)
