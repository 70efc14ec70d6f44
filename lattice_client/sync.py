"""Owns the synchronous client. Rule: nothing is decided here, and no other thread takes part.

Each call runs the coroutine of the asyncio client of the same name over calls that block, in the caller's own thread.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Never, NoReturn, Self, Unpack

from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.client import AsyncLatticeClient
from lattice_client.convert import graphs
from lattice_client.graph.settings import RunSettings, TaskRunSettings
from lattice_client.graph.workflow import Graph
from lattice_client.runs.decoding import opened
from lattice_client.runs.questions import OnQuestion
from lattice_client.runs.submission import ADMISSION_TIMEOUT_S
from lattice_client.runs.sync_run import OpenRun, Run, done, iterate
from lattice_client.transport.blocking import BlockingChannel
from lattice_client.transport.channel import dial
from lattice_client.transport.security import SecurityOptions
from lattice_client.transport.suspending import AsyncChannel


class LatticeWorkflow(Graph["LatticeClient"]):
    """A workflow being written. Nothing is sent before `run`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.workflow_id!r}, tasks: {len(self.tasks)}>"

    def run(self, run_id: str = "", **settings: Unpack[RunSettings]) -> Run:
        """Send the whole graph and start a run; the result is its id, and more (see `Run`).

        For the settings see `RunSettings`. Raises TaskDefinitionError, RequestError.
        """
        return Run.of(done(self.client.twin.run(self, run_id, **settings)))

    def store(self, workflow_id: str = "") -> Self:
        """Store the workflow on the server, for `LatticeClient.get_workflow` and for other callers; return it.

        The id is chosen when none is given. The same id with the same content is stored once.

        Raises TaskDefinitionError, AlreadyExistsError when the id is taken by other content, RequestError.
        """
        return type(self)(self.client, workflow_id=done(self.client.twin.store(self, workflow_id)))

    def get_results(self, run_id: str, verbose: bool = True, timeout: float | None = None) -> list[dict[str, Any]]:
        """Follow a run to its end and return its messages, printing them when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages, twin = [], self.client.twin
        for event in iterate(twin, twin.reader.fetched_events(run_id), run_id, timeout):
            message = graphs.message_of(opened(event), self.workflow_id, run_id)
            if message is None:
                continue
            messages.append(message)
            if verbose:
                print(message)
        return messages


class LatticeClient:
    """A connection to a server; safe to use from any thread. `aio` is the asyncio client of the same server.

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
        self._dialled = dial(target, **security)
        self.target = self._dialled.address
        self._settings = tenant, admission_timeout
        # The asyncio client, over calls that block; `done` runs its coroutines.
        self.twin = AsyncLatticeClient.over(BlockingChannel(self._dialled), *self._settings)

    @functools.cached_property
    def aio(self) -> AsyncLatticeClient:
        """The asyncio client of the same server, for any event loop."""
        return AsyncLatticeClient.over(AsyncChannel(self._dialled), *self._settings)

    def __repr__(self) -> str:
        return repr(self.twin).replace("Async", "", 1)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled: a task that needs a client makes one of its own")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; runs go on. Where the program is ending, or was forked, there is none to close."""
        with suppress(errors.ClientClosedError, errors.ForkError):
            done(self.twin.close())
        if "aio" in self.__dict__:
            self.aio.shut()

    def create_workflow(self, name: str = "", failure_policy: str = "fail_fast") -> LatticeWorkflow:
        """Return an empty workflow; nothing is sent.

        When a task fails, `fail_fast` stops the run, `finish_independent` still runs what does not depend on it.
        """
        return LatticeWorkflow(self, name, failure_policy=failure_policy)

    def get_workflow(self, workflow_id: str) -> LatticeWorkflow:
        """Return a workflow stored on the server, to be run by its id."""
        return LatticeWorkflow(self, workflow_id=workflow_id)

    def get_run(self, run_id: str) -> Run:
        """Return a run to follow. Raises NotFoundError."""
        return Run.of(done(self.twin.get_run(run_id)))

    def get_ray_head_port(self) -> int:
        """Return the port of the server's Ray head; zero without Ray."""
        return done(self.twin.get_ray_head_port())

    def run_task(
        self,
        task: Any,
        inputs: Mapping[str, Any] | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **misplaced: Never,
    ) -> dict[str, Any]:
        """Run one task as a run of its own and return its outputs; see `AsyncLatticeClient.run_task`.

        Raises TaskDefinitionError, TaskFailedError, RunTimeoutError, RequestError.
        """
        call = self.twin.run_task(task, inputs, labels=labels, priority=priority, timeout=timeout, **misplaced)
        return done(call)

    def open_run(
        self,
        name: str = "",
        *,
        on_question: OnQuestion | None = None,
        failure_policy: str = "finish_independent",
        run_id: str = "",
        **settings: Unpack[TaskRunSettings],
    ) -> OpenRun:
        """Open a run that tasks are added to as it goes: `with client.open_run() as run`.

        It is cancelled when this client is away from the server for longer than `Limits.open_run_grace`, 30 s unless
        the server is set otherwise.

        Args:
            name: of the run, for people.
            on_question: answers what tasks ask with `context.ask`: called with each `Question`, in the thread that
                waits for the run, while it does; what it returns is the answer, and what it raises the task is told.
                Without it questions are to be had of `run.questions()`.
            failure_policy: with `finish_independent` a failed task stops only what needs it; with `fail_fast` the run.
            run_id: names the run; the same id and settings again take the run over.
            settings: see `TaskRunSettings`.

        Raises:
            TaskDefinitionError: a setting is wrong; nothing was sent.
            RequestError: the server refused it.
        """
        if inspect.iscoroutinefunction(on_question):
            raise errors.TaskDefinitionError("on_question must be a plain function; coroutines need client.aio")
        graph: Graph[None] = Graph(None, name, failure_policy=failure_policy)
        opened_ = self.twin.opened(graph, on_question, run_id, settings, is_served_apart=False)
        return OpenRun.of(done(opened_))

    def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run as it is now. Raises NotFoundError."""
        return done(self.twin.describe_run(run_id))

    def list_runs(
        self, limit: int = 100, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> list[run_pb2.Run]:
        """Return the newest runs: those in one of `states`, such as `"failed"`, that have all `labels`."""
        return done(self.twin.list_runs(limit, states=states, labels=labels))

    def list_workflows(self) -> list[workflow_pb2.Workflow]:
        """Return the stored workflows, newest first, without their tasks."""
        return done(self.twin.list_workflows())

    def delete_workflow(self, workflow_id: str) -> None:
        """Delete a stored workflow; its runs keep their copies. Raises NotFoundError."""
        done(self.twin.delete_workflow(workflow_id))

    def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """Return a run's tasks as they are now, in the order of their definition. Raises NotFoundError."""
        return done(self.twin.list_tasks(run_id, with_outputs))

    def run_graph(self, run_id: str) -> list[workflow_pb2.GraphTask]:
        """As `AsyncLatticeClient.run_graph`."""
        return done(self.twin.run_graph(run_id))

    def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits. Raises NotFoundError."""
        return done(self.twin.explain(run_id, task_id))

    def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        return done(self.twin.cancel_run(run_id, reason))

    def retry_run(self, run_id: str, new_run_id: str = "") -> Run:
        """Start a run that takes over the finished tasks of one that has ended, and runs the others.

        It has the same workflow, parameters and settings.

        Raises NotFoundError, and PreconditionError when the run has not ended.
        """
        return Run.of(done(self.twin.retry_run(run_id, new_run_id)))

    def nodes(self) -> list[cluster_pb2.Node]:
        """Return the nodes in the ledger."""
        return done(self.twin.nodes())

    def drain_node(self, node_id: str, deadline: float | None = None) -> cluster_pb2.Node:
        """As `AsyncLatticeClient.drain_node`."""
        return done(self.twin.drain_node(node_id, deadline))

    def server_info(self) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits and load."""
        return done(self.twin.server_info())
