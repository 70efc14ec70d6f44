"""Owns the calls of a server, for asyncio. The synchronous client runs the same over calls that block.

Rule: work is sent by `starting`, and followed by `reading`; here are the calls of one answer.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Never, NoReturn, Self, Unpack
from uuid import uuid4

from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client.convert import graphs
from lattice_client.convert.graphs import RunEvent
from lattice_client.graph.outputs import Scope
from lattice_client.graph.settings import RunSettings, TaskRunSettings
from lattice_client.graph.workflow import Graph, LatticeTask, single
from lattice_client.runs.decoding import opened
from lattice_client.runs.open_run import AsyncOpenRun, Opening
from lattice_client.runs.open_stream import Hold
from lattice_client.runs.questions import OnQuestion
from lattice_client.runs.reader import PAGE_SIZE, Reader
from lattice_client.runs.run import AsyncRun
from lattice_client.runs.submission import ADMISSION_TIMEOUT_S, Starter
from lattice_client.transport.artifacts import Transfer
from lattice_client.transport.channel import Channel, dial
from lattice_client.transport.requests import made
from lattice_client.transport.security import SecurityOptions
from lattice_client.transport.suspending import AsyncChannel


class AsyncLatticeWorkflow(Graph["AsyncLatticeClient"]):
    """A workflow being written, for asyncio."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.workflow_id!r}, tasks: {len(self.tasks)}>"

    async def run(self, run_id: str = "", **settings: Unpack[RunSettings]) -> AsyncRun:
        """Send the whole graph and start a run; see `RunSettings`. Raises TaskDefinitionError, RequestError."""
        return await self.client.run(self, run_id, **settings)

    async def store(self, workflow_id: str = "") -> Self:
        """Store the workflow on the server; return the stored one. See `LatticeWorkflow.store`."""
        return type(self)(self.client, workflow_id=await self.client.store(self, workflow_id))

    async def get_results(
        self, run_id: str, verbose: bool = True, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """Follow a run to its end and return its messages, printing them when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages = []
        async with self.client.reader.limited(run_id, timeout):
            async for message in self.messages(run_id):
                messages.append(message)
                if verbose:
                    print(message)
        return messages

    async def messages(self, run_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages `get_results` returns, as they come."""
        async for event in self.client.events(run_id):
            message = graphs.message_of(event, self.workflow_id, run_id)
            if message is not None:
                yield message


class AsyncLatticeClient:
    """A connection to a server, for any number of event loops. Use it as a context manager or with `close`.

    `tenant` names the caller that fair share counts; `admission_timeout` is for how many seconds a run that finds the
    server full is offered again before `ResourceExhaustedError` is raised. The rest makes the connection safe; see
    `SecurityOptions`. Connects with the first call. Raises TargetError when the target is no address, SecurityError
    when the connection would not be safe.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        tenant: str = "",
        admission_timeout: float = ADMISSION_TIMEOUT_S,
        **security: Unpack[SecurityOptions],
    ) -> None:
        self._use(AsyncChannel(dial(target, **security)), tenant, admission_timeout)

    @classmethod
    def over(cls, channel: Channel, tenant: str, admission_timeout: float) -> Self:
        """Return a client whose calls go by a channel."""
        client = cls.__new__(cls)
        client._use(channel, tenant, admission_timeout)
        return client

    def _use(self, channel: Channel, tenant: str, admission_timeout: float) -> None:
        self._rpc = channel
        self.target = channel.target
        self.transfer = Transfer(channel)
        self.starter = Starter(channel, self.transfer, tenant, admission_timeout)
        self.reader = Reader(channel, self.transfer)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.target}{', closed' if self._rpc.is_closed else ''}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled: a task that needs a client makes one of its own")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; runs go on."""
        self.starter.close()
        await self._rpc.close()

    def shut(self) -> None:
        """As `close`, for all event loops, from a thread that needs to run none."""
        self.starter.close()
        self._rpc.shut()

    def now(self) -> float:
        """Return the time on the clock that its time limits go by, in seconds."""
        return self._rpc.now()

    def create_workflow(self, name: str = "", failure_policy: str = "fail_fast") -> AsyncLatticeWorkflow:
        """Return an empty workflow; nothing is sent. See `LatticeClient.create_workflow`."""
        return AsyncLatticeWorkflow(self, name, failure_policy=failure_policy)

    def get_workflow(self, workflow_id: str) -> AsyncLatticeWorkflow:
        """Return a workflow stored on the server, to be run by its id."""
        return AsyncLatticeWorkflow(self, workflow_id=workflow_id)

    async def get_run(self, run_id: str) -> AsyncRun:
        """Return a run to follow. Raises NotFoundError."""
        await self.describe_run(run_id)
        return AsyncRun.of(run_id, self)

    async def get_ray_head_port(self) -> int:
        """Return the port of the server's Ray head; zero without Ray."""
        return int((await self.server_info()).ray_address.rpartition(":")[2] or 0)

    # Starting.

    async def run(self, graph: Graph[Any], run_id: str = "", **settings: Unpack[RunSettings]) -> AsyncRun:
        """Send the whole graph and start a run.

        Args:
            graph: the workflow.
            run_id: names the run; the same id with the same content is the same run.
            settings: see `RunSettings`.

        Raises:
            TaskDefinitionError: a setting, a task or its wiring is wrong; nothing was sent.
            RequestError: the server refused it.
        """
        started = await self.starter.run(graph, run_id, **settings)
        run = AsyncRun.of(started.run_id, self, started.call)
        run.note_graph(graph)
        return run

    def open_run(
        self,
        name: str = "",
        *,
        on_question: OnQuestion | None = None,
        failure_policy: str = "finish_independent",
        run_id: str = "",
        **settings: Unpack[TaskRunSettings],
    ) -> Opening:
        """Open a run that tasks are added to as it goes: `async with client.open_run() as run`, or `await` it.

        It is cancelled when this client is away from the server for longer than `Limits.open_run_grace`, 30 s unless
        the server is set otherwise.

        Args:
            name: of the run, for people.
            on_question: answers what tasks ask with `context.ask`: called with each `Question`, in a task of its own;
                what it returns, or its coroutine does, is the answer, and what it raises the task is told. Without it
                questions are to be had of `run.questions()`.
            failure_policy: with `finish_independent` a failed task stops only what needs it; with `fail_fast` the run.
            run_id: names the run; the same id and settings again take the run over.
            settings: see `TaskRunSettings`.

        Raises:
            TaskDefinitionError: a setting is wrong; nothing was sent.
            RequestError: the server refused it.
        """
        graph: Graph[None] = Graph(None, name, failure_policy=failure_policy)
        return Opening(lambda: self.opened(graph, on_question, run_id, settings, is_served_apart=True))

    async def opened(
        self,
        graph: Graph[None],
        on_question: OnQuestion | None,
        run_id: str,
        settings: TaskRunSettings,
        *,
        is_served_apart: bool,
    ) -> AsyncOpenRun:
        """Return a run that is open; see `open_run`. Its questions are served apart, or while its caller waits."""
        request = await self.starter.opening(graph, run_id, settings)
        limits = await self._rpc.limits()
        grace_s = limits.open_run_grace.ToNanoseconds() / 1e9
        hold = Hold(self._rpc, workflow_pb2.OpenRunOpening(run=request), grace_s)
        return await AsyncOpenRun.opened(
            self, hold, limits, on_question, self._rpc.steps, is_served_apart=is_served_apart
        )

    async def run_task(
        self,
        task: Any,
        inputs: Mapping[str, Any] | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **misplaced: Never,
    ) -> dict[str, Any]:
        """Run one task as a run of its own and return its outputs.

        The run has `labels` to find it by; among this caller's waiting tasks, higher `priority` goes first; it fails
        when it takes longer than `timeout` seconds.

        Raises TaskDefinitionError, TaskFailedError, RunTimeoutError, RequestError.
        """
        added = single(task, inputs, misplaced)
        response = await self.starter.run_task(added, labels=labels, priority=priority, timeout=timeout)
        found: dict[str, Any] = opened(await self.reader.outcome_of(response, added))
        return found

    async def store(self, graph: Graph[Any], workflow_id: str) -> str:
        """Store a workflow; return its id. See `AsyncLatticeWorkflow.store`."""
        return await self.starter.store(graph, workflow_id)

    async def add_tasks(self, run_id: str, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks to a run that goes on; return its revision. See `AsyncRun.add_tasks`."""
        ids = {task.task_id for task in tasks}
        scope = run_id.scope(tasks) if isinstance(run_id, AsyncRun) else Scope(lambda output: True, ids)
        return await self.starter.add_tasks(run_id, tasks, scope, expected_revision)

    # Following.

    async def events(self, run_id: str, after: int = 0) -> AsyncIterator[RunEvent]:
        """Yield a run's events after number `after`, each once, to its end.

        Raises:
            NotFoundError: there is no such run.
            UnavailableError: the server could not be reached for `following.RECONNECT_S`.
        """
        async for event in self.reader.fetched_events(run_id, after):
            yield opened(event)

    # Looking, and ending.

    async def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run as it is now. Raises NotFoundError."""
        request = made(workflow_pb2.GetRunRequest, run_id=run_id, view=run_pb2.VIEW_FULL)
        return (await self._rpc.call(self._rpc.workflows.GetRun, request)).run

    async def list_runs(
        self, limit: int = 100, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> list[run_pb2.Run]:
        """Return the newest runs: those in one of `states`, such as `"failed"`, that have all `labels`.

        Raises InvalidArgumentError.
        """
        numbers = [graphs.run_state(state) for state in states]
        request = made(workflow_pb2.ListRunsRequest, page_size=min(limit, PAGE_SIZE), states=numbers, labels=labels)
        found: list[run_pb2.Run] = []
        while True:
            response = await self._rpc.call(self._rpc.workflows.ListRuns, request)
            found.extend(response.runs)
            request.page_token = response.next_page_token
            if not request.page_token or len(found) >= limit:
                return found[:limit]

    async def list_workflows(self) -> list[workflow_pb2.Workflow]:
        """Return the stored workflows, newest first, without their tasks."""
        request = workflow_pb2.ListWorkflowsRequest(page_size=PAGE_SIZE)
        found: list[workflow_pb2.Workflow] = []
        while True:
            response = await self._rpc.call(self._rpc.workflows.ListWorkflows, request)
            found.extend(response.workflows)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def delete_workflow(self, workflow_id: str) -> None:
        """Delete a stored workflow; its runs keep their copies. Raises NotFoundError."""
        request = made(workflow_pb2.DeleteWorkflowRequest, workflow_id=workflow_id)
        await self._rpc.call(self._rpc.workflows.DeleteWorkflow, request)

    async def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """Return a run's tasks as they are now, in the order of their definition.

        Outputs, and the tracebacks of failures, are left out unless they are asked for. Raises NotFoundError.
        """
        return await self.reader.list_tasks(run_id, with_outputs)

    async def run_graph(self, run_id: str) -> list[workflow_pb2.GraphTask]:
        """Return a run's tasks in the order of their definition, each with those it waits for. Raises NotFoundError."""
        request = made(workflow_pb2.GetRunGraphRequest, run_id=run_id, page_size=PAGE_SIZE)
        found: list[workflow_pb2.GraphTask] = []
        while True:
            response = await self._rpc.call(self._rpc.workflows.GetRunGraph, request)
            found.extend(response.tasks)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits. Raises NotFoundError."""
        request = made(task_pb2.ExplainTaskRequest, run_id=run_id, task_id=task_id)
        return await self._rpc.call(self._rpc.tasks.ExplainTask, request)

    async def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        request = made(workflow_pb2.CancelRunRequest, run_id=run_id, reason=reason, request_id=uuid4().hex)
        return (await self._rpc.call(self._rpc.workflows.CancelRun, request)).run

    async def retry_run(self, run_id: str, new_run_id: str = "") -> AsyncRun:
        """Start a run that takes over the finished tasks of one that has ended, and runs the others.

        It has the same workflow, parameters and settings.

        Raises NotFoundError, and PreconditionError when the run has not ended.
        """
        new_run_id = new_run_id or f"run-{uuid4().hex}"
        request = made(workflow_pb2.RetryRunRequest, run_id=run_id, new_run_id=new_run_id)
        found = await self._rpc.call(self._rpc.workflows.RetryRun, request)
        return AsyncRun.of(found.run.run_id, self)

    async def cancel_task(self, run_id: str, task_id: str) -> run_pb2.TaskRun:
        """Cancel one task of a run. Raises NotFoundError."""
        request = made(task_pb2.CancelTaskRequest, run_id=run_id, task_id=task_id, request_id=uuid4().hex)
        return (await self._rpc.call(self._rpc.tasks.CancelTask, request)).task

    async def nodes(self) -> list[cluster_pb2.Node]:
        """Return the nodes in the ledger."""
        request = cluster_pb2.ListNodesRequest(page_size=PAGE_SIZE)
        found: list[cluster_pb2.Node] = []
        while True:
            response = await self._rpc.call(self._rpc.cluster.ListNodes, request)
            found.extend(response.nodes)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def drain_node(self, node_id: str, deadline: float | None = None) -> cluster_pb2.Node:
        """Let a node finish what it runs and leave; what still runs after `deadline` seconds moves to other nodes.

        Returns the node as it is now. Raises NotFoundError.
        """
        request = made(cluster_pb2.DrainNodeRequest, node_id=node_id, request_id=uuid4().hex)
        if deadline is not None:
            request.deadline.FromNanoseconds(int(deadline * 1e9))
        return (await self._rpc.call(self._rpc.cluster.DrainNode, request)).node

    async def server_info(self) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits and load."""
        return await self._rpc.call(self._rpc.cluster.GetServerInfo, cluster_pb2.GetServerInfoRequest())
