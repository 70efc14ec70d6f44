"""Owns the errors a caller meets.

    LatticeError
    +-- TaskDefinitionError      a task or its wiring is wrong; nothing was sent
    +-- TargetError              the target is no address of a server; nothing was sent
    +-- SecurityError            the connection would not be safe; nothing was sent
    +-- ClientClosedError        the client was closed, or the program is ending
    +-- ForkError                the process was forked after gRPC had been used in it
    +-- DecodeError              a value that arrived cannot be decoded here
    +-- RunError                 the run ended otherwise than well
    |   +-- TaskFailedError      a task failed; carries the remote traceback
    |   +-- RunTimeoutError      the run took longer than it was given
    |   +-- RunCancelledError    somebody cancelled it
    +-- RequestError             the server refused a call
        +-- InvalidArgumentError     INVALID_ARGUMENT
        +-- NotFoundError            NOT_FOUND
        +-- AlreadyExistsError       ALREADY_EXISTS
        +-- PreconditionError        FAILED_PRECONDITION
        +-- AbortedError             ABORTED
        +-- OutOfRangeError          OUT_OF_RANGE
        +-- ResourceExhaustedError   RESOURCE_EXHAUSTED
        +-- UnavailableError         UNAVAILABLE
        +-- UnauthenticatedError     UNAUTHENTICATED
        +-- PermissionDeniedError    PERMISSION_DENIED
        +-- InternalError            anything else

Rule: no gRPC error leaves this package.
"""

import re
from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from lattice.v1 import errors_pb2
from lattice.v1.payload_pb2 import Payload

DETAILS = "grpc-status-details-bin"


class LatticeError(Exception):
    """Base of all errors of this package."""


class TaskDefinitionError(LatticeError):
    """A task, or the way it is wired, is wrong; nothing was sent."""


class SecurityError(LatticeError):
    """The connection would not be safe, or not as safe as was asked; nothing was sent."""


class TargetError(LatticeError):
    """The target is no address of a server; nothing was sent."""


class ClientClosedError(LatticeError):
    """The client was closed, or the program is ending."""


class ForkError(LatticeError):
    """The process was forked after gRPC had been used in it, and gRPC does not work in such a process."""


class DecodeError(LatticeError):
    """A value that arrived cannot be decoded here; the cause is what decoding it raised."""


class RunError(LatticeError):
    """A run ended otherwise than well."""

    def __init__(self, run_id: str, message: str) -> None:
        super().__init__(message)
        self.run_id = run_id

    def __reduce__(self) -> tuple[Any, ...]:
        # A task that waits for another run may fail with its error, which then travels.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[RunError], args: tuple[Any, ...], state: dict[str, Any]) -> RunError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class TaskFailedError(RunError):
    """A task failed; the cause is the original exception when it can be rebuilt here.

    `kind` is the class of failure, `remote_traceback` what the task's Python printed, `failed_tasks` how many tasks of
    the run failed, `task_name` the name the task was given for people. `exception` is the encoded original, and
    `missing_cause` says why there is none, or why it could not be rebuilt.
    """

    def __init__(
        self,
        run_id: str,
        task_id: str,
        kind: str,
        message: str,
        remote_traceback: str,
        failed_tasks: int = 1,
        task_name: str = "",
    ) -> None:
        named = f" ({task_name!r})" if task_name not in {"", task_id} else ""
        super().__init__(run_id, f"task {task_id!r}{named} of run {run_id!r} failed ({kind}): {message}")
        self.task_id = task_id
        self.task_name = task_name or task_id
        self.kind = kind
        self.remote_traceback = remote_traceback
        self.failed_tasks = failed_tasks
        self.missing_cause = ""
        self.exception: Payload | None = None

    def __str__(self) -> str:
        parts = [super().__str__()]
        if self.failed_tasks > 1:
            parts.append(f"{self.failed_tasks} tasks of the run failed; `lattice runs show {self.run_id}` lists them")
        if self.missing_cause:
            parts.append(self.missing_cause)
        text = "\n".join(parts)
        return f"{text}\n\nRemote traceback:\n{self.remote_traceback}" if self.remote_traceback else text


class RunTimeoutError(RunError):
    """The run took longer than it was given."""


class RunCancelledError(RunError):
    """Somebody cancelled the run."""


class RequestError(LatticeError):
    """The server refused a call. `reason` is stable, `violations` maps fields to what is wrong with them.

    `code` is gRPC's status; None of an error that was found without a call.

    `retry_after_s` is set when the server says that the same call may succeed after so many seconds, `advice` when this
    side knows what to do; it is part of the message.
    """

    def __init__(
        self, message: str, reason: str = "", metadata: Mapping[str, str] | None = None, **violations: str
    ) -> None:
        super().__init__(message)
        self.code: grpc.StatusCode | None = None
        self.advice = ""
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations: dict[str, str] = violations
        self.retry_after_s: float | None = None


