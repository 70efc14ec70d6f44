"""Owns how work gets to a server: a graph, a single task, tasks for a run that goes on.

Rule: a graph is one RPC; it is offered again only where that cannot start it twice.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack
from uuid import uuid4

from lattice.v1 import task_pb2, workflow_pb2

from lattice_client import convert, errors
from lattice_client.channel import Channel
from lattice_client.inputs import Store
from lattice_client.outputs import Scope
from lattice_client.reading import WAIT_S
from lattice_client.requests import building, duration, made
from lattice_client.run import StartCall
from lattice_client.settings import RunSettings, check_settings
from lattice_client.workflow import Graph, LatticeTask

T = TypeVar("T")

# How long a call goes on asking a server that has as much work as it takes.
ADMISSION_TIMEOUT_S = 600.0
# Runs beyond these are asked for their result by a call of their own.
MAX_OPEN_CALLS = 64


@dataclass(frozen=True, slots=True)
class Started:
    """A run that was started; see `AsyncRun.of`."""

    run_id: str
    call: StartCall | None = None


class Starter:
    """Starts runs. `open` are the calls that end with their run; what code the server has is remembered."""

    def __init__(self, rpc: Channel, tenant: str, admission_timeout_s: float) -> None:
        self._rpc = rpc
        self._tenant = tenant
        self._admission_timeout_s = admission_timeout_s
        self._open: set[StartCall] = set()
        self._known_code: set[str] = set()

    def close(self) -> None:
        """End the calls that would bring results."""
        for call in list(self._open):
            call.abandon()

    async def request_of(
        self, graph: Graph[Any], store: Store, run_id: str = "", **settings: Unpack[RunSettings]
    ) -> workflow_pb2.RunWorkflowRequest:
        """Return what `run` sends, without the code. Waits for nothing but `store`."""
        check_settings(settings)
        labels, priority, timeout = settings.get("labels"), settings.get("priority", 0), settings.get("timeout")
        # An id of our own makes the call safe to repeat when its answer is lost.
        run_id = run_id or f"run-{uuid4().hex}"
        convert.pack_code(graph.tasks.values())
        with building():
            request = made(
                workflow_pb2.RunWorkflowRequest, run_id=run_id, tenant=self._tenant, labels=labels, priority=priority
            )
            if timeout is not None:
                request.timeout.CopyFrom(duration(timeout))
            if graph.workflow_id and not graph.tasks:
                request.workflow_id = graph.workflow_id
            else:
                # Once, however often it is offered: large inputs would be uploaded each time.
                request.workflow.CopyFrom(await convert.tasks_of(graph.tasks.values(), store, graph.scope))
                request.workflow.display_name = graph.name
                request.workflow.failure_policy = convert.FAILURE_POLICIES[graph.failure_policy]
        return request

    async def submit(self, request: workflow_pb2.RunWorkflowRequest, graph: Graph[Any]) -> Started:
        """Start the run of a request, again while the server has as much work as it takes. Raises RequestError."""
        return await self._offer(lambda: self._start(request, graph))

    async def task_request_of(self, task: LatticeTask, store: Store) -> task_pb2.RunTaskRequest:
        """Return what `run_task` sends, without the code. Waits for nothing but `store`."""
        convert.pack_code([task])
        with building():
            request = task_pb2.RunTaskRequest(run_id=f"run-{uuid4().hex}", wait=duration(WAIT_S), tenant=self._tenant)
            request.task.CopyFrom(await convert.task_of(task, "", store))
        return request

    async def submit_task(self, request: task_pb2.RunTaskRequest, task: LatticeTask) -> task_pb2.RunTaskResponse:
        """Run the task of a request; return what the server says when it has ended, or for how long it waits."""
        function, bundle = task.definition.packed

        async def call() -> task_pb2.RunTaskResponse:
            if function.digest in self._known_code:
                request.function.digest = function.digest
            else:
                request.function.CopyFrom(function)
                if bundle is not None:
                    request.bundle.CopyFrom(bundle)
            return await self._rpc.call(self._rpc.tasks.RunTask, request)

        response = await self._offer(call)
        self._known_code.add(function.digest)
        return response

    async def spec_of(self, tasks: Sequence[LatticeTask], store: Store, scope: Scope) -> workflow_pb2.WorkflowSpec:
        """Return what `add_tasks` sends, without the code. Waits for nothing but `store`."""
        convert.pack_code(tasks)
        with building():
            return await convert.tasks_of(tasks, store, scope)

    async def submit_tasks(
        self, run_id: str, spec: workflow_pb2.WorkflowSpec, tasks: Sequence[LatticeTask], expected_revision: int | None
    ) -> int:
        """Add the tasks of a spec to a run; see `add_tasks`."""
        request_id = uuid4().hex

        async def call() -> int:
            convert.fill_code(spec, tasks, self._known_code)
            request = made(
                workflow_pb2.AddTasksRequest,
                run_id=run_id,
                tasks=spec.tasks,
                functions=spec.functions,
                bundles=spec.bundles,
                expected_revision=expected_revision,
                request_id=request_id,
            )
            response = await self._rpc.call(self._rpc.workflows.AddTasks, request)
            self._known_code.update(function.digest for function in spec.functions.values())
            return response.revision

        return await self._offer(call)

    async def _offer(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call that brings work: again with its code when the server has forgotten some, again later when the
        server has as much as it takes."""
        deadline = self._rpc.now() + self._admission_timeout_s
        while True:
            try:
                return await call()
            except errors.PreconditionError as error:
                if error.reason != "FUNCTION_MISSING" or not self._known_code:
                    raise
                self._known_code.clear()
            except errors.ResourceExhaustedError as error:
                if error.retry_after_s is None:
                    raise
                # Spread, so that all who were refused together do not come back together.
                wait_s = error.retry_after_s * random.uniform(0.5, 1.5)
                if self._rpc.now() + wait_s > deadline:
                    raise
                await self._rpc.sleep(wait_s)

    async def _start(self, request: workflow_pb2.RunWorkflowRequest, graph: Graph[Any]) -> Started:
        if request.HasField("workflow"):
            convert.fill_code(request.workflow, graph.tasks.values(), self._known_code)
        if len(self._open) < MAX_OPEN_CALLS:
            execute = workflow_pb2.ExecuteWorkflowRequest(run=request)
            first, call = await self._rpc.begin(self._rpc.workflows.ExecuteWorkflow, execute, self._open.discard)
            self._open.add(call)
            started = Started(first.accepted.run.run_id, call)
        else:
            answer = await self._rpc.call(self._rpc.workflows.RunWorkflow, request)
            started = Started(answer.run.run_id)
        self._known_code.update(function.digest for function in request.workflow.functions.values())
        return started
