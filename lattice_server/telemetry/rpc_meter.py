"""Counts calls and messages of streams. Rule: it changes neither requests nor answers, nor how a call ends.

The instrumentation of OpenTelemetry has no metrics for servers of `grpc.aio`.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Counter, Histogram, Reading, totals

# By their numbers. A handler that set none has ended with OK.
NAMES = {status.value[0]: status.name for status in grpc.StatusCode}


class RpcMeter(grpc.aio.ServerInterceptor):
    """An interceptor outside of the interceptors that end calls with a status, so that it sees the status."""

    def __init__(self) -> None:
        self._durations = Histogram(catalogue.CALL_DURATION)
        self._messages = Counter(catalogue.STREAM_MESSAGES)
        self._streams = Counter(catalogue.STREAM_CALLS)
        self._errors = Counter(catalogue.ERRORS)
        self._open: dict[str, int] = {}
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    def note_error(self, reason: str) -> None:
        """Count an error that ends a call."""
        self._errors.add(reason)

    def read(self) -> list[Reading]:
        """Return all numbers."""
        streams = totals(catalogue.STREAMS, [((method,), count) for method, count in self._open.items()])
        counted = (self._durations, self._messages, self._streams, self._errors)
        return [*(meter.read() for meter in counted), streams]

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap a handler. Methods that no servicer has are not counted, because callers choose their names."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known, wrapped = self._wrapped.get(method, (None, None))
        if known is not handler:  # The first call of the method, or one that was refused.
            wrapped = self._wrap(handler, method.strip("/"))
            self._wrapped[method] = handler, wrapped
        return wrapped

    def _wrap(self, handler: Any, method: str) -> Any:
        kwargs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), **kwargs)
        if handler.stream_unary:
            made = self._reading(handler.stream_unary, method)
            return grpc.stream_unary_rpc_method_handler(made, **kwargs)
        if handler.unary_stream:
            made = self._writing(handler.unary_stream, method)
            return grpc.unary_stream_rpc_method_handler(made, **kwargs)
        made = self._writing(handler.stream_stream, method)
        return grpc.stream_stream_rpc_method_handler(made, **kwargs)

    def _unary(self, behave: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            started = time.perf_counter()
            error: BaseException | None = None
            try:
                return await behave(request, context)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._durations.record(time.perf_counter() - started, method, _status(context, error))

        return call

    def _reading(self, behave: Any, method: str) -> Any:
        async def call(requests: AsyncIterator[Any], context: Any) -> Any:
            self._opened(method, 1)
            error: BaseException | None = None
            try:
                return await behave(self._counted(requests, method, "received"), context)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._ended(method, context, error)

        return call

    def _writing(self, behave: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            self._opened(method, 1)
            error: BaseException | None = None
            try:
                if hasattr(request, "__aiter__"):
                    request = self._counted(request, method, "received")
                answered = behave(request, context)
                if hasattr(answered, "__aiter__"):
                    async for response in answered:
                        self._messages.add(method, "sent")
                        yield response
                else:
                    # A handler that writes by itself, such as `Health.Watch`; see `_wrap`.
                    await answered
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._ended(method, context, error)

        return call

    async def _counted(self, messages: AsyncIterator[Any], method: str, direction: str) -> AsyncIterator[Any]:
        async for message in messages:
            self._messages.add(method, direction)
            yield message

    def _opened(self, method: str, by: int) -> None:
        self._open[method] = self._open.get(method, 0) + by

    def _ended(self, method: str, context: Any, error: BaseException | None) -> None:
        self._opened(method, -1)
        self._streams.add(method, _status(context, error))


def _status(context: Any, error: BaseException | None) -> str:
    """Return the name of the status of a call that ended with an error, or without one."""
    # A stream whose caller has left is closed.
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"
    code = context.code()
    if error is not None and not code:
        return "UNKNOWN"
    return code.name if isinstance(code, grpc.StatusCode) else NAMES.get(code, "OK")