class InvalidArgumentError(RequestError):
    """A field is missing or malformed."""


class NotFoundError(RequestError):
    """The thing named does not exist."""


class AlreadyExistsError(RequestError):
    """The id exists with other content."""


class PreconditionError(RequestError):
    """The server's state does not allow the call."""


class AbortedError(RequestError):
    """Somebody else changed the thing first."""


class OutOfRangeError(RequestError):
    """A cursor lies outside what is kept."""


class ResourceExhaustedError(RequestError):
    """A limit is reached."""


class UnavailableError(RequestError):
    """The server cannot be reached, or is stopping."""


class UnauthenticatedError(RequestError):
    """No token, or one that is not valid here."""


class PermissionDeniedError(RequestError):
    """The token does not allow this call."""


class InternalError(RequestError):
    """A bug of the server, or a broken connection."""


CLASSES: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
}
# How gRPC says that two sides did not agree on TLS. A server that asks for a certificate, or for TLS, and gets none
# hangs up without a word.
HANDSHAKES = {
    "CERTIFICATE_VERIFY_FAILED": "the certificate it shows is not signed by an authority trusted here: "
    "set LATTICE_TLS_CA, or `tls_ca`, to the one that signed it",
    "Hostname Verification Check failed": "the certificate it shows is for another name: dial a name that is in it",
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS",
    "failed to connect.*Socket closed": "it hangs up: if it speaks TLS set LATTICE_TLS_CA, or `tls_ca`; "
    "if it asks for certificates, LATTICE_TLS_CERT and LATTICE_TLS_KEY too",
    "Expected SETTINGS frame|Failed parsing HTTP/2|http1": "what listens there does not speak gRPC, but HTTP/1 or "
    "another protocol: check the port",
}
START = "is a server running there? start one with `lattice start --head`"


def from_refusal(refusal: errors_pb2.Refusal) -> RequestError:
    """Return this package's error for what a server refused within a stream."""
    code = next((code for code in grpc.StatusCode if code.value[0] == refusal.code), grpc.StatusCode.UNKNOWN)
    found = CLASSES.get(code, InternalError)(refusal.message)
    known = errors_pb2.ErrorReason.values()
    name = errors_pb2.ErrorReason.Name(refusal.reason) if refusal.reason in known else ""
    found.code, found.reason = code, name.removeprefix("ERROR_REASON_")
    found.metadata, found.violations = dict(refusal.metadata), dict(refusal.violations)
    if refusal.HasField("retry_delay"):
        found.retry_after_s = refusal.retry_delay.ToNanoseconds() / 1e9
    return found


def from_rpc(error: grpc.aio.AioRpcError, target: str) -> RequestError:
    """Return this package's error for a call to `target` that failed."""
    text = error.details() or error.code().name
    advice = _advice(error, text)
    if _is_of_grpc(error) and error.code() is grpc.StatusCode.UNAVAILABLE:
        text = f"no Lattice server answers at {target}: {_cause(text)}" + ("" if advice else f"; {START}")
    found = CLASSES.get(error.code(), InternalError)(f"{text}; {advice}" if advice else text)
    found.code, found.advice = error.code(), advice
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS or not isinstance(value, bytes):
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                found.reason, found.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                found.violations = {v.field: v.description for v in bad.field_violations}
            elif detail.Unpack(retry):
                found.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return found


def _advice(error: grpc.aio.AioRpcError, text: str) -> str:
    """Return what the caller can do about an error whose text says only what went wrong."""
    match error.code():
        case grpc.StatusCode.UNAUTHENTICATED:
            return "set LATTICE_TOKEN, or `token`, to the server's token"
        case grpc.StatusCode.UNAVAILABLE if _is_of_grpc(error):
            return next((advice for sign, advice in HANDSHAKES.items() if re.search(sign, text)), "")
        case grpc.StatusCode.UNIMPLEMENTED:
            return "what answers there is no Lattice server, or one of another version: check the target"
        case _:
            return ""


def _is_of_grpc(error: grpc.aio.AioRpcError) -> bool:
    """Whether gRPC says what failed, and not a server."""
    return all(key != DETAILS for key, _ in error.trailing_metadata() or ())


def _cause(text: str) -> str:
    """Return why a connection failed: of what gRPC says, the last error, in one line, without its status."""
    lines = text.partition("last error:")[2].splitlines() or text.splitlines() or [text]
    return lines[0].strip().removeprefix("UNKNOWN: ").removeprefix("UNAVAILABLE: ")
