"""Converts errors into gRPC statuses and in-band refusals. Rule: each class of error has one status code."""

from uuid import uuid4

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from lattice.v1 import errors_pb2

from lattice_server.core import errors
from lattice_server.rpc.convert.times import duration

CODES = {
    errors.InvalidError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    errors.PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AbortedError: grpc.StatusCode.ABORTED,
    errors.RangeError: grpc.StatusCode.OUT_OF_RANGE,
    errors.ExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    errors.AuthorizationError: grpc.StatusCode.PERMISSION_DENIED,
    errors.LatticeError: grpc.StatusCode.INTERNAL,
}
# Trailers over 8 KiB may be dropped by proxies, and percent-encoding triples the non-ASCII bytes of the message.
MAX_TEXT_BYTES = 768
MAX_VIOLATION_BYTES = 200
MAX_DETAIL_BYTES = 3072


def status_of(error: errors.LatticeError) -> grpc.Status:
    """Return the gRPC status of an error, with `google.rpc` details in its trailing metadata."""
    status = status_pb2.Status(code=_code_of(error), message=_cut(error.message, MAX_TEXT_BYTES))
    metadata = {key: _cut(value, MAX_TEXT_BYTES) for key, value in error.metadata.items()}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain="lattice", metadata=metadata)]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            if bad.ByteSize() < MAX_DETAIL_BYTES:
                bad.field_violations.add(
                    field=_cut(violation.field, MAX_VIOLATION_BYTES),
                    description=_cut(violation.description, MAX_VIOLATION_BYTES),
                )
        details.append(bad)
    if (delay := _delay_of(error)) is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    converted: grpc.Status = rpc_status.to_status(status)
    return converted


def refusal_of(error: errors.LatticeError) -> errors_pb2.Refusal:
    """Return an error as a message of a stream that stays open."""
    return errors_pb2.Refusal(
        code=_code_of(error),
        reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}"),
        message=_cut(error.message, MAX_TEXT_BYTES),
        metadata=error.metadata,
        violations={violation.field: violation.description for violation in error.violations},
        retry_delay=_delay_of(error),
    )


def internal_error() -> errors.LatticeError:
    """Return the error that a caller gets for a bug; its `error_id` finds the bug in the log."""
    error_id = uuid4().hex
    text = f"internal error {error_id}; the server's log has the details"
    return errors.LatticeError("INTERNAL", text, metadata={"error_id": error_id})


def _code_of(error: errors.LatticeError) -> int:
    code: int = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES).value[0]
    return code


def _delay_of(error: errors.LatticeError) -> Duration | None:
    return None if error.retry_after_s is None else duration(error.retry_after_s)


def _cut(text: str, limit_bytes: int) -> str:
    return text.encode(errors="replace")[:limit_bytes].decode(errors="ignore")
