"""Counts calls and messages of streams. Rule: it changes neither requests nor answers, nor how a call ends.

The instrumentation of OpenTelemetry has no metrics for servers of `grpc.aio`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Counter, Histogram, Reading, totals

# By their numbers too. A handler that set none has ended with OK.
NAMES = {key: status.name for status in grpc.StatusCode for key in (status, status.value[0])}
# A call whose caller has left is cancelled, and its stream closed.
LEFT = (asyncio.CancelledError, GeneratorExit)


class RpcMeter(grpc.aio.ServerInterceptor):
    """An interceptor outside of the interceptors that end calls with a status, so that it sees the status."""

    def __init__(self) -> None:
        self._durations = Histogram(catalogue.CALL_DURATION)
        self._stream_ends = Counter(catalogue.STREAM_CALLS)
        self._errors = Counter(catalogue.ERRORS)
        self._streams: dict[str, _Streams] = {}
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    def note_error(self, reason: str) -> None:
        """Count an error that ends a call."""
        self._errors.add(reason)

    def read(self) -> list[Reading]:
        """Return all numbers."""
        streams = self._streams.items()
        messages = [((method, "sent"), float(found.sent)) for method, found in streams if found.sent]
        messages += [((method, "received"), float(found.received)) for method, found in streams if found.received]
        return [
            self._durations.read(),
            self._stream_ends.read(),
            self._errors.read(),
            totals(catalogue.STREAMS, [((method,), found.open) for method, found in streams]),
            totals(catalogue.STREAM_MESSAGES, messages),
        ]

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
            made = self._reading(handler.stream_unary, self._stream(method))
            return grpc.stream_unary_rpc_method_handler(made, **kwargs)
        if handler.unary_stream:
            made = self._writing(handler.unary_stream, self._stream(method))
            return grpc.unary_stream_rpc_method_handler(made, **kwargs)
        made = self._writing(handler.stream_stream, self._stream(method), reads=True)
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

    def _stream(self, method: str) -> "_Streams":
        return self._streams.setdefault(method, _Streams(method, self._stream_ends))

    def _reading(self, behave: Any, streams: "_Streams") -> Any:
        async def call(requests: AsyncIterator[Any], context: Any) -> Any:
            streams.open += 1
            error: BaseException | None = None
            try:
                return await behave(streams.counted(requests), context)
            except BaseException as raised:
                error = raised
                raise
            finally:
                streams.end(context, error)

        return call

    def _writing(self, behave: Any, streams: "_Streams", *, reads: bool = False) -> Any:
        # Not a generator: each message would go through one more of them.
        async def call(request: Any, context: Any) -> None:
            streams.open += 1
            error: BaseException | None = None
            try:
                answered = behave(streams.counted(request) if reads else request, context)
                if hasattr(answered, "__aiter__"):
                    async with aclosing(answered):
                        async for response in answered:
                            streams.sent += 1
                            await context.write(response)
                else:
                    # A handler that writes by itself, such as `Health.Watch`; see `_wrap`.
                    await answered
            except BaseException as raised:
                error = raised
                raise
            finally:
                streams.end(context, error)

        return call


class _Streams:
    """The streaming calls of one method: how many are open, and how many messages there were."""

    def __init__(self, method: str, ends: Counter) -> None:
        self.open = self.sent = self.received = 0
        self._method = method
        self._ends = ends

    def counted(self, messages: AsyncIterator[Any]) -> "_Counted":
        """Return the messages of a caller, which are counted."""
        return _Counted(messages, self)

    def end(self, context: Any, error: BaseException | None) -> None:
        """Count the end of a call."""
        self.open -= 1
        self._ends.add(self._method, _status(context, error))


class _Counted:
    """Messages that are counted when the next one is asked for, without a coroutine of its own for each."""

    def __init__(self, messages: AsyncIterator[Any], streams: _Streams) -> None:
        self._messages = messages
        self._ask: Callable[[], Awaitable[Any]] | None = None
        self._streams = streams

    def __aiter__(self) -> "_Counted":
        return self

    def __anext__(self) -> Awaitable[Any]:
        if self._ask is None:
            self._ask = aiter(self._messages).__anext__
        else:
            self._streams.received += 1
        return self._ask()


def _status(context: Any, error: BaseException | None) -> str:
    """Return the name of the status of a call that ended with an error, or without one."""
    if error is not None and isinstance(error, LEFT):
        return "CANCELLED"
    code = context.code()
    if error is not None and not code:
        return "UNKNOWN"
    return NAMES.get(code, "OK")
