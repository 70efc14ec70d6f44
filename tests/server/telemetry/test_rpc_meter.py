"""Counting of streams: their ends by status, and their messages, with a real server of the interceptor alone."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from lattice_server.telemetry.rpc_meter import RpcMeter
from tests.server.telemetry.workload import on_a_loop


class Methods(grpc.GenericRpcHandler):
    """Methods of bytes: `echo` returns each message, `fail` fails after one, `refuse` sets a status, `sum`
    joins, `wait` waits after one."""

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a method."""
        return {
            "/s/echo": grpc.stream_stream_rpc_method_handler(self.echo),
            "/s/fail": grpc.unary_stream_rpc_method_handler(self.fail),
            "/s/refuse": grpc.unary_stream_rpc_method_handler(self.refuse),
            "/s/wait": grpc.unary_stream_rpc_method_handler(self.wait),
            "/s/sum": grpc.stream_unary_rpc_method_handler(self.sum),
        }.get(handler_call_details.method)

    async def echo(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Return each message."""
        async for request in requests:
            yield request

    async def fail(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Fail after one message."""
        yield request
        raise ZeroDivisionError

    async def refuse(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """End with a status."""
        yield request
        await context.abort(grpc.StatusCode.NOT_FOUND, "there is none")

    async def wait(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Wait after one message."""
        yield request
        await asyncio.Event().wait()

    async def sum(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        """Join the messages."""
        return b"".join([request async for request in requests])


@on_a_loop
async def test_streams_are_counted_by_their_ends_and_messages() -> None:
    meter = RpcMeter()
    server = grpc.aio.server(interceptors=[meter])
    server.add_generic_rpc_handlers([Methods()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert [found async for found in channel.stream_stream("/s/echo")(iter([b"a", b"b"]))] == [b"a", b"b"]
        assert await channel.stream_unary("/s/sum")(iter([b"a", b"b", b"c"])) == b"abc"
        for method in ("/s/fail", "/s/refuse"):
            with pytest.raises(grpc.aio.AioRpcError):
                assert [found async for found in channel.unary_stream(method)(b"x")] == []
        left = channel.unary_stream("/s/wait")(b"a")
        assert await left.read() == b"a"
        assert _read(meter, "lattice.server.streams")["s/wait",] == 1
        left.cancel()
    await server.stop(5)
    assert _read(meter, "lattice.server.stream.calls") == {
        ("s/echo", "OK"): 1,
        ("s/sum", "OK"): 1,
        ("s/fail", "UNKNOWN"): 1,
        ("s/refuse", "NOT_FOUND"): 1,
        ("s/wait", "CANCELLED"): 1,
    }
    assert _read(meter, "lattice.server.stream.messages") == {
        ("s/echo", "received"): 2,
        ("s/echo", "sent"): 2,
        ("s/sum", "received"): 3,
        ("s/fail", "sent"): 1,
        ("s/refuse", "sent"): 1,
        ("s/wait", "sent"): 1,
    }
    assert set(_read(meter, "lattice.server.streams").values()) == {0}


def _read(meter: RpcMeter, name: str) -> Any:
    return next(reading.values for reading in meter.read() if reading.instrument.name == name)
