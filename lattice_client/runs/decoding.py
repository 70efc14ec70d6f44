"""Owns decoding the outputs and exceptions of tasks. Rule: they are decoded in the thread that asked for them.

Decoding runs code of the value's class, so that a value that is slow to decode, or that fails, affects only its reader.
"""

from dataclasses import dataclass, replace
from typing import Any

from lattice_client.convert import payloads
from lattice_client.convert.events import RunEvent
from lattice_client.errors import DecodeError, RunError, TaskFailedError
from lattice_client.graph.outputs import TaskOutput


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetched value, still encoded."""

    media_type: str
    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a fetched value that the path of an output selects."""

    run_id: str
    output: TaskOutput
    whole: Any


def decoded(found: Any) -> Any:
    """Return a fetched object with every encoded value in it decoded.

    Raises:
        RunError: the fetched object is that error, whose cause is the original exception of a failed task; or a value
            has no part with the requested path.
        DecodeError: a value cannot be decoded.
    """
    match found:
        case Fetched():
            return _value_of(found)
        case Part():
            return _selected(found)
        case dict():
            return {key: decoded(value) for key, value in found.items()}
        case list():
            return [decoded(value) for value in found]
        case RunEvent():
            return replace(found, data=decoded(found.data)) if "outputs" in found.data else found
        case RunError():
            try:
                raise _rebuilt(found)
            finally:
                # The traceback of the error refers to this frame, with the run's inputs and outputs above it. A
                # reference back to the error would keep all of them until the next full garbage collection.
                del found
        case _:
            return found


def _selected(part: Part) -> Any:
    value = decoded(part.whole)
    for step in part.output.path:
        try:
            value = value[step]
        except Exception as error:  # the class is the user's
            text = f"{part.output!r} of run {str(part.run_id)!r} has no value: there is no {step!r}"
            raise RunError(part.run_id, f"{text} in a {type(value).__name__}") from error
    return value


def _value_of(found: Fetched) -> Any:
    try:
        return payloads.decode(found.media_type, found.data)
    except KeyboardInterrupt:
        raise
    # Decoding may raise any exception, also SystemExit; it concerns the value, not this process.
    except BaseException as error:
        size = f"{found.media_type or payloads.JSON}, {len(found.data)} bytes"
        raise DecodeError(f"a value ({size}) cannot be decoded here: {type(error).__name__}: {_text(error)}") from error


def _rebuilt(error: RunError) -> RunError:
    if not isinstance(error, TaskFailedError) or error.exception is None:
        return error
    payload, error.exception = error.exception, None
    try:
        cause = _value_of(Fetched(payload.media_type, payload.data))
    except DecodeError as failed:
        why = f"{type(failed.__cause__).__name__}: {_text(failed.__cause__)}"
    else:
        if isinstance(cause, BaseException):
            error.__cause__ = cause
            return error
        why = f"it is a {type(cause).__name__}, not an exception"
    error.missing_cause = f"The original exception could not be rebuilt here: {why}"
    return error


def _text(error: BaseException | None) -> str:
    try:
        return str(error)
    except Exception:  # the class is the user's
        return "its text could not be read"
