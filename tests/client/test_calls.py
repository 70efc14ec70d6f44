"""Repeated calls when a server refuses or fails. The server is a fake whose answers each test chooses."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NoReturn

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Detail
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from lattice.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    payload_pb2,
    results_pb2,
    results_pb2_grpc,
    run_pb2,
    workflow_pb2,
    workflow_pb2_grpc,
)

from lattice_client import AsyncLatticeClient, AsyncRun, InternalError, task
from lattice_client.convert.inputs import Binder
from lattice_client.graph.outputs import Scope

LARGE = b"x" * 1_000_000


@task
def size(data: bytes) -> int:
    return len(data)


class Server(
    workflow_pb2_grpc.WorkflowServiceServicer,
    results_pb2_grpc.ResultsServiceServicer,
    artifact_pb2_grpc.ArtifactServiceServicer,
    cluster_pb2_grpc.ClusterServiceServicer,
):
    """Counts calls and refuses as many as a test wants."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.is_full = 0
        self.limits = cluster_pb2.Limits(inline_payload_bytes=256 * 1024, upload_chunk_bytes=1024 * 1024)
        self.parts: list[int] = []
        self.request_ids: set[str] = set()

    async def GetServerInfo(
        self, request: cluster_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.GetServerInfoResponse:
        """Tell the limits."""
        self.calls["GetServerInfo"] += 1
        return cluster_pb2.GetServerInfoResponse(limits=self.limits)

    async def WriteArtifact(
        self, request_iterator: AsyncIterator[artifact_pb2.WriteArtifactRequest], context: grpc.aio.ServicerContext
    ) -> artifact_pb2.WriteArtifactResponse:
        """Take an upload."""
        self.calls["WriteArtifact"] += 1
        self.parts = [len(part.data) async for part in request_iterator]
        artifact = payload_pb2.Artifact(artifact_id="a", size_bytes=sum(self.parts), node_id="head")
        return artifact_pb2.WriteArtifactResponse(artifact=artifact)

    async def RunWorkflow(
        self, request: workflow_pb2.RunWorkflowRequest, context: grpc.aio.ServicerContext
    ) -> workflow_pb2.RunWorkflowResponse:
        """Take a run, unless the server is full."""
        self.calls["RunWorkflow"] += 1
        if self.calls["RunWorkflow"] <= self.is_full:
            again = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000))
            await fail(context, code_pb2.RESOURCE_EXHAUSTED, again)
        spec = request.workflow
        assert [found.python.WhichOneof("code") for found in spec.functions.values()] == ["pickle"]
        assert spec.tasks[0].inputs["data"].payload.artifact.size_bytes >= len(LARGE)
        return workflow_pb2.RunWorkflowResponse(run=run_pb2.Run(run_id=request.run_id))

    async def AddTasks(
        self, request: workflow_pb2.AddTasksRequest, context: grpc.aio.ServicerContext
    ) -> workflow_pb2.AddTasksResponse:
        """Add tasks, and break off before the first answer."""
        self.calls["AddTasks"] += 1
        self.request_ids.add(request.request_id)
        if self.calls["AddTasks"] == 1:
            await fail(context, code_pb2.UNAVAILABLE)
        return workflow_pb2.AddTasksResponse(revision=2)

    async def ListRuns(
        self, request: workflow_pb2.ListRunsRequest, context: grpc.aio.ServicerContext
    ) -> workflow_pb2.ListRunsResponse:
        """Be there at the second try."""
        self.calls["ListRuns"] += 1
        if self.calls["ListRuns"] == 1:
            await fail(context, code_pb2.UNAVAILABLE)
        return workflow_pb2.ListRunsResponse()

    async def WatchRun(
        self, request: results_pb2.WatchRunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[results_pb2.WatchRunResponse]:
        """Break once, and then have an error of its own."""
        self.calls["WatchRun"] += 1
        yield results_pb2.WatchRunResponse(sequence=self.calls["WatchRun"])
        if self.calls["WatchRun"] == 1:
            await context.abort(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")
        await fail(context, code_pb2.INTERNAL, error_details_pb2.ErrorInfo(reason="INTERNAL", domain="lattice"))


async def fail(context: grpc.aio.ServicerContext, code: int, *details: Any) -> NoReturn:
    """End a call as the server does."""
    status = status_pb2.Status(code=code, message="no")
    for detail in details:
        packed = Detail()
        packed.Pack(detail)
        status.details.append(packed)
    found: Any = rpc_status.to_status(status)
    await context.abort(found.code, found.details, found.trailing_metadata)
    raise AssertionError


def play(
    scenario: Callable[[AsyncLatticeClient, Server], Coroutine[Any, Any, None]], served: Server | None = None
) -> None:
    """Play a scenario with a server."""

    async def run() -> None:
        server, answering = grpc.aio.server(), served or Server()
        workflow_pb2_grpc.add_WorkflowServiceServicer_to_server(answering, server)
        results_pb2_grpc.add_ResultsServiceServicer_to_server(answering, server)
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(answering, server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(answering, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asyncio.timeout(60), AsyncLatticeClient(f"127.0.0.1:{port}") as client:
            await scenario(client, answering)
        await server.stop(None)

    asyncio.run(run())


def test_large_input_is_uploaded_once_when_the_run_is_submitted_again() -> None:
    async def scenario(client: AsyncLatticeClient, server: Server) -> None:
        server.is_full = 3
        workflow = client.create_workflow()
        workflow.add_task(size, {"data": LARGE})
        await workflow.run()
        assert server.calls == {"GetServerInfo": 1, "WriteArtifact": 1, "RunWorkflow": 4}

    play(scenario)


def test_calls_are_repeated_by_their_request_id_when_an_answer_is_lost() -> None:
    async def scenario(client: AsyncLatticeClient, server: Server) -> None:
        workflow = client.create_workflow()
        assert await AsyncRun.of("r", client.api).add_tasks([workflow.add_task(size, {"data": b""})]) == 2
        assert await client.list_runs() == []
        assert server.calls == {"AddTasks": 2, "ListRuns": 2}
        assert len(server.request_ids) == 1
        assert "" not in server.request_ids

    play(scenario)


def test_events_resume_after_a_broken_stream_and_raise_an_error_of_the_server() -> None:
    async def scenario(client: AsyncLatticeClient, server: Server) -> None:
        with pytest.raises(InternalError):
            async for _ in client.events("r"):
                pass
        assert server.calls == {"WatchRun": 2}

    play(scenario)


async def stored(client: AsyncLatticeClient, size_bytes: int) -> str:
    """Return how an input of a size travels."""
    message = payload_pb2.Binding()
    await Binder("input", client.api.transfer.store, Scope(lambda output: True, ())).fill(message, b"x" * size_bytes)
    return str(message.payload.WhichOneof("content"))


def test_limits_are_not_read_when_a_value_is_small() -> None:
    async def scenario(client: AsyncLatticeClient, server: Server) -> None:
        assert await stored(client, 4096) == "data"
        assert not server.calls

    play(scenario)


def test_limits_are_read_once_when_values_are_larger() -> None:
    async def scenario(client: AsyncLatticeClient, server: Server) -> None:
        assert [await stored(client, size) for size in (5000, 200_000, 300_000)] == ["data", "data", "artifact"]
        assert server.calls == {"GetServerInfo": 1, "WriteArtifact": 1}

    play(scenario)


def test_values_are_uploaded_in_chunks_when_they_exceed_the_inline_limit() -> None:
    async def scenario(client: AsyncLatticeClient, server: Server) -> None:
        server.limits = cluster_pb2.Limits(inline_payload_bytes=8000, upload_chunk_bytes=3000)
        assert await stored(client, 8000) == "data"
        assert await stored(client, 8001) == "artifact"
        assert server.parts == [3000, 3000, 2001]

    play(scenario)
