"""Owns the encoding of messages between a stub and the function that it stands for.

Rule: a live object, such as a store, travels as a reference to the graph's process; any other value is pickled. A
reference that is sent back becomes the object itself.
"""

import io
import pickle
from typing import Any, Protocol

from langgraph.types import Command

from lattice_client.code import pickler
from lattice_client.langgraph import exceptions, reductions

# LangGraph compares it by identity.
PARENT = Command.PARENT
PARENT_REFERENCE = ("parent",)
PLAIN = frozenset({str, int, float, bool, bytes, dict, list, tuple, set, type(None)})


class References(Protocol):
    """The live objects of one call, on one of the two sides."""

    def reference_of(self, item: Any) -> Any:
        """Return what stands for an object in a message; None for an object that is pickled."""

    def find(self, reference: Any) -> Any:
        """Return the object that a received reference stands for."""


class _Encoder(pickler.Pickler):
    def __init__(self, file: io.BytesIO, references: References) -> None:
        super().__init__(file)
        self._references = references

    def persistent_id(self, item: Any) -> Any:
        # Most objects are of these types, and none of these is live.
        if type(item) in PLAIN:
            return PARENT_REFERENCE if item is PARENT else None
        return self._references.reference_of(item)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException):
            return exceptions.reduction(obj, lambda value: is_picklable(value, self._references))
        if (found := reductions.reduction(obj)) is not None:
            return found
        return super().reducer_override(obj)


class _Decoder(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, references: References) -> None:
        super().__init__(file)
        self._references = references

    def persistent_load(self, reference: Any) -> Any:
        return PARENT if reference == PARENT_REFERENCE else self._references.find(reference)


def dumps(value: Any, references: References) -> bytes:
    """Return the encoding of a value. Raises any exception of pickling."""
    file = io.BytesIO()
    _Encoder(file, references).dump(value)
    return file.getvalue()


def loads(data: bytes, references: References) -> Any:
    """Return the value of an encoding. Raises any exception of unpickling."""
    return _Decoder(io.BytesIO(data), references).load()


def is_picklable(value: Any, references: References) -> bool:
    """Whether a value can be encoded."""
    if value is None or type(value) in (str, int, float, bool, bytes):
        return True
    try:
        dumps(value, references)
    except Exception:
        return False
    return True
