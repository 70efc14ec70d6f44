"""Owns how calls reach a server. Rule: each gRPC error leaves as one of this package's.

The client's logic is written once, as coroutines over a `Channel`. Calls of an `AsyncChannel` suspend the coroutine,
those of a `BlockingChannel` block the thread: such a coroutine runs to its end in the caller's own thread.
"""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack, cast

import grpc
from lattice.v1 import (
    artifact_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    results_pb2_grpc,
    task_pb2_grpc,
    workflow_pb2_grpc,
)

from lattice_client import errors
from lattice_client.transport.security import Security, SecurityOptions, secure

if TYPE_CHECKING:
    from grpc.aio import (
        StreamStreamMultiCallable,
        StreamUnaryMultiCallable,
        UnaryStreamMultiCallable,
        UnaryUnaryMultiCallable,
    )

Q = TypeVar("Q")
R = TypeVar("R")

DEFAULT_TARGET = "127.0.0.1:50051"
MESSAGE_LIMIT_BYTES = 256 * 1024 * 1024
# The largest message that servers take unless told otherwise, and what gRPC adds to it.
RETRY_LIMIT_BYTES = 17 * 1024 * 1024
# Every call may be repeated: one that changes something carries an id by which the server knows it again.
SERVICE_CONFIG = """{"methodConfig": [
{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
"retryableStatusCodes": ["UNAVAILABLE"]}}]}"""
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


def dial(target: str | None, **security: Unpack[SecurityOptions]) -> Security:
    """Return the server to call. Raises TargetError, SecurityError."""
    return secure(target or os.environ.get("LATTICE_TARGET") or DEFAULT_TARGET, **security)


def options_for(dialled: Security) -> list[tuple[str, Any]]:
    """Return the options of a channel."""
    # Calls to this machine must not go by way of another one, whatever proxy the environment names.
    return [*OPTIONS, ("grpc.enable_http_proxy", int(not dialled.is_local))]


class Stubs:
    """The stubs on one connection. Those of a blocking one are typed as if their calls could be awaited."""

    def __init__(self, channel: Any, token: str | None) -> None:
        channel = channel if token is None else Signed(channel, token)
        self.workflows: workflow_pb2_grpc.WorkflowServiceAsyncStub
        self.tasks: task_pb2_grpc.TaskServiceAsyncStub
        self.results: results_pb2_grpc.ResultsServiceAsyncStub
        self.artifacts: artifact_pb2_grpc.ArtifactServiceAsyncStub
        self.cluster: cluster_pb2_grpc.ClusterServiceAsyncStub
        self.workflows = cast(Any, workflow_pb2_grpc.WorkflowServiceStub(channel))
        self.tasks = cast(Any, task_pb2_grpc.TaskServiceStub(channel))
        self.results = cast(Any, results_pb2_grpc.ResultsServiceStub(channel))
        self.artifacts = cast(Any, artifact_pb2_grpc.ArtifactServiceStub(channel))
        self.cluster = cast(Any, cluster_pb2_grpc.ClusterServiceStub(channel))


class LimitReachedError(Exception):
    """The time limit of a block passed; see `Channel.limit`."""


class OpenCall(ABC, Generic[R]):
    """A call whose first message was read, and whose last one is still to come."""

    @abstractmethod
    async def last(self) -> R | None:
        """Wait for the last message. None when the call broke, or cannot be read here."""

    @abstractmethod
    def abandon(self) -> None:
        """End the call; nothing waits for it any more. May be called from any thread, and by a finalizer."""


class Conversation(ABC, Generic[Q, R]):
    """A call with messages both ways, which either side may send at any time."""

    @abstractmethod
    def send(self, message: Q) -> None:
        """Queue a message."""

    @abstractmethod
    async def read(self) -> R | None:
        """Wait for the next message; None at the end. After an error the call is over.

        Raises RequestError, ClientClosedError, LimitReachedError.
        """

    @abstractmethod
    def abandon(self) -> None:
        """End the call. May be called from any thread, and by a finalizer."""


