"""Owns building request messages. Rule: a value that a message cannot hold raises with the name of its field."""

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from lattice_client import errors

M = TypeVar("M", bound=Message)


def made(kind: type[M], **fields: Any) -> M:
    """Return a message. Raises InvalidArgumentError for a value that a message cannot hold."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        wrong = next(name for name, value in fields.items() if not _holds(kind, name, value))
        raise errors.InvalidArgumentError(f"a request cannot hold {wrong}={fields[wrong]!r}: {error}") from error


def _holds(kind: type[Message], name: str, value: Any) -> bool:
    try:
        kind(**{name: value})
    except (TypeError, ValueError):
        return False
    return True


@contextmanager
def building() -> Iterator[None]:
    """Convert the error of a name or a label that is not valid Unicode to TaskDefinitionError."""
    try:
        yield
    except UnicodeEncodeError as error:
        text = f"the name or label {error.object!r} cannot be sent: it contains half a surrogate pair at {error.start}"
        raise errors.TaskDefinitionError(text) from None


def check_wait(timeout: float | None, name: str = "timeout") -> None:
    """Raise TypeError unless a limit of a wait is None or a number of seconds."""
    if timeout is not None:
        check_seconds(timeout, name)


def check_seconds(value: float, name: str) -> None:
    """Raise TypeError unless a value is a number of seconds."""
    try:
        is_number = not math.isnan(value)
    except (TypeError, OverflowError):
        is_number = False
    if not is_number:
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")


def whole_number(value: Any, name: str) -> int:
    """Return a whole number, such as one of numpy. Raises TypeError for others, and ValueError below 0."""
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if found < 0:
        raise ValueError(f"{name} must be at least 0, not {value!r}")
    return found


def duration(seconds: float) -> Duration:
    """Return seconds as a Duration. Raises ValueError for a number that is not finite."""
    if not math.isfinite(seconds):
        raise ValueError(f"a duration must be a finite number of seconds, not {seconds!r}")
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
