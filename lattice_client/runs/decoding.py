"""Owns when what a task returned or raised becomes an object: in the thread of whoever asked for it.

Rule: bytes are fetched on an event loop, and decoded off the background loop of synchronous clients. Decoding runs code
of the value's class, so a value that is slow, or that fails, costs its own reader only.
"""

from dataclasses import dataclass, replace
from typing import Any

from lattice_client.convert import payloads
from lattice_client.convert.graphs import RunEvent
from lattice_client.errors import DecodeError, RunError, TaskFailedError
from lattice_client.graph.outputs import TaskOutput


@dataclass(frozen=True, slots=True)
class Fetched:
    """An encoded value that has arrived."""

    media_type: str
    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a value that an output with a path selects."""

    run_id: str
    output: TaskOutput
    whole: Any


def opened(found: Any) -> Any:
    """Return what was fetched with every value in it decoded.

    Raises:
        RunError: that is what was fetched; a failed task's has the original exception as its cause. Or a value has no
            such part as was asked for.
        DecodeError: a value cannot be decoded.
    """
    match found:
        case Fetched():
            return _decoded(found)
        case Part():
            return _selected(found)
        case dict():
            return {key: opened(value) for key, value in found.items()}
        case list():
            return [opened(value) for value in found]
        case RunEvent():
            return replace(found, data=opened(found.data)) if "outputs" in found.data else found
        case RunError():
            raise _rebuilt(found)
        case _:
            return found


def _selected(part: Part) -> Any:
    value = opened(part.whole)
    for step in part.output.path:
        try:
            value = value[step]
        except Exception as error:  # the class is the user's
            text = f"{part.output!r} of run {str(part.run_id)!r} cannot be had: there is no {step!r}"
            raise RunError(part.run_id, f"{text} in a {type(value).__name__}") from error
    return value


def _decoded(found: Fetched) -> Any:
    try:
        return payloads.decode(found.media_type, found.data)
    except KeyboardInterrupt:
        raise
    # Decoding may raise anything, SystemExit too; none of it is about this process.
    except BaseException as error:
        size = f"{found.media_type or payloads.JSON}, {len(found.data)} bytes"
        raise DecodeError(f"a value ({size}) cannot be decoded here: {type(error).__name__}: {_text(error)}") from error


def _rebuilt(error: RunError) -> RunError:
    if not isinstance(error, TaskFailedError) or error.exception is None:
        return error
    payload, error.exception = error.exception, None
    try:
        cause = _decoded(Fetched(payload.media_type, payload.data))
    except DecodeError as failed:
        why = f"{type(failed.__cause__).__name__}: {_text(failed.__cause__)}"
    else:
        if isinstance(cause, BaseException):
            error.__cause__ = cause
            return error
        why = f"it is a {type(cause).__name__}"
    error.missing_cause = f"The original exception could not be rebuilt here: {why}"
    return error


def _text(error: BaseException | None) -> str:
    try:
        return str(error)
    except Exception:  # the class is the user's
        return "its text cannot be had"