class Steps(ABC):
    """Has a coroutine called again and again, one call at a time, as long as something waits for what it brings about.

    It returns False when nothing more will come of it; what it raises then, everything that waits raises.
    """

    @abstractmethod
    async def until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until something holds. Returns as well when nothing more will come. Raises what a step raised."""

    @abstractmethod
    def wake(self) -> None:
        """Have what waits look again whether it is ready."""

    @abstractmethod
    def stop(self) -> None:
        """Make no more steps. May be called from any thread, and by a finalizer."""


class Channel(ABC):
    """The way to one server."""

    def __init__(self, dialled: Security) -> None:
        self._dialled = dialled
        self.target = dialled.address
        self.is_closed = False
        self._limits: cluster_pb2.Limits | None = None

    @property
    def workflows(self) -> "workflow_pb2_grpc.WorkflowServiceAsyncStub":
        """Calls of WorkflowService."""
        return self._stubs().workflows

    @property
    def tasks(self) -> "task_pb2_grpc.TaskServiceAsyncStub":
        """Calls of TaskService."""
        return self._stubs().tasks

    @property
    def results(self) -> "results_pb2_grpc.ResultsServiceAsyncStub":
        """Calls of ResultsService."""
        return self._stubs().results

    @property
    def artifacts(self) -> "artifact_pb2_grpc.ArtifactServiceAsyncStub":
        """Calls of ArtifactService."""
        return self._stubs().artifacts

    @property
    def cluster(self) -> "cluster_pb2_grpc.ClusterServiceAsyncStub":
        """Calls of ClusterService."""
        return self._stubs().cluster

    async def limits(self) -> cluster_pb2.Limits:
        """Return the server's limits; it is asked for them once. Raises RequestError, ClientClosedError."""
        if self._limits is None:
            self._limits = (await self.call(self.cluster.GetServerInfo, cluster_pb2.GetServerInfoRequest())).limits
        return self._limits

    @abstractmethod
    def _stubs(self) -> Stubs:
        """Return the stubs to call with from here. Raises ClientClosedError, ForkError."""

    @abstractmethod
    async def call(self, method: "UnaryUnaryMultiCallable[Q, R]", request: Q) -> R:
        """Return the answer of a call. Raises RequestError, ClientClosedError, LimitReachedError."""

    @abstractmethod
    def stream(self, method: "UnaryStreamMultiCallable[Q, R]", request: Q) -> AsyncIterator[R]:
        """Yield the messages of a call. Raises as `call`."""

    @abstractmethod
    async def upload(self, method: "StreamUnaryMultiCallable[Q, R]", messages: Iterable[Q]) -> R:
        """Send messages; return the answer. Raises as `call`."""

    @abstractmethod
    async def begin(
        self, method: "UnaryStreamMultiCallable[Q, R]", request: Q, on_end: Callable[[OpenCall[R]], object]
    ) -> tuple[R, OpenCall[R]]:
        """Start a call of two messages; return the first one. `on_end` is told when it is over. Raises as `call`."""

    @abstractmethod
    def converse(self, method: "StreamStreamMultiCallable[Q, R]") -> Conversation[Q, R]:
        """Start a call with messages both ways. Raises ClientClosedError, ForkError."""

    @abstractmethod
    def steps(self, step: Callable[[], Awaitable[bool]]) -> Steps:
        """Return what makes these steps."""

    @abstractmethod
    def limit(self, timeout_s: float | None) -> AbstractAsyncContextManager[None]:
        """Bound all calls of a block. Raises LimitReachedError."""

    @abstractmethod
    def now(self) -> float:
        """Return the time, in seconds, on a clock that only goes forward."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait. Raises LimitReachedError."""

    @abstractmethod
    def shut(self) -> None:
        """Close the connections, from any thread. Calls under way raise ClientClosedError."""

    async def close(self) -> None:
        """As `shut`; the connection of this thread is closed when it returns."""
        self.shut()

    def closed_error(self) -> errors.ClientClosedError:
        """Return the error of a call of a closed client."""
        return errors.ClientClosedError(f"the client of {self.target} is closed: make another one")

    @contextmanager
    def _converting(self) -> Iterator[None]:
        """Turn an error of gRPC into one of this package's."""
        try:
            yield
        except grpc.RpcError as error:
            if self.is_closed:
                raise self.closed_error() from None
            # Both kinds of calls have a status; only its subclasses say so.
            raise errors.from_rpc(cast(grpc.aio.AioRpcError, error), self.target) from None


class Signed:
    """A channel for stubs, whose every call carries a token.

    gRPC's own interceptors wrap each call in a task, and each message of a stream in another; this costs nothing.
    """

    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __getattr__(self, kind: str) -> Any:
        """Return the maker of calls of a kind: `unary_unary`, `unary_stream`, `stream_unary` or `stream_stream`."""
        make = getattr(self._channel, kind)
        return lambda *args, **kwargs: functools.partial(make(*args, **kwargs), metadata=self._metadata)
