"""Owns the synchronous client. Rule: each method runs the coroutine of the asyncio client in the caller's thread."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Never, NoReturn, Self, Unpack

from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.client import AsyncLatticeClient, dial_for
from lattice_client.convert.events import message_of
from lattice_client.graph.environment import Env
from lattice_client.graph.settings import RunSettings, TaskRunSettings
from lattice_client.graph.workflow import Graph
from lattice_client.runs.decoding import decoded
from lattice_client.runs.driver import blocking, iterate
from lattice_client.runs.open_run import AsyncOpenRun, OpenRunRequest
from lattice_client.runs.questions import OnQuestion
from lattice_client.runs.submission import ADMISSION_TIMEOUT_S
from lattice_client.runs.sync_run import OpenRun, Run
from lattice_client.services.blocking import Services
from lattice_client.services.llms import Llms
from lattice_client.transport.blocking import BlockingChannel
from lattice_client.transport.security import SecurityOptions
from lattice_client.transport.suspending import AsyncChannel


class LatticeWorkflow(Graph["LatticeClient"]):
    """A workflow that the user builds. Nothing is sent before `run`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.workflow_id!r}, tasks: {len(self.tasks)}>"

    def run(self, run_id: str = "", **settings: Unpack[RunSettings]) -> Run:
        """Send the whole graph and start a run; see `RunSettings`. Raises TaskDefinitionError, RequestError."""
        return Run.of(blocking(self.client.twin.run(self, run_id, **settings)))

    def store(self, workflow_id: str = "") -> Self:
        """Store the workflow on the server, for `LatticeClient.get_workflow` in any client; return the stored workflow.

        Without an id a new one is chosen. A repeated call with the same id and content stores it once.

        Raises TaskDefinitionError, AlreadyExistsError when the id is taken by other content, RequestError.
        """
        return type(self)(self.client, workflow_id=blocking(self.client.twin.api.starter.store(self, workflow_id)))

    def get_results(self, run_id: str, verbose: bool = True, timeout: float | None = None) -> list[dict[str, Any]]:
        """Return the messages of a run up to its end; print them as they arrive when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages, api = [], self.client.twin.api
        for event in iterate(api, api.reader.fetched_events(run_id), run_id, timeout):
            message = message_of(decoded(event), self.workflow_id, run_id)
            if message is None:
                continue
            messages.append(message)
            if verbose:
                print(message)
        return messages


class LatticeClient:
    """A connection to a server, for any number of threads. `aio` is an asyncio client of the same server.

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
        self._dialled = dial_for(tenant, target, **security)
        self.target = self._dialled.address
        self._settings = admission_timeout, trust_pickles, env
        # An asyncio client over calls that block; `blocking` runs its coroutines.
        self.twin = AsyncLatticeClient.over(BlockingChannel(self._dialled), *self._settings)

    @functools.cached_property
    def services(self) -> Services:
        """The services of the server: programs that serve requests until they are stopped."""
        return Services(self.twin.services)

    @functools.cached_property
    def llm(self) -> Llms:
        """The language models of the server."""
        return Llms(self.twin.llm)

    @functools.cached_property
    def aio(self) -> AsyncLatticeClient:
        """An asyncio client of the same server, with a connection of its own."""
        return AsyncLatticeClient.over(AsyncChannel(self._dialled), *self._settings)

    def __repr__(self) -> str:
        return repr(self.twin).replace("Async", "", 1)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled: a task that needs a client must create one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; runs continue. In a forked process, and when the interpreter exits, it does nothing."""
        with suppress(errors.ClientClosedError, errors.ForkError):
            blocking(self.twin.close())
        if "aio" in self.__dict__:
            self.aio.shut()

    def create_workflow(
        self, name: str = "", failure_policy: str = "fail_fast", *, env: Env | None = None
    ) -> LatticeWorkflow:
        """Return an empty workflow; nothing is sent.

        When a task fails, `fail_fast` stops the run; `finish_independent` stops only the tasks that depend on it. `env`
        has environment variables of all its tasks, as for `@task`; those of a task come before them.
        """
        return LatticeWorkflow(self, name, failure_policy=failure_policy, env=env)

    def get_workflow(self, workflow_id: str) -> LatticeWorkflow:
        """Return a workflow that is stored on the server, to run it by its id."""
        return LatticeWorkflow(self, workflow_id=workflow_id)

    def get_run(self, run_id: str) -> Run:
        """Return a run by its id. Raises NotFoundError."""
        return Run.of(blocking(self.twin.get_run(run_id)))

    def get_ray_head_port(self) -> int:
        """Return the port of the server's Ray head; zero without Ray."""
        return blocking(self.twin.get_ray_head_port())

    def run_task(
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
        """Run one task as a run of its own and return its outputs; see `AsyncLatticeClient.run_task`.

        Raises TaskDefinitionError, TaskFailedError, RunTimeoutError, RequestError.
        """
        settings: Any = {"labels": labels, "priority": priority, "timeout": timeout, "trust_pickles": trust_pickles}
        settings["cancel_on_disconnect"] = cancel_on_disconnect
        return blocking(self.twin.run_task(task, inputs, **settings, **misplaced))

    def open_run(
        self,
        name: str = "",
        *,
        on_question: OnQuestion | None = None,
        failure_policy: str = "finish_independent",
        run_id: str = "",
        **settings: Unpack[TaskRunSettings],
    ) -> OpenRun:
        """Open a run that accepts tasks until it is closed: `with client.open_run() as run`.

        The server cancels the run when this client is disconnected for longer than `Limits.open_run_grace`, by default
        30 s; `cancel_on_disconnect` sets another time.

        Args:
            name: the display name of the run.
            on_question: answers the questions that tasks ask with `context.ask`. It is called with each `Question`, in
                a thread that waits in a method of the run. Its return value is the answer; its exception is sent to the
                task. Without it, `run.questions()` yields the questions.
            failure_policy: with `finish_independent` a failed task stops only the tasks that depend on it; with
                `fail_fast` it stops the run.
            run_id: the id of the run; a call with the id and settings of an open run replaces its stream.
            settings: see `TaskRunSettings`.

        Raises:
            TaskDefinitionError: a setting is wrong; nothing was sent.
            RequestError: the server refused it.
        """
        if inspect.iscoroutinefunction(on_question):
            raise errors.TaskDefinitionError("on_question must be a plain function; coroutines need client.aio")
        graph: Graph[None] = Graph(None, name, failure_policy=failure_policy)
        request = OpenRunRequest(graph, on_question, run_id, settings)
        return OpenRun.of(blocking(AsyncOpenRun.open(self.twin.api, request, is_answered_by_tasks=False)))

    def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run in its present state. Raises NotFoundError."""
        return blocking(self.twin.describe_run(run_id))

    def list_runs(
        self, limit: int = 100, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> list[run_pb2.Run]:
        """Return the newest runs that are in one of `states`, such as `"failed"`, and have all `labels`."""
        return blocking(self.twin.list_runs(limit, states=states, labels=labels))

    def list_workflows(self) -> list[workflow_pb2.Workflow]:
        """Return the stored workflows, newest first, without their tasks."""
        return blocking(self.twin.list_workflows())

    def delete_workflow(self, workflow_id: str) -> None:
        """Delete a stored workflow; its runs keep their copies. Raises NotFoundError."""
        blocking(self.twin.delete_workflow(workflow_id))

    def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """Return a run's tasks in their present state, in the order of their definition. Raises NotFoundError."""
        return blocking(self.twin.list_tasks(run_id, with_outputs))

    def run_graph(self, run_id: str) -> list[workflow_pb2.GraphTask]:
        """Return a run's tasks in the order of their definition, with their dependencies. Raises NotFoundError."""
        return blocking(self.twin.run_graph(run_id))

    def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task is queued or not ready. Raises NotFoundError."""
        return blocking(self.twin.explain(run_id, task_id))

    def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        return blocking(self.twin.cancel_run(run_id, reason))

    def delete_run(self, run_id: str) -> None:
        """Delete a run that has ended. Raises NotFoundError, and PreconditionError when the run has not ended."""
        blocking(self.twin.delete_run(run_id))

    def signal_run(self, run_id: str, name: str, value: Any = None) -> None:
        """Send a signal to a run. Raises NotFoundError, and the errors of `AsyncRun.signal`."""
        blocking(self.twin.signal_run(run_id, name, value))

    def retry_run(self, run_id: str, new_run_id: str = "", *, secrets: Sequence[str] = ()) -> Run:
        """Start a run that takes the outputs of the succeeded tasks of an ended run, and runs its other tasks.

        It has the same workflow, parameters and settings. The values of its secrets ended with it. Sent again are the
        secrets in the `env` of this client, and the variables of this process that `secrets` names.

        Raises NotFoundError, PreconditionError when the run has not ended, and InvalidArgumentError when a secret is
        missing.
        """
        return Run.of(blocking(self.twin.retry_run(run_id, new_run_id, secrets=secrets)))

    def nodes(self) -> list[cluster_pb2.Node]:
        """Return the nodes of the cluster."""
        return blocking(self.twin.nodes())

    def drain_node(self, node_id: str, deadline: float | None = None) -> cluster_pb2.Node:
        """Let a node finish its attempts and leave; after `deadline` seconds the others move to other nodes.

        Returns the node in its present state. Raises NotFoundError.
        """
        return blocking(self.twin.drain_node(node_id, deadline))

    def server_info(self) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits and load."""
        return blocking(self.twin.server_info())
