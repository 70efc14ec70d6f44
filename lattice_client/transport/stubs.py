"""Owns the stubs of the contract's services on one gRPC channel.

Rule: every call carries the headers of the connection, and names the caller's span if there is one.
"""

from typing import Any, cast

from lattice.v1 import (
    artifact_pb2_grpc,
    cluster_pb2_grpc,
    llm_pb2_grpc,
    results_pb2_grpc,
    service_pb2_grpc,
    task_pb2_grpc,
    workflow_pb2_grpc,
)

from lattice_client.transport.tracing import Headers, trace_headers, uninstrumented


class Stubs:
    """The stubs on one channel; `kept` has objects with the lifetime of the channel.

    The stubs of a blocking channel are typed as if their calls could be awaited.
    """

    def __init__(self, channel: Any, headers: Headers) -> None:
        channel = Signed(channel, headers)
        self.kept: dict[Any, Any] = {}
        self.workflows: workflow_pb2_grpc.WorkflowServiceAsyncStub
        self.tasks: task_pb2_grpc.TaskServiceAsyncStub
        self.results: results_pb2_grpc.ResultsServiceAsyncStub
        self.artifacts: artifact_pb2_grpc.ArtifactServiceAsyncStub
        self.cluster: cluster_pb2_grpc.ClusterServiceAsyncStub
        self.llms: llm_pb2_grpc.LlmServiceAsyncStub
        self.services: service_pb2_grpc.ServicesServiceAsyncStub
        self.workflows = cast(Any, workflow_pb2_grpc.WorkflowServiceStub(channel))
        self.tasks = cast(Any, task_pb2_grpc.TaskServiceStub(channel))
        self.results = cast(Any, results_pb2_grpc.ResultsServiceStub(channel))
        self.artifacts = cast(Any, artifact_pb2_grpc.ArtifactServiceStub(channel))
        self.cluster = cast(Any, cluster_pb2_grpc.ClusterServiceStub(channel))
        self.llms = cast(Any, llm_pb2_grpc.LlmServiceStub(channel))
        self.services = cast(Any, service_pb2_grpc.ServicesServiceStub(channel))


class Signed:
    """A channel for stubs that adds headers to every call: those of the connection, and the caller's span.

    gRPC's interceptors are not used: they wrap each call in a task, and each message of a stream in another one.
    """

    def __init__(self, channel: Any, headers: Headers) -> None:
        self._channel = channel
        self._metadata = headers

    def __getattr__(self, kind: str) -> Any:
        """Return the factory of one kind of call: `unary_unary`, `unary_stream`, `stream_unary` or `stream_stream`."""
        factory = getattr(self._channel, kind)
        return lambda *args, **kwargs: SignedCall(args[0], factory(*args, **kwargs), self._metadata)


class SignedCall:
    """A stub of one method: `method` without headers. The name is such as `/lattice.v1.TaskService/GetTask`."""

    def __init__(self, name: str, method: Any, metadata: Headers) -> None:
        self.__name__ = name
        self.method = method
        self._metadata = metadata

    @property
    def headers(self) -> Headers:
        """The headers of a call that starts now."""
        return (*self._metadata, *trace_headers())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Start a call."""
        with uninstrumented():
            return self.method(*args, metadata=self.headers, **kwargs)
