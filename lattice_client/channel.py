"""Owns the channel to a server and the stubs on it. Rule: no gRPC error leaves by `call`."""

import os
from collections.abc import Awaitable
from typing import TypeVar

import grpc
from lattice.v1 import results_pb2_grpc, task_pb2_grpc, worker_pb2_grpc, workflow_pb2_grpc

from lattice_client import errors

T = TypeVar("T")

DEFAULT_TARGET = "127.0.0.1:50051"
MESSAGE_LIMIT_BYTES = 256 * 1024 * 1024
SERVICE_CONFIG = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s",
"maxBackoff": "2s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.service_config", SERVICE_CONFIG),
    ("grpc.keepalive_time_ms", 30_000),
]


class Channel:
    """One connection; lives on one event loop."""

    def __init__(self, target: str | None) -> None:
        address = target or os.environ.get("LATTICE_TARGET") or DEFAULT_TARGET
        self.target = address.removeprefix("http://").removeprefix("grpc://").rstrip("/")
        self._channel = grpc.aio.insecure_channel(self.target, options=OPTIONS)
        self.workflows = workflow_pb2_grpc.WorkflowServiceStub(self._channel)
        self.tasks = task_pb2_grpc.TaskServiceStub(self._channel)
        self.results = results_pb2_grpc.ResultsServiceStub(self._channel)
        self.workers = worker_pb2_grpc.WorkerServiceStub(self._channel)

    async def call(self, call: Awaitable[T]) -> T:
        """Return what a call answers. Raises RequestError."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()
