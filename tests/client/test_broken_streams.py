"""A stream that breaks at once: calls take its place, and gRPC does not repeat it."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from lattice.v1 import cluster_pb2, workflow_pb2

from lattice_client import LatticeClient, task

ANSWERS = {
    "GetServerInfo": cluster_pb2.GetServerInfoResponse(
        limits=cluster_pb2.Limits(inline_payload_bytes=4096, upload_chunk_bytes=2**20)
    ),
    "RunWorkflow": workflow_pb2.RunWorkflowResponse(),
}


@task
def nothing(x: int) -> int:
    return x


class Breaking(grpc.GenericRpcHandler):
    """Answers some calls, and breaks every stream."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return how a call is handled."""
        method = str(details.method).rpartition("/")[2]  # type: ignore[attr-defined]  # its stub has no fields
        self.calls[method] += 1
        if method in ANSWERS:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: ANSWERS[method].SerializeToString())
        return grpc.stream_stream_rpc_method_handler(self._break)

    def _break(self, requests: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield from ()


def test_a_stream_that_breaks_is_not_repeated_by_grpc() -> None:
    handler = Breaking()
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with LatticeClient(f"127.0.0.1:{port}") as client:
        workflow = client.create_workflow()
        workflow.add_task(nothing, {"x": 1})
        for _ in range(2):
            workflow.run()
    server.stop(None).wait()
    assert handler.calls["ExecuteWorkflows"] == 1
    assert handler.calls["RunWorkflow"] == 2
