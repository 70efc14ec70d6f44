"""Ends calls whose handler raised, and reads their requests. Rule: no servicer sets a status itself."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_interceptor.exception_to_status import AsyncExceptionToStatusInterceptor

from lattice_server.core import errors
from lattice_server.engine.slices import Slices
from lattice_server.rpc import callers
from lattice_server.rpc.callers import no_longer_valid
from lattice_server.rpc.durable_answers import DurableAnswers
from lattice_server.rpc.handlers import Context, OnError, ignore, passing_bytes
from lattice_server.rpc.request_deserializer import MessageLimits, RequestDeserializer, unreadable
from lattice_server.rpc.statuses import internal_error, status_of

log = logging.getLogger(__name__)


class ErrorInterceptor(AsyncExceptionToStatusInterceptor):
    """Ends calls whose handler raised: a `LatticeError` with its status, any other exception as a bug with an id.

    `on_error` is called with the reason of each error.
    """

    def __init__(
        self,
        limits: MessageLimits,
        slices: Slices,
        answers: DurableAnswers | None = None,
        on_error: OnError = ignore,
    ) -> None:
        super().__init__()
        self._answers = answers
        self._on_error = on_error
        self._limits = limits
        self._slices = slices
        self._readers: dict[str, RequestDeserializer] = {}
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap every handler except that of the workers' stream, whose errors are messages."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or method.endswith("/Connect"):
            return handler
        known, wrapped = self._wrapped.get(method, (None, None))
        if known is not handler:  # The first call of the method, or a refused one, which has a handler of its own.
            wrapped = await self._wrap(handler, handler_call_details)
            self._wrapped[method] = handler, wrapped
        return wrapped

    async def _wrap(self, handler: Any, handler_call_details: Any) -> Any:
        async def found(_: Any) -> Any:
            return handler

        method = handler_call_details.method
        wrapped = await super().intercept_service(found, handler_call_details)  # type: ignore[no-untyped-call]
        reader = self._readers.get(method)
        if reader is None:
            reader = self._readers[method] = RequestDeserializer(method, self._limits, self._slices)
        changes: dict[str, Any] = {"request_deserializer": reader.deserialize}
        if wrapped.response_serializer is not None:
            changes["response_serializer"] = passing_bytes(wrapped.response_serializer)
        return wrapped._replace(**changes)

    async def intercept(self, method: Any, request_or_iterator: Any, context: Context, method_name: str) -> Any:
        """Read the request and make the call."""
        reader = self._readers[method_name]
        if hasattr(request_or_iterator, "__aiter__"):
            request_or_iterator = reader.read_each(request_or_iterator)
        else:
            try:
                request_or_iterator = await reader.read(request_or_iterator)
            except errors.LatticeError as error:
                await self.handle_exception(error, request_or_iterator, context, method_name)
        if self._answers is not None:
            method = self._answers.wrap(method)
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
        """End a cancelled call with a status if it was cancelled because the caller's token is no longer valid."""
        if callers.caller().is_over:
            await self.handle_exception(no_longer_valid(), request_or_iterator, context, method_name)

    async def handle_exception(
        self, ex: Exception, request_or_iterator: Any, context: Context, method_name: str
    ) -> NoReturn:
        """Abort the RPC with the status of `ex`."""
        if isinstance(ex, grpc.aio.AbortError | grpc.aio.InternalError):
            # The call has ended: it was aborted before, or the caller disconnected.
            raise ex
        if isinstance(ex, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
            # The servicer lacks a method of its contract, such as `Health/List`.
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, str(ex))
        if isinstance(ex, DecodeError):
            ex = unreadable(ex)
        if not isinstance(ex, errors.LatticeError):
            bug, ex = ex, internal_error()
            # Only the ids of a request are logged; its values belong to the caller.
            ids = {field: getattr(request_or_iterator, field, "") for field in ("run_id", "task_id", "node_id")}
            log.error("%s failed", method_name, exc_info=bug, extra={**ex.metadata, **ids})
        self._on_error(ex.reason)
        status = status_of(ex)
        await context.abort(status.code, status.details, status.trailing_metadata)
