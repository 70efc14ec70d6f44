"""Makes spans of calls, and names the current one in their headers, so that a run is part of the trace of its caller.

Rule: a program without OpenTelemetry pays a lookup. The interceptors of OpenTelemetry are not used, and are held off
when the program has installed them: they return a generator for a stream, which the blocking client cannot cancel.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import grpc

Headers = tuple[tuple[str, str], ...]
CANCELLED = grpc.StatusCode.CANCELLED
_NOTHING: AbstractContextManager[None] = nullcontext()


def trace_headers() -> Headers:
    """Return the headers that name the current span; none in a program without OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


def uninstrumented() -> AbstractContextManager[None]:
    """Return a block in which the interceptors of OpenTelemetry do nothing."""
    if "opentelemetry.instrumentation.utils" not in sys.modules:
        return _NOTHING
    from opentelemetry.instrumentation.utils import suppress_instrumentation

    return suppress_instrumentation()


def call_span(method: Any) -> AbstractContextManager[None]:
    """Return a block that is the span of a call, in a program that makes spans; `method` is one of a `Stubs`."""
    return _span(method.__name__) if "opentelemetry.sdk.trace" in sys.modules else _NOTHING


@contextmanager
def _span(path: str) -> Iterator[None]:
    from opentelemetry import trace

    service, _, name = path.strip("/").rpartition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    tracer = trace.get_tracer("lattice_client")
    with tracer.start_as_current_span(path, kind=trace.SpanKind.CLIENT, attributes=attributes) as span:
        status = grpc.StatusCode.OK
        try:
            yield
        except BaseException as error:
            # Anything else interrupts the call.
            status = cast(grpc.aio.AioRpcError, error).code() if isinstance(error, grpc.RpcError) else CANCELLED
            raise
        finally:
            span.set_attribute("rpc.grpc.status_code", status.value[0])
