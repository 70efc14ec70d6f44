"""Workers whose messages a test chooses, and a server without workers of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from lattice.v1 import (
    artifact_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    payload_pb2,
    resources_pb2,
    results_pb2,
    results_pb2_grpc,
    run_pb2,
    worker_pb2,
    worker_pb2_grpc,
    workflow_pb2,
    workflow_pb2_grpc,
)

from lattice_server.engine.ports import Executor
from tests.server.apps import NoWorkers, serving
from tests.server.rpc.callers import graph, task

TIMEOUT_S = 60.0
# A scripted worker sends no heartbeats. With the server's own limit of 2.8 s it would be lost on a busy machine.
SESSION_TTL_S = 60.0
Report = worker_pb2.Report


class ScriptedWorker:
    """A worker whose every word a test chooses."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = worker_pb2_grpc.WorkerServiceStub(channel).Connect()
        self._heard: list[tuple[worker_pb2.ConnectResponse, set[str]]] = []

    async def say(self, **message: Any) -> None:
        """Send one message."""
        await self._call.write(worker_pb2.ConnectRequest(**message))

    async def hear(self, field: str) -> Any:
        """Return the next message that has a field, or that field where it is one message; without a name, the next
        message that has none. Other fields are kept for later."""
        while True:
            for response, fields in self._heard:
                if field in fields:
                    fields.remove(field)
                    found = getattr(response, field, None)
                    return found if isinstance(found, Message) else response
            response = await self.next()
            self._heard.append((response, {known.name for known, _ in response.ListFields()} or {""}))

    async def next(self) -> worker_pb2.ConnectResponse:
        """Return the next message that nothing has been read of."""
        response = await self._call.read()
        assert isinstance(response, worker_pb2.ConnectResponse), "the stream ended"
        return response

    async def report(self, sequence: int, lease_id: str, **fact: Any) -> None:
        """Send one report."""
        report = Report(sequence=sequence, lease_id=lease_id, **fact)
        await self.say(reports=[report])

    def hang_up(self) -> None:
        """Break the stream."""
        self._call.cancel()


class Searched(NoWorkers):
    """An executor that has lost a worker."""

    given_up = frozenset({"lost"})


class Scene:
    """A head without workers of its own, and a channel to it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.workflows = workflow_pb2_grpc.WorkflowServiceStub(channel)
        self.results = results_pb2_grpc.ResultsServiceStub(channel)
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        self.workers = worker_pb2_grpc.WorkerServiceStub(channel)

    def hello(self, **more: Any) -> worker_pb2.Hello:
        """Return the greeting of a worker of one CPU."""
        capacity = resources_pb2.Capacity(cpu=1, slots=1)
        known = {"worker_id": "w", "node_id": "n", "capacity": capacity, "protocol_version": 1}
        return worker_pb2.Hello(**known | {"isolations": [resources_pb2.ISOLATION_NONE]} | more)

    async def worker(self, **hello: Any) -> tuple[ScriptedWorker, worker_pb2.Welcome]:
        """Connect a worker."""
        worker = ScriptedWorker(self.channel)
        await worker.say(hello=self.hello(**hello))
        return worker, await worker.hear("welcome")

    async def run(self, *task_ids: str) -> str:
        """Start a run."""
        spec = graph(*(task(task_id) for task_id in task_ids))
        return (await self.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))).run.run_id

    async def result(self, run_id: str, wait_s: int = 60) -> run_pb2.Run:
        """Wait for the end of a run."""
        request = results_pb2.GetResultRequest(run_id=run_id, wait=Duration(seconds=wait_s))
        return (await self.results.GetResult(request)).run

    async def until_event(self, run_id: str, kind: str) -> None:
        """Wait until a run has an event of a kind: then the server has processed all earlier reports."""
        call = self.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
        async for response in call:
            if any(event.WhichOneof("event") == kind for event in response.events):
                call.cancel()
                return

    async def until(self, state: cluster_pb2.NodeState.ValueType) -> None:
        """Wait until the only node is in a state."""
        while [node.state for node in (await self.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes] != [state]:
            await asyncio.sleep(0.01)

    async def until_states(self, **states: cluster_pb2.NodeState.ValueType) -> None:
        """Wait until the nodes are in these states."""
        request = cluster_pb2.ListNodesRequest()
        while {node.node_id: node.state for node in (await self.cluster.ListNodes(request)).nodes} != states:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def on_stage(executor: Executor, **settings: Any) -> AsyncIterator[Scene]:
    """A head while the block runs."""
    async with serving(executor, **settings) as app, grpc.aio.insecure_channel(app.address) as channel:
        yield Scene(channel)


def play(
    scenario: Callable[[Scene], Coroutine[Any, Any, None]], executor: Executor | None = None, **settings: Any
) -> None:
    """Play a scenario with a head."""

    async def run() -> None:
        limits = {"session_ttl_s": SESSION_TTL_S} | settings
        async with asyncio.timeout(TIMEOUT_S), on_stage(executor or Searched(), **limits) as head:
            await scenario(head)

    asyncio.run(run())


def succeeded() -> worker_pb2.AttemptSucceeded:
    return worker_pb2.AttemptSucceeded(outputs={"out": payload_pb2.Payload(json="1")})
