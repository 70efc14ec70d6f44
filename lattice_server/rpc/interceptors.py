"""Owns the one translation from errors to gRPC statuses. Rule: no servicer sets a status itself."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, NoReturn
from uuid import uuid4

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_interceptor.exception_to_status import AsyncExceptionToStatusInterceptor
from lattice.v1 import errors_pb2

from lattice_server.core import errors
from lattice_server.engine.slices import Slices
from lattice_server.rpc import callers
from lattice_server.rpc.callers import no_longer_valid
from lattice_server.rpc.handlers import Context
from lattice_server.rpc.request_deserializer import MessageLimits, RequestDeserializer, unreadable

log = logging.getLogger(__name__)

STATUS = {
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
}
# Trailers over 8 KiB may be dropped on the way, and percent-encoding triples what is not ASCII in the message.
MAX_TEXT_BYTES = 768
MAX_VIOLATION_BYTES = 200
MAX_DETAIL_BYTES = 3072


def status_of(error: errors.LatticeError) -> tuple[grpc.StatusCode, str, bytes]:
    """Return code, message and the encoded `google.rpc.Status` of an error."""
    code = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    message = _cut(error.message, MAX_TEXT_BYTES)
    metadata = {key: _cut(value, MAX_TEXT_BYTES) for key, value in error.metadata.items()}
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain="lattice", metadata=metadata)]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            if bad.ByteSize() < MAX_DETAIL_BYTES:
                bad.field_violations.add(
                    field=_cut(violation.field, MAX_VIOLATION_BYTES),
                    description=_cut(violation.description, MAX_VIOLATION_BYTES),
                )
        details.append(bad)
    if error.retry_after_s is not None:
        nanos = int(error.retry_after_s * 1e9)
        delay = Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return code, message, status.SerializeToString()


def refusal_of(error: errors.LatticeError) -> errors_pb2.Refusal:
    """Return an error as it is told within a stream that goes on."""
    code, message, _ = status_of(error)
    refusal = errors_pb2.Refusal(
        code=code.value[0],
        reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}"),
        message=message,
        metadata=error.metadata,
        violations={violation.field: violation.description for violation in error.violations},
    )
    if error.retry_after_s is not None:
        refusal.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
    return refusal


def internal_refusal(error_id: str) -> errors_pb2.Refusal:
    """Return what a caller is told of a bug, within a stream."""
    return errors_pb2.Refusal(
        code=grpc.StatusCode.INTERNAL.value[0],
        reason=errors_pb2.ERROR_REASON_INTERNAL,
        message=f"internal error {error_id}; the server's log has the details",
        metadata={"error_id": error_id},
    )


def _cut(text: str, limit_bytes: int) -> str:
    return text.encode(errors="replace")[:limit_bytes].decode(errors="ignore")


class ErrorInterceptor(AsyncExceptionToStatusInterceptor):
    """Ends RPCs whose handler raised. A `LatticeError` keeps its meaning; anything else is a bug with an id."""

    def __init__(self, limits: MessageLimits, slices: Slices) -> None:
        super().__init__()
        self._limits = limits
        self._slices = slices
        self._readers: dict[str, RequestDeserializer] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap a handler, except that of the workers' stream: its errors go in band, and it is the hot path."""
        method = handler_call_details.method
        if method.endswith("/Connect"):
            return await continuation(handler_call_details)
        handler = await super().intercept_service(continuation, handler_call_details)  # type: ignore[no-untyped-call]
        if handler is None:
            return None
        reader = self._readers.get(method)
        if reader is None:
            reader = self._readers[method] = RequestDeserializer(method, self._limits, self._slices)
        return handler._replace(request_deserializer=reader.deserialize)

    async def intercept(self, method: Any, request_or_iterator: Any, context: Context, method_name: str) -> Any:
        """Make the call, if its request can be read."""
        reader = self._readers[method_name]
        if hasattr(request_or_iterator, "__aiter__"):
            request_or_iterator = reader.read_each(request_or_iterator)
        else:
            try:
                request_or_iterator = await reader.read(request_or_iterator)
            except errors.LatticeError as error:
                await self.handle_exception(error, request_or_iterator, context, method_name)
        try:
            return await super().intercept(method, request_or_iterator, context, method_name)
        except asyncio.CancelledError:
            await self._end(request_or_iterator, context, method_name)
            raise

    async def _generate_responses(
        self, request_or_iterator: Any, context: Context, method_name: str, response_iterator: Any
    ) -> AsyncGenerator[Any, None]:
        try:
            async for response in super()._generate_responses(
                request_or_iterator, context, method_name, response_iterator
            ):
                yield response
        except asyncio.CancelledError:
            await self._end(request_or_iterator, context, method_name)
            raise

    async def _end(self, request_or_iterator: Any, context: Context, method_name: str) -> None:
        """Tell a caller whose token no longer holds why the call ends; do nothing for other calls that are broken."""
        if callers.caller().is_over:
            await self.handle_exception(no_longer_valid(), request_or_iterator, context, method_name)

    async def handle_exception(
        self, ex: Exception, request_or_iterator: Any, context: Context, method_name: str
    ) -> NoReturn:
        """Abort the RPC with the status of `ex`."""
        if isinstance(ex, grpc.aio.AbortError | grpc.aio.InternalError):
            # The call is over: by somebody's decision, or because the caller has left.
            raise ex
        if isinstance(ex, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
            # A method of a newer contract than its servicer, such as `Health/List`.
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, str(ex))
        if isinstance(ex, DecodeError):
            ex = unreadable(ex)
        if not isinstance(ex, errors.LatticeError):
            error_id = uuid4().hex
            # Only what names something: the rest of a request is its caller's.
            named = {field: getattr(request_or_iterator, field, "") for field in ("run_id", "task_id", "node_id")}
            log.error("%s failed", method_name, exc_info=ex, extra={"error_id": error_id, **named})
            text = f"internal error {error_id}; the server's log has the details"
            ex = errors.LatticeError("INTERNAL", text, metadata={"error_id": error_id})
            code, message = grpc.StatusCode.INTERNAL, text
            details = status_pb2.Status(code=code.value[0], message=message)
            info = AnyMessage()
            info.Pack(error_details_pb2.ErrorInfo(reason="INTERNAL", domain="lattice", metadata={"error_id": error_id}))
            details.details.append(info)
            encoded = details.SerializeToString()
        else:
            code, message, encoded = status_of(ex)
        await context.abort(code, message, (("grpc-status-details-bin", encoded),))
