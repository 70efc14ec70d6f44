"""Owns the channel to a server and the stubs on it. Rule: no gRPC error leaves by `call`."""

import functools
import os
from collections.abc import Awaitable
from typing import Any, TypeVar, Unpack, cast

import grpc
from lattice.v1 import results_pb2_grpc, task_pb2_grpc, worker_pb2_grpc, workflow_pb2_grpc

from lattice_client import errors
from lattice_client.security import SecurityOptions, secure

T = TypeVar("T")

DEFAULT_TARGET = "127.0.0.1:50051"
MESSAGE_LIMIT_BYTES = 256 * 1024 * 1024
RETRY_LIMIT_BYTES = 16 * 1024 * 1024
# Every call may be repeated but one: tasks that were added, and whose answer was lost, would be refused as known.
SERVICE_CONFIG = """{"methodConfig": [
{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
"retryableStatusCodes": ["UNAVAILABLE"]}},
{"name": [{"service": "lattice.v1.WorkflowService", "method": "AddTasks"}]}]}"""
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.service_config", SERVICE_CONFIG),
    # What is larger is not repeated; by default that is less than the code many a graph brings.
    ("grpc.per_rpc_retry_buffer_size", RETRY_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
]


class Channel:
    """One connection; lives on one event loop."""

    def __init__(self, target: str | None, **security: Unpack[SecurityOptions]) -> None:
        found = secure(target or os.environ.get("LATTICE_TARGET") or DEFAULT_TARGET, **security)
        self.target = found.address
        # What goes to this machine must not take a way over another one, whatever proxy the environment names.
        options = [*OPTIONS, ("grpc.enable_http_proxy", int(not found.is_local))]
        if found.credentials is None:
            self._channel = grpc.aio.insecure_channel(self.target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(self.target, found.credentials, options=options)
        channel = self._channel if found.token is None else cast(grpc.aio.Channel, Signed(self._channel, found.token))
        self.workflows = workflow_pb2_grpc.WorkflowServiceStub(channel)
        self.tasks = task_pb2_grpc.TaskServiceStub(channel)
        self.results = results_pb2_grpc.ResultsServiceStub(channel)
        self.workers = worker_pb2_grpc.WorkerServiceStub(channel)

    async def call(self, call: Awaitable[T]) -> T:
        """Return what a call answers. Raises RequestError."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class Signed:
    """A channel for stubs, whose every call carries a token.

    gRPC's own interceptors wrap each call in a task, and each message of a stream in another; this costs nothing.
    """

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __getattr__(self, kind: str) -> Any:
        """Return what makes calls of a kind: `unary_unary`, `unary_stream`, `stream_unary` or `stream_stream`."""
        make = getattr(self._channel, kind)
        return lambda *args, **kwargs: functools.partial(make(*args, **kwargs), metadata=self._metadata)
