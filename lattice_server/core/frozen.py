"""Owns how immutable classes are declared. Rule: no object is changed after it was made; the type checker proves it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform, overload

T = TypeVar("T")


@overload
def frozen(cls: type[T], /) -> type[T]: ...
@overload
def frozen(*, kw_only: bool = False, weakref_slot: bool = False) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(
    cls: type[T] | None = None, /, *, kw_only: bool = False, weakref_slot: bool = False
) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class whose objects are equal, and have the same hash, when their fields are equal.

    A frozen dataclass would take five times as long to make: it sets each field by a call.
    """

    def make(cls: type[T]) -> type[T]:
        has_hash = "__hash__" in vars(cls)
        return dataclass(slots=True, unsafe_hash=not has_hash, kw_only=kw_only, weakref_slot=weakref_slot)(cls)

    return make if cls is None else make(cls)
