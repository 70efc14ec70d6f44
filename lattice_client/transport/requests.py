"""Owns requests as messages. Rule: what no message can hold is said with the names of its fields."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from lattice_client import errors

M = TypeVar("M", bound=Message)


def made(kind: type[M], **fields: Any) -> M:
    """Return a request. Raises InvalidArgumentError for what no message can hold."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        raise errors.InvalidArgumentError(f"a request cannot hold {shown}: {error}") from error


@contextmanager
def building() -> Iterator[None]:
    """Turn what a name or a label in a graph raises, when it cannot be sent, into TaskDefinitionError."""
    try:
        yield
    except UnicodeEncodeError as error:
        text = f"the name or label {error.object!r} cannot be sent: it holds half a character at {error.start}"
        raise errors.TaskDefinitionError(text) from None


def duration(seconds: float) -> Duration:
    """Return seconds as the contract has them."""
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
