"""Owns the connection to a server, for asyncio. The synchronous client in `sync.py` is a facade of this one.

Rule: a graph is one RPC; a watch that breaks goes on after the last event it saw.
"""

import asyncio
import os
import random
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar
from uuid import uuid4

import grpc
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import (
    payload_pb2,
    results_pb2,
    results_pb2_grpc,
    run_pb2,
    task_pb2,
    task_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
    workflow_pb2,
    workflow_pb2_grpc,
)

from lattice_client import convert, errors, payloads
from lattice_client.convert import RunEvent
from lattice_client.workflow import Graph

T = TypeVar("T")

DEFAULT_TARGET = "127.0.0.1:50051"
CHUNK_BYTES = 1024 * 1024
WAIT_S = 60.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
# Runs beyond these are asked for their result by a call of their own.
MAX_OPEN_CALLS = 64
MESSAGE_LIMIT_BYTES = 256 * 1024 * 1024
SERVICE_CONFIG = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s",
"maxBackoff": "2s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.service_config", SERVICE_CONFIG),
    ("grpc.keepalive_time_ms", 30_000),
]
TERMINAL = frozenset({run_pb2.RUN_STATE_SUCCEEDED, run_pb2.RUN_STATE_FAILED, run_pb2.RUN_STATE_CANCELLED})
RESUMABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED})


# The last message of the call that started a run; None when the call broke.
Outcome = asyncio.Task[workflow_pb2.ExecuteWorkflowResponse | None]


