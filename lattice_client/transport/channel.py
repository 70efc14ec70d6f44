"""Owns the interface of a connection to a server. Rule: every gRPC error is converted to one of this package's.

The client's logic is written once, as coroutines over a `Channel`. Calls of an `AsyncChannel` suspend the coroutine,
those of a `BlockingChannel` block the thread: such a coroutine runs to its end in the caller's own thread.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack, cast

import grpc
from lattice.v1 import cluster_pb2

from lattice_client import errors
from lattice_client.transport import statuses
from lattice_client.transport.security import Security, SecurityOptions, secure
from lattice_client.transport.stubs import Stubs

if TYPE_CHECKING:
    from grpc.aio import (
        StreamStreamMultiCallable,
        StreamUnaryMultiCallable,
        UnaryStreamMultiCallable,
        UnaryUnaryMultiCallable,
    )
    from lattice.v1 import (
        artifact_pb2_grpc,
        cluster_pb2_grpc,
        llm_pb2_grpc,
        results_pb2_grpc,
        service_pb2_grpc,
        task_pb2_grpc,
        workflow_pb2_grpc,
    )

Q = TypeVar("Q")
R = TypeVar("R")

DEFAULT_TARGET = "127.0.0.1:50051"
MESSAGE_LIMIT_BYTES = 256 * 1024 * 1024
# The default message limit of servers, plus the bytes that gRPC adds.
RETRY_LIMIT_BYTES = 17 * 1024 * 1024
# Every call may be repeated: a call that changes something carries an id by which the server recognises it.
# Streams in both directions are not: their readers make calls instead, or open another one.
SERVICE_CONFIG = """{"methodConfig": [
{"name": [{"service": "lattice.v1.WorkflowService", "method": "ExecuteWorkflows"},
{"service": "lattice.v1.WorkflowService", "method": "OpenRun"}]},
{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
"retryableStatusCodes": ["UNAVAILABLE"]}}]}"""
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.service_config", SERVICE_CONFIG),
    # gRPC does not repeat larger requests; its default is smaller than the code of many graphs.
    ("grpc.per_rpc_retry_buffer_size", RETRY_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    # By default gRPC dials a server that was restarted again after a second, and later only every two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


def dial(target: str | None, tenant: str = "", **security: Unpack[SecurityOptions]) -> Security:
    """Return how to connect to a server, for calls about one tenant. Raises TypeError, TargetError, SecurityError."""
    if unknown := sorted(security.keys() - SecurityOptions.__annotations__.keys()):
        known = ", ".join(SecurityOptions.__annotations__)
        raise TypeError(f"a client has no argument {', '.join(unknown)}; how it connects is given by {known}")
    return secure(target or os.environ.get("LATTICE_TARGET") or DEFAULT_TARGET, tenant=tenant, **security)


def options_for(dialled: Security) -> list[tuple[str, Any]]:
    """Return the options of a channel."""
    # Calls to this machine must not use a proxy that the environment names.
    return [*OPTIONS, ("grpc.enable_http_proxy", int(not dialled.is_local))]


class LimitReachedError(Exception):
    """The time limit of a block passed; see `Channel.limit`."""


class Mailbox(ABC, Generic[R]):
    """Items for a coroutine that waits for them."""

    @abstractmethod
    def put(self, item: R) -> None:
        """Add an item. Over asyncio only the event loop of the mailbox may call this."""

    @abstractmethod
    async def get(self) -> R:
        """Wait for an item, and take it. Raises LimitReachedError."""

    @abstractmethod
    def is_here(self) -> bool:
        """Whether the running event loop, or thread, may call `get`."""


class Delivery(ABC):
    """Has a stream read whose messages are put into mailboxes, one for each caller that waits."""

    @abstractmethod
    async def get(self, box: Mailbox[R | None]) -> R | None:
        """Wait for an item of a mailbox, and take it. None when the stream has ended, or cannot be read here.

        Raises LimitReachedError.
        """


class BidiCall(ABC, Generic[Q, R]):
    """A bidirectional stream."""

    @abstractmethod
    def send(self, message: Q) -> None:
        """Queue a message."""

    @abstractmethod
    async def read(self) -> R | None:
        """Wait for the next message; None at the end of the stream. An error ends the stream.

        Raises RequestError, ClientClosedError, LimitReachedError.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Cancel the stream. May be called from any thread, and by a finalizer."""


class Steps(ABC):
    """Calls a step function repeatedly, one call at a time, while a caller waits for its effects.

    The step returns False when it was the last one. An exception of the step is raised in every waiting caller.
    """

    @abstractmethod
    async def until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until a condition is true or the last step was made. Raises the exception of a step."""

    @abstractmethod
    def wake(self) -> None:
        """Have every waiting caller check its condition again."""

    @abstractmethod
    def stop(self) -> None:
        """Make no further step. May be called from any thread, and by a finalizer."""


