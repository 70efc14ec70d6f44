"""Owns decoding the outputs and exceptions of tasks. Rule: they are decoded in the thread that asked for them.

Decoding runs code of the value's class, so that a value that is slow to decode, or that fails, affects only its reader.
For the same reason a pickle of a sandbox is decoded only for a caller that trusts the sandboxed code.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

from lattice.v1 import payload_pb2, resources_pb2

from lattice_client.convert import payloads
from lattice_client.convert.events import RunEvent
from lattice_client.errors import DecodeError, RunError, TaskFailedError, UntrustedPayloadError
from lattice_client.graph.outputs import TaskOutput


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetched value, still encoded.

    `level` is the isolation level of the task that produced it; empty for none. `source` names the value in errors, and
    `is_trusted` says that this client unpickles all values.
    """

    media_type: str
    data: bytes | bytearray
    level: str = ""
    source: str = ""
    is_trusted: bool = False

    @classmethod
    def of(cls, payload: payload_pb2.Payload, data: bytes | bytearray, source: str, is_trusted: bool) -> Self:
        """Return the value of a payload with some data."""
        return cls(payload.media_type, data, _level_of(payload), source, is_trusted)


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a fetched value that the path of an output selects."""

    run_id: str
    output: TaskOutput
    whole: Any


def _level_of(payload: payload_pb2.Payload) -> str:
    level = payload.produced_at
    if level in {resources_pb2.ISOLATION_UNSPECIFIED, resources_pb2.ISOLATION_NONE}:
        return ""
    known = level in resources_pb2.Isolation.values()
    return resources_pb2.Isolation.Name(level).removeprefix("ISOLATION_").lower() if known else str(level)


def decoded(found: Any, trust_pickles: bool = False) -> Any:
    """Return a fetched object with every encoded value in it decoded, with `trust_pickles` also pickles of sandboxes.

    Raises:
        RunError: the fetched object is that error, whose cause is the original exception of a failed task; or a value
            has no part with the requested path.
        UntrustedPayloadError: a value is a pickle of a sandbox, and the caller does not trust it.
        DecodeError: a value cannot be decoded.
    """
    match found:
        case Fetched():
            return _value_of(found, trust_pickles)
        case Part():
            return _selected(found, trust_pickles)
        case dict():
            return {key: decoded(value, trust_pickles) for key, value in found.items()}
        case list():
            return [decoded(value, trust_pickles) for value in found]
        case RunEvent():
            has_values = "outputs" in found.data or "value" in found.data
            return replace(found, data=decoded(found.data, trust_pickles)) if has_values else found
        case RunError():
            try:
                raise _rebuilt(found, trust_pickles)
            finally:
                # The traceback of the error refers to this frame, with the run's inputs and outputs above it. A
                # reference back to the error would keep all of them until the next full garbage collection.
                del found
        case _:
            return found


def _selected(part: Part, trust_pickles: bool) -> Any:
    value = decoded(part.whole, trust_pickles)
    for step in part.output.path:
        try:
            value = value[step]
        except Exception as error:  # the class is the user's
            text = f"{part.output!r} of run {str(part.run_id)!r} has no value: there is no {step!r}"
            raise RunError(part.run_id, f"{text} in a {type(value).__name__}") from error
    return value


def _value_of(found: Fetched, trust_pickles: bool) -> Any:
    may_unpickle = not found.level or found.is_trusted or trust_pickles
    try:
        return payloads.decode(found.media_type, found.data, may_unpickle=may_unpickle)
    except KeyboardInterrupt:
        raise
    except payloads.UnpicklingRefusedError:
        raise UntrustedPayloadError(found.source or "a value", found.media_type, found.level) from None
    # Decoding may raise any exception, also SystemExit; it concerns the value, not this process.
    except BaseException as error:
        size = f"{found.media_type or payloads.JSON}, {len(found.data)} bytes"
        raise DecodeError(f"a value ({size}) cannot be decoded here: {type(error).__name__}: {_text(error)}") from error


def _rebuilt(error: RunError, trust_pickles: bool) -> RunError:
    if not isinstance(error, TaskFailedError) or error.exception is None:
        return error
    payload, error.exception = error.exception, None
    try:
        cause = _value_of(Fetched.of(payload, payload.data, "the exception", is_trusted=False), trust_pickles)
    except UntrustedPayloadError as failed:
        why = str(failed)
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