class AsyncLatticeWorkflow(Graph["AsyncLatticeClient"]):
    """A workflow being written, for asyncio."""

    async def run(self, run_id: str = "", **settings: Any) -> "AsyncRun":
        """Send the whole graph and start a run. Raises RequestError."""
        return await self.client.run(self, run_id, **settings)

    async def get_results(
        self, run_id: str, verbose: bool = True, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """Follow a run to its end and return its messages, printing them when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages = []
        async with asyncio.timeout(timeout):
            async for message in self.messages(run_id):
                messages.append(message)
                if verbose:
                    print(message)
        return messages

    async def messages(self, run_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages `get_results` returns, as they come."""
        async for event in self.client.events(run_id):
            message = convert.message_of(event, self.workflow_id, run_id)
            if message is not None:
                yield message


class AsyncRun(str):
    """A run: its id, as a string, that can also be followed."""

    _client: "AsyncLatticeClient"
    _outcome: Outcome | None

    @classmethod
    def of(cls, run_id: str, client: "AsyncLatticeClient", outcome: Outcome | None = None) -> Self:
        """Return the run with this id; `outcome` is the end of the call that started it."""
        run = cls(run_id)
        run._client, run._outcome = client, outcome
        if outcome is not None:
            # Nobody can ask for the result any more: the call that would bring it may end.
            weakref.finalize(run, _abandon, outcome).atexit = False
        return run

    async def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the end and return the final task's outputs, or those of each final task by its id.

        Raises:
            TaskFailedError: a task failed; its cause is the original exception when it can be rebuilt.
            RunCancelledError: the run was cancelled.
            TimeoutError: `timeout` seconds passed; the run goes on.
        """
        async with asyncio.timeout(timeout):
            return await self._client.result(self, self._outcome)

    def events(self, after: int = 0) -> AsyncIterator[RunEvent]:
        """Yield the run's events after number `after`, to its end."""
        return self._client.events(self, after)

    async def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        await self._client.cancel_run(self, reason)

    async def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        run = await self._client.get_run(self)
        return run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


class AsyncLatticeClient:
    """A connection to a server. Use it on one event loop, as a context manager or with `close`."""

    def __init__(self, target: str | None = None) -> None:
        address = target or os.environ.get("LATTICE_TARGET") or DEFAULT_TARGET
        self.target = address.removeprefix("http://").removeprefix("grpc://").rstrip("/")
        self._channel = grpc.aio.insecure_channel(self.target, options=OPTIONS)
        self._workflows = workflow_pb2_grpc.WorkflowServiceStub(self._channel)
        self._tasks = task_pb2_grpc.TaskServiceStub(self._channel)
        self._results = results_pb2_grpc.ResultsServiceStub(self._channel)
        self._workers = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._open: set[Outcome] = set()
        self._known_code: set[str] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; runs go on."""
        for outcome in self._open:
            outcome.cancel()
        await self._channel.close()

    def create_workflow(self, name: str = "") -> AsyncLatticeWorkflow:
        """Return an empty workflow; nothing is sent."""
        return AsyncLatticeWorkflow(self, name)

    async def run(
        self,
        graph: Graph[Any],
        run_id: str = "",
        *,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncRun:
        """Send the whole graph and start a run. Raises RequestError."""
        # An id of our own makes the call safe to repeat when its answer is lost.
        request = workflow_pb2.RunWorkflowRequest(
            run_id=run_id or f"run-{uuid4().hex}", labels=labels or {}, priority=priority
        )
        if timeout is not None:
            request.timeout.FromNanoseconds(int(timeout * 1e9))
        return await self._with_code(lambda: self._start(request, graph))

    async def run_task(self, task: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run one task as a run of its own and return its outputs. Raises TaskFailedError, RequestError."""
        graph: Graph[Any] = Graph(None)
        added = graph.add_task(task, inputs)
        function, bundle = added.definition.code
        request = task_pb2.RunTaskRequest(run_id=f"run-{uuid4().hex}", wait=_seconds(WAIT_S))
        request.task.CopyFrom(await convert.task_of(added, "", self._upload))

        async def call() -> task_pb2.RunTaskResponse:
            if function.digest in self._known_code:
                request.function.digest = function.digest
            else:
                request.function.CopyFrom(function)
                if bundle is not None:
                    request.bundle.CopyFrom(bundle)
            try:
                return await self._tasks.RunTask(request)
            except grpc.aio.AioRpcError as error:
                raise errors.from_rpc(error) from None

        response = await self._with_code(call)
        self._known_code.add(function.digest)
        if response.run.state == run_pb2.RUN_STATE_SUCCEEDED:
            return {name: await self.decode(payload) for name, payload in response.task.outputs.items()}
        return await self.result(response.run.run_id)

    async def _with_code(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call that leaves out code the server has; with it, when the server has forgotten some."""
        try:
            return await call()
        except errors.PreconditionError as error:
            if error.reason != "FUNCTION_MISSING" or not self._known_code:
                raise
        self._known_code.clear()
        return await call()

    async def _start(self, request: workflow_pb2.RunWorkflowRequest, graph: Graph[Any]) -> AsyncRun:
        try:
            if graph.workflow_id and not graph.tasks:
                request.workflow_id = graph.workflow_id
            else:
                request.workflow.CopyFrom(await convert.spec_of(graph, self._upload, self._known_code))
            if len(self._open) >= MAX_OPEN_CALLS:
                run, outcome = (await self._workflows.RunWorkflow(request)).run, None
            else:
                run, outcome = await self._execute(request)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None
        self._known_code.update(function.digest for function in request.workflow.functions.values())
        return AsyncRun.of(run.run_id, self, outcome)

    async def _execute(self, request: workflow_pb2.RunWorkflowRequest) -> tuple[run_pb2.Run, Outcome]:
        """Start a run by a call that ends with the run and brings its result."""
        execute = workflow_pb2.ExecuteWorkflowRequest(run=request, result_only=True)
        call = self._workflows.ExecuteWorkflow(execute)
        first = await call.read()
        assert isinstance(first, workflow_pb2.ExecuteWorkflowResponse), "the server answers before it ends the call"
        outcome = asyncio.create_task(_last(call))
        self._open.add(outcome)
        outcome.add_done_callback(self._open.discard)
        return first.run, outcome

    async def result(self, run_id: str, outcome: Outcome | None = None) -> dict[str, Any]:
        """Wait for a run's end and return the outputs of its final tasks; see `AsyncRun.result`."""
        response: results_pb2.GetResultResponse | workflow_pb2.ExecuteWorkflowResponse | None = None
        if outcome is not None and not outcome.cancelled():
            response = await asyncio.shield(outcome)
        if response is None:
            response = await self._get_result(run_id)
        if (failed := convert.error_of(response.run)) is not None:
            raise failed
        found = {
            task.task_id: {name: await self.decode(payload) for name, payload in task.outputs.items()}
            for task in response.final_tasks
        }
        return next(iter(found.values())) if len(found) == 1 else found

    async def _get_result(self, run_id: str) -> results_pb2.GetResultResponse:
        request = results_pb2.GetResultRequest(run_id=run_id, wait=_seconds(WAIT_S))
        try:
            response = await self._results.GetResult(request)
            while response.run.state not in TERMINAL:
                response = await self._results.GetResult(request)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None
        return response

    async def events(
        self, run_id: str, after: int = 0, decode: convert.Decode | None = None
    ) -> AsyncIterator[RunEvent]:
        """Yield a run's events after number `after`, each once, to its end. Raises RequestError.

        `decode` reads the outputs in place of the method of that name, for readers that want less of them.
        """
        backoff_s = MIN_BACKOFF_S
        while True:
            try:
                call = self._results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id, after_sequence=after))
                async for response in call:
                    for message in response.events:
                        yield await convert.event_of(message, decode or self.decode)
                    after, backoff_s = response.sequence, MIN_BACKOFF_S
                    if response.complete:
                        return
            except grpc.aio.AioRpcError as error:
                if error.code() not in RESUMABLE:
                    raise errors.from_rpc(error) from None
            # Spread, so that a server that comes back does not meet all its readers at once.
            await asyncio.sleep(random.uniform(0, backoff_s))
            backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)

    async def get_run(self, run_id: str) -> run_pb2.Run:
        """Return a run as it is now. Raises NotFoundError."""
        try:
            return (await self._workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id))).run
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def list_runs(self, limit: int = 100) -> list[run_pb2.Run]:
        """Return the newest runs."""
        try:
            response = await self._workflows.ListRuns(workflow_pb2.ListRunsRequest(page_size=limit))
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None
        return list(response.runs)

    async def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        try:
            request = workflow_pb2.CancelRunRequest(run_id=run_id, reason=reason)
            return (await self._workflows.CancelRun(request)).run
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def list_tasks(self, run_id: str) -> list[run_pb2.TaskRun]:
        """Return a run's tasks as they are now, in the order of their definition. Raises NotFoundError."""
        request = task_pb2.ListTasksRequest(run_id=run_id)
        found: list[run_pb2.TaskRun] = []
        try:
            while True:
                response = await self._tasks.ListTasks(request)
                found.extend(response.tasks)
                request.page_token = response.next_page_token
                if not request.page_token:
                    return found
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def nodes(self) -> list[worker_pb2.Node]:
        """Return the nodes in the ledger."""
        try:
            return list((await self._workers.ListNodes(worker_pb2.ListNodesRequest())).nodes)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def cluster(self) -> worker_pb2.GetClusterResponse:
        """Return facts about the server and its cluster."""
        try:
            return await self._workers.GetCluster(worker_pb2.GetClusterRequest())
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def decode(self, payload: payload_pb2.Payload) -> Any:
        """Return a payload's value; a large one is fetched."""
        match payload.WhichOneof("content"):
            case "json":
                return payloads.decode(payload.media_type, payload.json.encode())
            case "data":
                return payloads.decode(payload.media_type, payload.data)
            case _:
                data = bytearray()
                request = results_pb2.ReadArtifactRequest(artifact_id=payload.artifact.artifact_id)
                try:
                    async for chunk in self._results.ReadArtifact(request):
                        data += chunk.data
                except grpc.aio.AioRpcError as error:
                    raise errors.from_rpc(error) from None
                return payloads.decode(payload.media_type, data)

    async def _upload(self, data: bytes) -> payload_pb2.Artifact:
        async def chunks() -> AsyncIterator[results_pb2.WriteArtifactRequest]:
            for start in range(0, len(data), CHUNK_BYTES):
                yield results_pb2.WriteArtifactRequest(data=data[start : start + CHUNK_BYTES])

        return (await self._results.WriteArtifact(chunks())).artifact


async def _last(call: Any) -> workflow_pb2.ExecuteWorkflowResponse | None:
    try:
        last = await call.read()
    except grpc.aio.AioRpcError:
        return None
    return last if isinstance(last, workflow_pb2.ExecuteWorkflowResponse) else None


def _abandon(outcome: Outcome) -> None:
    loop = outcome.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(outcome.cancel)


def _seconds(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
