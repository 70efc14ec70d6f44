"""Owns the channels to a server and the stubs on them. Rule: no gRPC error leaves by `call`."""

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack, cast

import grpc
from lattice.v1 import (
    artifact_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    results_pb2_grpc,
    task_pb2_grpc,
    workflow_pb2_grpc,
)

from lattice_client import errors, forks
from lattice_client.security import Security, SecurityOptions, secure

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
    # By default gRPC dials a server that was away for a while only every two minutes.
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class Stubs:
    """One connection and the stubs on it, for one event loop."""

    def __init__(self, dialled: Security) -> None:
        forks.check_process()
        # What goes to this machine must not take a way over another one, whatever proxy the environment names.
        options = [*OPTIONS, ("grpc.enable_http_proxy", int(not dialled.is_local))]
        if dialled.credentials is None:
            self.channel = grpc.aio.insecure_channel(dialled.address, options=options)
        else:
            self.channel = grpc.aio.secure_channel(dialled.address, dialled.credentials, options=options)
        forks.use(self.channel)
        channel = self.channel if dialled.token is None else cast(grpc.aio.Channel, Signed(self.channel, dialled.token))
        self.workflows = workflow_pb2_grpc.WorkflowServiceStub(channel)
        self.tasks = task_pb2_grpc.TaskServiceStub(channel)
        self.results = results_pb2_grpc.ResultsServiceStub(channel)
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


class Channel:
    """The connections to one server: one for each event loop that makes calls, since gRPC binds them to theirs."""

    def __init__(self, target: str | None, **security: Unpack[SecurityOptions]) -> None:
        self._dialled = secure(target or os.environ.get("LATTICE_TARGET") or DEFAULT_TARGET, **security)
        self.target = self._dialled.address
        self.is_closed = False
        self._stubs: dict[asyncio.AbstractEventLoop, Stubs] = {}
        self._lock = threading.Lock()
        self._limits: cluster_pb2.Limits | None = None

    @property
    def workflows(self) -> "workflow_pb2_grpc.WorkflowServiceAsyncStub":
        """Calls of WorkflowService."""
        return self._here().workflows

    @property
    def tasks(self) -> "task_pb2_grpc.TaskServiceAsyncStub":
        """Calls of TaskService."""
        return self._here().tasks

    @property
    def results(self) -> "results_pb2_grpc.ResultsServiceAsyncStub":
        """Calls of ResultsService."""
        return self._here().results

    @property
    def artifacts(self) -> "artifact_pb2_grpc.ArtifactServiceAsyncStub":
        """Calls of ArtifactService."""
        return self._here().artifacts

    @property
    def cluster(self) -> "cluster_pb2_grpc.ClusterServiceAsyncStub":
        """Calls of ClusterService."""
        return self._here().cluster

    async def limits(self) -> cluster_pb2.Limits:
        """Return the server's limits; it is asked for them once. Raises RequestError, ClientClosedError."""
        if self._limits is None:
            self._limits = (await self.call(self.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest()))).limits
        return self._limits

    def _here(self) -> Stubs:
        """Return the stubs of the running loop. Raises ClientClosedError, ForkError."""
        if self.is_closed:
            raise self.closed_error()
        loop = asyncio.get_running_loop()
        found = self._stubs.get(loop)
        if found is None or forks.is_broken():
            with self._lock:
                for other in [other for other in self._stubs if other.is_closed()]:
                    del self._stubs[other]
                found = self._stubs[loop] = Stubs(self._dialled)
        return found

    def closed_error(self) -> errors.ClientClosedError:
        """Return what a call of a closed client raises."""
        return errors.ClientClosedError(f"the client of {self.target} is closed: make another one")

    async def call(self, call: Awaitable[T]) -> T:
        """Return what a call answers. Raises RequestError, ClientClosedError."""
        with self.closing():
            try:
                return await call
            except grpc.aio.AioRpcError as error:
                raise self.error_of(error) from None

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Turn the cancellation of the block's calls, by which a channel closes, into ClientClosedError."""
        try:
            yield
        except grpc.aio.UsageError:  # another thread closed it
            raise self.closed_error() from None
        except asyncio.CancelledError:
            if self.is_closed and not _is_cancelling():
                raise self.closed_error() from None
            raise

    def error_of(self, error: grpc.aio.AioRpcError) -> errors.LatticeError:
        """Return this package's error for a call that failed."""
        return self.closed_error() if self.is_closed else errors.from_rpc(error, self.target)

    async def close(self) -> None:
        """Close the connections."""
        self.is_closed = True
        with self._lock:
            stubs, self._stubs = self._stubs, {}
        here = asyncio.get_running_loop()
        for loop, found in stubs.items():
            if loop is here:
                await found.channel.close()
            elif loop.is_running():
                asyncio.run_coroutine_threadsafe(found.channel.close(), loop)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


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
