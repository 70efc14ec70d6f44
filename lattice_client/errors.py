"""Owns the exceptions that this package raises.

    LatticeError
    +-- TaskDefinitionError      a task or its wiring is wrong; nothing was sent
    +-- TargetError              the target is not the address of a server; nothing was sent
    +-- SecurityError            the connection would not be secure; nothing was sent
    +-- ClientClosedError        the client was closed, or the program is ending
    +-- ForkError                the process was forked after gRPC had been used in it
    +-- DecodeError              a received value cannot be decoded here
    |   +-- UntrustedPayloadError    a received value is a pickle of a sandbox
    +-- ServiceFailedError       the instances of a service cannot start; carries the last lines of its program
    +-- RunError                 the run or the task did not succeed
    |   +-- TaskFailedError      a task failed; carries the remote traceback
    |   +-- StreamInterruptedError   chunks of a streamed output are not kept any more, or come from a new attempt
    |   +-- RunTimeoutError      the run exceeded its time limit
    |   +-- RunCancelledError    the run was cancelled
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
        +-- InternalError            any other status

Rule: no gRPC exception leaves this package; `transport.statuses` converts it to one of these.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc
    from lattice.v1.payload_pb2 import Payload


class LatticeError(Exception):
    """Base of all errors of this package."""


class TaskDefinitionError(LatticeError):
    """A task or its wiring is wrong; nothing was sent."""


class SecurityError(LatticeError):
    """The connection would not be secure, or its TLS settings are wrong; nothing was sent."""


class TargetError(LatticeError):
    """The target is not the address of a server; nothing was sent."""


class ClientClosedError(LatticeError):
    """The client was closed, or the program is ending."""


class ForkError(LatticeError):
    """The process was forked after gRPC had been used in it, and gRPC does not work in such a process."""


class DecodeError(LatticeError):
    """A received value cannot be decoded here; the cause is the exception that decoding raised."""


class UntrustedPayloadError(DecodeError):
    """A received value is a pickle that a sandboxed task produced; to unpickle it could run code of that task's choice.

    Attributes:
        source: the value, such as an output of a task.
        level: the isolation level of the task that produced it.
    """

    def __init__(self, source: str, media_type: str, level: str) -> None:
        super().__init__(
            f"{source} is a pickle ({media_type}) that was produced at isolation {level!r}, and to unpickle it could "
            "run code of the task's choice here. Have the task return JSON values, bytes, dates, sets, tuples, arrays "
            "or data frames. If you trust the code of the task, pass trust_pickles=True to this call or to the client."
        )
        self.source = source
        self.media_type = media_type
        self.level = level

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.media_type, self.level)


class ServiceFailedError(LatticeError):
    """The instances of a service cannot start.

    Attributes:
        service: the name of the service.
        kind: the class of failure, such as `command_not_found` or `out_of_gpu_memory`.
        last_lines: what its program wrote last.
    """

    def __init__(self, service: str, kind: str, message: str, last_lines: tuple[str, ...] = ()) -> None:
        shown = "".join(f"\n  {line}" for line in last_lines)
        super().__init__(f"service {service!r} cannot start ({kind}): {message}{shown}")
        self.service, self.kind, self.last_lines = service, kind, last_lines
        self._parts = service, kind, message, last_lines

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._parts


class RunError(LatticeError):
    """A run or a task did not succeed."""

    def __init__(self, run_id: str, message: str) -> None:
        super().__init__(message)
        self.run_id = run_id

    def __reduce__(self) -> tuple[Any, ...]:
        # A task that waits for another run may fail with that run's error, which is then pickled.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[RunError], args: tuple[Any, ...], state: dict[str, Any]) -> RunError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class TaskFailedError(RunError):
    """A task failed; the cause is the original exception when it can be rebuilt here.

    Attributes:
        kind: the class of failure.
        remote_traceback: the traceback that Python printed for the task.
        failed_tasks: the number of failed tasks of the run.
        task_name: the display name of the task.
        exception: the encoded original exception.
        error_type: the class of the original exception as text; empty for a failure that is no exception.
        error_message: the message of the original exception or of the failure.
        missing_cause: the reason why there is no original exception, or why it could not be rebuilt.
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
        self.error_type = self.error_message = ""
        self.exception: Payload | None = None

    def __str__(self) -> str:
        parts = [super().__str__()]
        if self.failed_tasks > 1:
            parts.append(f"{self.failed_tasks} tasks of the run failed; `lattice runs show {self.run_id}` lists them")
        if self.missing_cause:
            parts.append(self.missing_cause)
        text = "\n".join(parts)
        return f"{text}\n\nRemote traceback:\n{self.remote_traceback}" if self.remote_traceback else text


class StreamInterruptedError(RunError):
    """The streamed output of a task cannot be read on: chunks are not kept any more, or a later attempt began anew."""


class RunTimeoutError(RunError):
    """The run exceeded its time limit."""


class RunCancelledError(RunError):
    """The run was cancelled."""


class RequestError(LatticeError):
    """The server refused a call.

    Attributes:
        code: gRPC's status code; None when the client found the error without a call.
        reason: a name of `ErrorReason`; it never changes for the same cause.
        metadata: details of the reason, such as the id of the run.
        violations: the fault of each wrong field, by field.
        retry_after_s: seconds after which the same call may succeed; None when the server names none.
        advice: how to correct the error; it is part of the message.
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
    """The named run, task, workflow or node does not exist."""


class AlreadyExistsError(RequestError):
    """The id exists with other content."""


class PreconditionError(RequestError):
    """The server's state does not allow the call."""


class AbortedError(RequestError):
    """Another caller changed the object first."""


class OutOfRangeError(RequestError):
    """A position lies outside the retained events."""


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
