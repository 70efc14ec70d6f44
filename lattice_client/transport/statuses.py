"""Owns the conversion of gRPC errors, and of refusals within a stream, to this package's exceptions.

Rule: each message names the failure, the server and the correction.
"""

import re

import grpc
from google.rpc import error_details_pb2, status_pb2
from lattice.v1 import errors_pb2

from lattice_client.errors import (
    AbortedError,
    AlreadyExistsError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    PreconditionError,
    RequestError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

DETAILS = "grpc-status-details-bin"
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
# The texts by which gRPC reports that a name has no address, that no packet gets there, or that client and server did
# not agree on TLS. A server that requires TLS or a client certificate closes the connection without a reason when it
# gets none.
ADVICE = {
    "errors? resolving|DNS resolution failed": "the host has no address: check its name, and this machine's DNS",
    "Network is unreachable|No route to host": "no route leads to the host: check its address, and the network",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not signed by an authority trusted here: "
    "set LATTICE_TLS_CA, or `tls_ca`, to the one that signed it",
    "Hostname Verification Check failed": "the server's certificate is for another name: dial a name that is in it",
    "WRONG_VERSION_NUMBER": "the port is open and does not speak TLS: check the port, or dial without TLS",
    "failed to connect.*Socket closed": "the connection was closed: if the server uses TLS, set LATTICE_TLS_CA, "
    "or `tls_ca`; if it requires client certificates, set LATTICE_TLS_CERT and LATTICE_TLS_KEY too",
    "Expected SETTINGS frame|Failed parsing HTTP/2|http1": "the port is open and speaks another protocol than gRPC, "
    "such as HTTP/1: check the port",
}
# How gRPC begins the text of a connection that was refused; the message has the target already.
ADDRESS = re.compile(r"^(?:ipv4|ipv6|unix):\S+: Failed to connect to remote host: ")
START = "start a server with `lattice start --head`, or check the address"


def from_refusal(refusal: errors_pb2.Refusal) -> RequestError:
    """Return this package's exception for a refusal that the server sent within a stream."""
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
    """Return this package's exception for a failed call to `target`."""
    text = error.details() or error.code().name
    advice = _advice(error, text)
    if _is_local(error) and error.code() is grpc.StatusCode.UNAVAILABLE:
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
    """Return how the caller can correct an error, where its text does not say so."""
    match error.code():
        case grpc.StatusCode.UNAUTHENTICATED:
            return "set LATTICE_TOKEN, or `token`, to the server's token"
        case grpc.StatusCode.UNAVAILABLE if _is_local(error):
            return next((advice for sign, advice in ADVICE.items() if re.search(sign, text)), "")
        case grpc.StatusCode.UNIMPLEMENTED:
            return "the target is not a Lattice server, or one of another version: check the target"
        case _:
            return ""


def _is_local(error: grpc.aio.AioRpcError) -> bool:
    """Whether the error comes from gRPC itself and not from a server."""
    return all(key != DETAILS for key, _ in error.trailing_metadata() or ())


def _cause(text: str) -> str:
    """Return the last error of a failed connection, in one line and without its status and its address."""
    lines = text.partition("last error:")[2].splitlines() or text.splitlines() or [text]
    return ADDRESS.sub("", lines[0].strip().removeprefix("UNKNOWN: ").removeprefix("UNAVAILABLE: "))
