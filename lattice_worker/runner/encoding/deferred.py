"""Values that do not exist yet. Rule: every operation that would read such a value raises, and says what to do."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Self

from lattice_worker.runner.encoding.values import PayloadError

# Operations on a value: operators, calls and conversions.
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


class DeferredValueError(PayloadError):
    """A value that no task has made yet was to be read or copied."""


class DeferredAttributeError(DeferredValueError, AttributeError):
    """An attribute of a value that no task has made yet was to be read."""


class Deferred:
    """Stands for a value that does not exist yet. Its `repr` is for people, and is the only text that it gives."""

    __slots__ = ()

    def _advice(self) -> str:
        """Return what to do to read the value."""
        raise NotImplementedError

    def _unknown(self) -> DeferredValueError:
        return DeferredValueError(self._advice())

    if not TYPE_CHECKING:  # for which it has no other attributes

        def __getattr__(self, name: str) -> NoReturn:
            # Whatever probes an object asks for names with an underscore, and for no others of this one.
            if name.startswith("_") or hasattr(type(self), name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise DeferredAttributeError(self._advice())

    def __str__(self) -> str:
        raise self._unknown()

    def __format__(self, spec: str) -> str:
        raise self._unknown()

    def __bool__(self) -> bool:
        raise self._unknown()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Deferred):
            return self._is(other)
        raise self._unknown()

    __hash__ = object.__hash__

    def _is(self, other: "Deferred") -> bool:
        """Whether both stand for one value."""
        return self is other

    def __len__(self) -> int:
        raise self._unknown()

    def __iter__(self) -> Iterator[Any]:
        raise self._unknown()

    def __contains__(self, item: object) -> bool:
        raise self._unknown()

    def __getitem__(self, key: Any) -> Any:
        raise self._unknown()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise self._unknown()


def _unreadable(self: Deferred, *_: object, **__: object) -> NoReturn:
    raise self._unknown()


for _name in OPERATORS:
    setattr(Deferred, _name, _unreadable)
