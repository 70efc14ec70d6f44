"""Owns the client for asyncio. Rule: each method is one call of a part of `RunApi`.

The synchronous client runs the same coroutines over calls that block.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Never, NoReturn, Self, Unpack

from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client.convert.events import RunEvent, message_of
from lattice_client.graph.environment import Env, checked
from lattice_client.graph.names import check_text
from lattice_client.graph.nodes import LatticeTask, tasks_in
from lattice_client.graph.outputs import Scope
from lattice_client.graph.settings import RunSettings, TaskRunSettings, disconnect_grace_s
from lattice_client.graph.workflow import Graph, single
from lattice_client.runs.api import RunApi
from lattice_client.runs.decoding import decoded
from lattice_client.runs.open_run import AsyncOpenRun, Opening, OpenRunRequest
from lattice_client.runs.questions import OnQuestion
from lattice_client.runs.run import AsyncRun
from lattice_client.runs.submission import ADMISSION_TIMEOUT_S
from lattice_client.runs.tracebacks import shorten
from lattice_client.services.calls import AsyncServices
from lattice_client.services.llms import AsyncLlms
from lattice_client.transport.channel import Channel, dial
from lattice_client.transport.security import Security, SecurityOptions
from lattice_client.transport.suspending import AsyncChannel


@shorten
class AsyncLatticeWorkflow(Graph["AsyncLatticeClient"]):
    """A workflow that the user builds, for asyncio."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.workflow_id!r}, tasks: {len(self.tasks)}>"

    async def run(self, run_id: str = "", **settings: Unpack[RunSettings]) -> AsyncRun:
        """Send the whole graph and start a run; see `RunSettings`. Raises TaskDefinitionError, RequestError."""
        return await self.client.run(self, run_id, **settings)

    async def store(self, workflow_id: str = "") -> Self:
        """Store the workflow on the server; return the stored one. See `LatticeWorkflow.store`."""
        return type(self)(self.client, workflow_id=await self.client.api.starter.store(self, workflow_id))

    async def get_results(
        self, run_id: str, verbose: bool = True, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the messages of a run up to its end; print them as they arrive when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages = []
        async with self.client.api.reader.limited(run_id, timeout):
            async for message in self.messages(run_id):
                messages.append(message)
                if verbose:
                    print(message)
        return messages

    async def messages(self, run_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of `get_results` as they arrive."""
        async for event in self.client.events(run_id):
            message = message_of(event, self.workflow_id, run_id)
            if message is not None:
                yield message


def dial_for(tenant: str, target: str | None, **security: Unpack[SecurityOptions]) -> Security:
    """Return how to connect to a server for a tenant. Raises as `dial`, and TaskDefinitionError."""
    check_text("the tenant of a client", tenant)
    return dial(target, tenant, **security)


@shorten
class AsyncLatticeClient:
    """A connection to a server, for any number of event loops. Use it as a context manager or with `close`.

    `tenant` is the tenant of all that it starts, and the only one whose runs and services it finds; without it, a
    client without a token finds those of all tenants. While the server has too much work, a run is submitted again for
    `admission_timeout` seconds; then ResourceExhaustedError is raised. With `trust_pickles` it unpickles values of
    sandboxed tasks, by which such a task can run code in this process. `env` has environment variables of all its
    tasks, as for `@task`. `SecurityOptions` describes the other arguments.
    The client connects with the first call. Raises TargetError when the target is not an address, SecurityError when
    the connection would not be secure.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        tenant: str = "",
        admission_timeout: float = ADMISSION_TIMEOUT_S,
        trust_pickles: bool = False,
        env: Env | None = None,
        **security: Unpack[SecurityOptions],
    ) -> None:
        self._use(AsyncChannel(dial_for(tenant, target, **security)), admission_timeout, trust_pickles, env)

    @classmethod
    def over(cls, channel: Channel, admission_timeout: float, trust_pickles: bool, env: Env | None = None) -> Self:
        """Return a client over a channel."""
        client = cls.__new__(cls)
        client._use(channel, admission_timeout, trust_pickles, env)
        return client

    def _use(self, channel: Channel, admission_timeout: float, trust_pickles: bool, env: Env | None) -> None:
        self.target = channel.target
        self.api = RunApi.over(channel, admission_timeout, trust_pickles, checked("the client", env))
        self.services = AsyncServices(channel)
        self.llm = AsyncLlms(channel)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.target}{', closed' if self.api.channel.is_closed else ''}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled: a task that needs a client must create one")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; runs continue."""
        await self.api.channel.close()

    def shut(self) -> None:
        """Close the connections of all event loops, from any thread."""
        self.api.channel.shut()

    def create_workflow(
        self, name: str = "", failure_policy: str = "fail_fast", *, env: Env | None = None
    ) -> AsyncLatticeWorkflow:
        """Return an empty workflow; nothing is sent. See `LatticeClient.create_workflow`."""
        return AsyncLatticeWorkflow(self, name, failure_policy=failure_policy, env=env)

    def get_workflow(self, workflow_id: str) -> AsyncLatticeWorkflow:
        """Return a workflow that is stored on the server, to run it by its id."""
        return AsyncLatticeWorkflow(self, workflow_id=workflow_id)

    async def get_run(self, run_id: str) -> AsyncRun:
        """Return a run by its id. Raises NotFoundError."""
        await self.describe_run(run_id)
        return AsyncRun.of(run_id, self.api)

    async def get_ray_head_port(self) -> int:
        """Return the port of the server's Ray head; zero without Ray."""
        return int((await self.server_info()).ray_address.rpartition(":")[2] or 0)

    async def run(self, graph: Graph[Any], run_id: str = "", **settings: Unpack[RunSettings]) -> AsyncRun:
        """Send the whole graph and start a run.

        Args:
            graph: the workflow.
            run_id: the id of the run; a repeated call with the same id and content returns the same run.
            settings: see `RunSettings`.

        Raises:
            TaskDefinitionError: a setting, a task or its wiring is wrong; nothing was sent.
            RequestError: the server refused it.
        """
        started = await self.api.starter.run(graph, run_id, **settings)
        run = AsyncRun.of(started.run_id, self.api, started.execution)
        run.grace_s = disconnect_grace_s(settings.get("cancel_on_disconnect", False))
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
        """Open a run that accepts tasks until it is closed: `async with client.open_run() as run`, or `await` it.

        The server cancels the run when this client is disconnected for longer than `Limits.open_run_grace`, by default
        30 s; `cancel_on_disconnect` sets another time.

        Args:
            name: the display name of the run.
            on_question: answers the questions that tasks ask with `context.ask`. It is called with each `Question`, in
                an asyncio task of its own. Its return value, or that of its coroutine, is the answer; its exception is
                sent to the task. Without it, `run.questions()` yields the questions.
            failure_policy: with `finish_independent` a failed task stops only the tasks that depend on it; with
                `fail_fast` it stops the run.
            run_id: the id of the run; a call with the id and settings of an open run replaces its stream.
            settings: see `TaskRunSettings`.

        Raises:
            TaskDefinitionError: a setting is wrong; nothing was sent.
            RequestError: the server refused it.
        """
        graph: Graph[None] = Graph(None, name, failure_policy=failure_policy)
        request = OpenRunRequest(graph, on_question, run_id, settings)
        return Opening(lambda: AsyncOpenRun.open(self.api, request, is_answered_by_tasks=True))

    async def run_task(
        self,
        task: Any,
        inputs: Mapping[str, Any] | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cancel_on_disconnect: bool | float = False,
        trust_pickles: bool = False,
        **misplaced: Never,
    ) -> dict[str, Any]:
        """Run one task as a run of its own and return its outputs.

        `labels`, `priority`, `timeout` and `cancel_on_disconnect` are the settings of the run; see `TaskRunSettings`.
        `trust_pickles` is as for the client.

        Raises TaskDefinitionError, TaskFailedError, RunTimeoutError, RequestError.
        """
        added = single(task, inputs, misplaced)
        settings: TaskRunSettings = {"labels": labels, "priority": priority, "timeout": timeout}
        settings["cancel_on_disconnect"] = cancel_on_disconnect
        response = await self.api.starter.run_task(added, **settings)
        found: dict[str, Any] = decoded(await self.api.reader.outcome_of(response, added), trust_pickles)
        return found

    async def add_tasks(self, run_id: str, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks to a running run; return its new revision. See `AsyncRun.add_tasks`."""
        if isinstance(run_id, AsyncRun):
            return await run_id.add_tasks(tasks, expected_revision)
        scope = Scope(lambda output: True, {task.task_id for task in tasks_in(tasks)})
        return await self.api.starter.add_tasks(run_id, tasks, scope, expected_revision)

    async def events(self, run_id: str, after: int = 0) -> AsyncIterator[RunEvent]:
        """Yield a run's events after number `after`, each once, to its end.

        Raises:
            NotFoundError: there is no such run.
            UnavailableError: the server could not be reached for 30 s.
        """
        async for event in self.api.reader.fetched_events(run_id, after):
            yield decoded(event)

    async def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run in its present state. Raises NotFoundError."""
        return await self.api.calls.describe_run(run_id)

    async def list_runs(
        self, limit: int = 100, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> list[run_pb2.Run]:
        """Return the newest runs that are in one of `states`, such as `"failed"`, and have all `labels`.

        Raises InvalidArgumentError.
        """
        return await self.api.calls.list_runs(limit, states, labels)

    async def list_workflows(self) -> list[workflow_pb2.Workflow]:
        """Return the stored workflows, newest first, without their tasks."""
        return await self.api.calls.list_workflows()

    async def delete_workflow(self, workflow_id: str) -> None:
        """Delete a stored workflow; its runs keep their copies. Raises NotFoundError."""
        await self.api.calls.delete_workflow(workflow_id)

    async def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """Return a run's tasks in their present state, in the order of their definition.

        Outputs and tracebacks are left out, unless `with_outputs`. Raises NotFoundError.
        """
        return await self.api.reader.list_tasks(run_id, with_outputs)

    async def run_graph(self, run_id: str) -> list[workflow_pb2.GraphTask]:
        """Return a run's tasks in the order of their definition, with their dependencies. Raises NotFoundError."""
        return await self.api.calls.run_graph(run_id)

    async def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task is queued or not ready. Raises NotFoundError."""
        return await self.api.calls.explain(run_id, task_id)

    async def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        return await self.api.calls.cancel_run(run_id, reason)

    async def delete_run(self, run_id: str) -> None:
        """Delete a run that has ended. Raises NotFoundError, and PreconditionError when the run has not ended."""
        await self.api.calls.delete_run(run_id)

    async def signal_run(self, run_id: str, name: str, value: Any = None) -> None:
        """Send a signal to a run. Raises NotFoundError, and the errors of `AsyncRun.signal`."""
        await self.api.calls.signal_run(run_id, name, value)

    async def retry_run(self, run_id: str, new_run_id: str = "", *, secrets: Sequence[str] = ()) -> AsyncRun:
        """Start a run that takes the outputs of the succeeded tasks of an ended run, and runs its other tasks.

        It has the same workflow, parameters and settings. The values of its secrets ended with it. Sent again are the
        secrets in the `env` of this client, and the variables of this process that `secrets` names.

        Raises NotFoundError, PreconditionError when the run has not ended, and InvalidArgumentError when a secret is
        missing.
        """
        given = self.api.starter.secrets_again(None, (), secrets)
        return AsyncRun.of(await self.api.calls.retry_run(run_id, new_run_id, given), self.api)

    async def cancel_task(self, run_id: str, task_id: str) -> run_pb2.TaskRun:
        """Cancel one task of a run. Raises NotFoundError."""
        return await self.api.calls.cancel_task(run_id, task_id)

    async def nodes(self) -> list[cluster_pb2.Node]:
        """Return the nodes of the cluster."""
        return await self.api.calls.nodes()

    async def drain_node(self, node_id: str, deadline: float | None = None) -> cluster_pb2.Node:
        """Let a node finish its attempts and leave; after `deadline` seconds the others move to other nodes.

        Returns the node in its present state. Raises NotFoundError.
        """
        return await self.api.calls.drain_node(node_id, deadline)

    async def server_info(self) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits and load."""
        return await self.api.calls.server_info()