class Channel(ABC):
    """The connection to one server."""

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

    @property
    def services(self) -> "service_pb2_grpc.ServicesServiceAsyncStub":
        """Calls of ServicesService."""
        return self._stubs().services

    @property
    def llms(self) -> "llm_pb2_grpc.LlmServiceAsyncStub":
        """Calls of LlmService."""
        return self._stubs().llms

    async def limits(self) -> cluster_pb2.Limits:
        """Return the server's limits, which are read once. Raises RequestError, ClientClosedError."""
        if self._limits is None:
            self._limits = (await self.call(self.cluster.GetServerInfo, cluster_pb2.GetServerInfoRequest())).limits
        return self._limits

    @abstractmethod
    def _stubs(self) -> Stubs:
        """Return the stubs for the current thread or event loop. Raises ClientClosedError, ForkError."""

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
    def open_bidi(self, method: "StreamStreamMultiCallable[Q, R]") -> BidiCall[Q, R]:
        """Start a bidirectional stream. Raises ClientClosedError, ForkError."""

    @abstractmethod
    def mailbox(self) -> Mailbox[Any]:
        """Return a mailbox of the current event loop."""

    @abstractmethod
    def delivery(self, step: Callable[[], Coroutine[Any, Any, bool]]) -> Delivery:
        """Return a `Delivery` by a step that puts one message of a stream into its mailbox.

        After its last message it puts None into every mailbox that is waited for, and returns False.
        """

    @abstractmethod
    def beside(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine beside the caller: in a task of the event loop, or in a thread of its own."""

    def kept(self) -> dict[Any, Any]:
        """Return the objects whose lifetime is the connection of the current thread or event loop. Raises as `call`."""
        return self._stubs().kept

    @abstractmethod
    def steps(self, step: Callable[[], Awaitable[bool]]) -> Steps:
        """Return a `Steps` that calls this step function."""

    @abstractmethod
    def limit(self, timeout_s: float | None) -> AbstractAsyncContextManager[None]:
        """Limit the duration of a block. Raises LimitReachedError."""

    @abstractmethod
    def now(self) -> float:
        """Return the time in seconds, on a monotonic clock."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait. Raises LimitReachedError."""

    @abstractmethod
    def shut(self) -> None:
        """Close the connection of every thread and event loop. Calls in progress raise ClientClosedError."""

    async def close(self) -> None:
        """As `shut`; the connection of the current event loop is closed when this returns."""
        self.shut()

    def closed_error(self) -> errors.ClientClosedError:
        """Return the error of a call of a closed client."""
        return errors.ClientClosedError(f"the client of {self.target} is closed: create another one")

    @contextmanager
    def _converting(self) -> Iterator[None]:
        """Convert a gRPC error to one of this package's."""
        try:
            yield
        except grpc.RpcError as error:
            if self.is_closed:
                raise self.closed_error() from None
            # Every gRPC call error has a status; the base class does not declare it.
            raise statuses.from_rpc(cast(grpc.aio.AioRpcError, error), self.target) from None
