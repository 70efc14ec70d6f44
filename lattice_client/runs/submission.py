"""Owns how work gets to a server: a graph, a single task, tasks for a run that goes on.

Rule: a graph starts by one RPC, whatever was sent before; it is offered again only where that cannot start it twice.
"""

import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, Unpack
from uuid import uuid4

from lattice.v1 import payload_pb2, task_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.convert import graphs
from lattice_client.graph.inputs import Binder
from lattice_client.graph.outputs import UNSET, Scope
from lattice_client.graph.parts import ENVELOPE_BYTES, Parcel, Parts
from lattice_client.graph.settings import RunSettings, TaskRunSettings, check_settings
from lattice_client.graph.workflow import Graph, LatticeTask
from lattice_client.runs.reader import WAIT_S
from lattice_client.runs.run import StartCall
from lattice_client.transport.artifacts import Transfer
from lattice_client.transport.channel import Channel
from lattice_client.transport.requests import building, duration, made

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

    def __init__(self, rpc: Channel, transfer: Transfer, tenant: str, admission_timeout_s: float) -> None:
        self._rpc = rpc
        self._transfer = transfer
        self._tenant = tenant
        self._admission_timeout_s = admission_timeout_s
        self._open: set[StartCall] = set()
        self._known_code: set[str] = set()

    def close(self) -> None:
        """End the calls that would bring results."""
        for call in list(self._open):
            call.abandon()

    async def opening(
        self, graph: Graph[Any], run_id: str, settings: TaskRunSettings
    ) -> workflow_pb2.RunWorkflowRequest:
        """Return the request for an open run that begins without tasks. Raises TaskDefinitionError."""
        check_settings(settings)
        with building():
            request = made(workflow_pb2.RunWorkflowRequest, **self._common(settings, run_id))
        request.workflow.CopyFrom(await self._spec_of(graph))
        return request

    async def run(self, graph: Graph[Any], run_id: str = "", **settings: Unpack[RunSettings]) -> Started:
        """Start a run. Raises TaskDefinitionError, RequestError."""
        check_settings(settings)
        parameters = settings.get("parameters") or {}
        is_stored = bool(graph.workflow_id) and not graph.tasks
        if not is_stored:
            _check_parameters(graph, parameters)
        with building():
            # An id of our own makes the call safe to repeat when its answer is lost.
            request = made(workflow_pb2.RunWorkflowRequest, **self._common(settings, run_id))
            for name, value in parameters.items():
                request.parameters[name].CopyFrom(await self._parameter(name, value))
        if is_stored:
            request.workflow_id = graph.workflow_id
            return await self._patiently(lambda: self._start(request))
        # Once, however often it is offered: large inputs would be uploaded each time.
        parcel, around_bytes = Parcel(await self._spec_of(graph)), request.ByteSize()

        async def call() -> Started:
            await self._send(parcel, graph.tasks.values(), around_bytes)
            request.workflow.CopyFrom(parcel.carried())
            return await self._start(request)

        return await self._offer(call, parcel)

    async def run_task(self, task: LatticeTask, **settings: Unpack[TaskRunSettings]) -> task_pb2.RunTaskResponse:
        """Run one task; return the server's answer when it has ended, or after WAIT_S.

        Raises TaskDefinitionError, RequestError.
        """
        check_settings(settings)
        graphs.pack_code([task])
        with building():
            request = made(task_pb2.RunTaskRequest, wait=duration(WAIT_S), **self._common(settings))
            request.task.CopyFrom(await graphs.task_of(task, "", self._transfer.store))
        function, _ = task.definition.packed

        async def call() -> task_pb2.RunTaskResponse:
            code = workflow_pb2.WorkflowSpec()
            graphs.fill_code(code, [task], self._known_code)
            if parts := await Parts.needed(self._rpc, code, request.task.ByteSize()):
                if request.task.ByteSize() + ENVELOPE_BYTES > parts.message_bytes:
                    raise parts.refusal("", request.task)
                # The draft keeps the code until the run has it.
                await self._send_parts(code, parts)
                self._known_code.add(function.digest)
                graphs.fill_code(code, [task], self._known_code)
            (sent,) = code.functions.values()
            request.function.CopyFrom(sent)
            request.ClearField("bundle")
            for bundle in code.bundles:
                request.bundle.CopyFrom(bundle)
            return await self._rpc.call(self._rpc.tasks.RunTask, request)

        response = await self._offer(call)
        self._known_code.add(function.digest)
        return response

    async def store(self, graph: Graph[Any], workflow_id: str) -> str:
        """Store a workflow; return its id. Raises TaskDefinitionError, RequestError."""
        with building():
            request = made(workflow_pb2.CreateWorkflowRequest, workflow_id=workflow_id or f"workflow-{uuid4().hex}")
        parcel = Parcel(await self._spec_of(graph))

        async def call() -> str:
            await self._send(parcel, graph.tasks.values())
            request.spec.CopyFrom(parcel.carried())
            return (await self._rpc.call(self._rpc.workflows.CreateWorkflow, request)).workflow.workflow_id

        return await self._offer(call, parcel)

    async def add_tasks(
        self, run_id: str, tasks: Sequence[LatticeTask], scope: Scope, expected_revision: int | None
    ) -> int:
        """Add tasks to a run; return its revision. Raises TaskDefinitionError, RequestError."""

        async def add(request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
            return await self._rpc.call(self._rpc.workflows.AddTasks, request)

        return await self.add_by(add, run_id, tasks, scope, expected_revision)

    async def add_by(
        self,
        add: Callable[[workflow_pb2.AddTasksRequest], Awaitable[workflow_pb2.AddTasksResponse]],
        run_id: str,
        tasks: Sequence[LatticeTask],
        scope: Scope,
        expected_revision: int | None,
    ) -> int:
        """As `add_tasks`, by `add`, which sends a request and returns the answer. Raises what that raises."""
        graphs.pack_code(tasks)
        with building():
            parcel = Parcel(await graphs.tasks_of(tasks, self._transfer.store, scope))
        # One for all tries: the server adds the tasks once.
        request_id = uuid4().hex

        async def call() -> int:
            await self._send(parcel, tasks)
            carried = parcel.carried()
            request = made(
                workflow_pb2.AddTasksRequest,
                run_id=run_id,
                tasks=carried.tasks,
                functions=carried.functions,
                bundles=carried.bundles,
                expected_revision=expected_revision,
                request_id=request_id,
                source_draft_id=carried.draft_id,
            )
            return (await add(request)).revision

        return await self._offer(call, parcel)

    def _common(self, settings: TaskRunSettings, run_id: str = "") -> dict[str, Any]:
        """Return the fields that requests for runs of one task and of a workflow have in common."""
        timeout = settings.get("timeout")
        return {
            "run_id": run_id or f"run-{uuid4().hex}",
            "tenant": self._tenant,
            "labels": settings.get("labels"),
            "priority": settings.get("priority", 0),
            "timeout": None if timeout is None else duration(timeout),
        }

    async def _spec_of(self, graph: Graph[Any]) -> workflow_pb2.WorkflowSpec:
        """Return a workflow without its code."""
        graphs.pack_code(graph.tasks.values())
        with building():
            spec = await graphs.tasks_of(graph.tasks.values(), self._transfer.store, graph.scope)
            spec.display_name = graph.name
            spec.failure_policy = graphs.FAILURE_POLICIES[graph.failure_policy]
            for name, parameter in graph.parameters.items():
                if parameter.default is not UNSET:
                    spec.parameters[name].CopyFrom(await self._parameter(name, parameter.default))
        return spec

    async def _parameter(self, name: str, value: Any) -> payload_pb2.Payload:
        nothing = Scope(lambda output: False, ())
        return await Binder(f"parameter {name!r}", self._transfer.store, nothing).payload_of(value)

    async def _send(self, parcel: Parcel, tasks: Collection[LatticeTask], around_bytes: int = 0) -> None:
        """Put the code of tasks into their message; send its parts before when one message cannot carry it."""
        if parcel.draft_id:
            return
        graphs.fill_code(parcel.spec, tasks, self._known_code)
        if parts := await Parts.needed(self._rpc, parcel.spec, around_bytes):
            parcel.draft_id = await self._send_parts(parcel.spec, parts)

    async def _send_parts(self, spec: workflow_pb2.WorkflowSpec, parts: Parts) -> str:
        """Send the tasks, functions and bundles of a workflow; return the id of the draft that has them."""
        draft_id = ""
        for part in parts.of(spec):
            draft_id = part.draft_id
            await self._patiently(partial(self._rpc.call, self._rpc.workflows.AddTasks, part))
        return draft_id

    async def _offer(self, call: Callable[[], Awaitable[T]], parcel: Parcel | None = None) -> T:
        """Make a call that brings work: again with what the server has forgotten of it, be it code or the parts that
        were sent before, and again later when the server has as much as it takes."""
        parcel = parcel or Parcel(workflow_pb2.WorkflowSpec())
        while True:
            try:
                found = await self._patiently(call)
            except errors.PreconditionError as error:
                if error.reason != "FUNCTION_MISSING" or not self._known_code:
                    raise
                self._known_code.clear()
            except errors.NotFoundError as error:
                if error.reason != "DRAFT_NOT_FOUND" or not parcel.draft_id:
                    raise
            else:
                self._known_code.update(function.digest for function in parcel.spec.functions.values())
                return found
            parcel.draft_id = ""

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, again later when the server has as much as it takes."""
        deadline = self._rpc.now() + self._admission_timeout_s
        while True:
            try:
                return await call()
            except errors.ResourceExhaustedError as error:
                if error.retry_after_s is None:
                    raise
                # Spread, so that all who were refused together do not come back together.
                wait_s = error.retry_after_s * random.uniform(0.5, 1.5)
                if self._rpc.now() + wait_s > deadline:
                    raise
                await self._rpc.sleep(wait_s)

    async def _start(self, request: workflow_pb2.RunWorkflowRequest) -> Started:
        if len(self._open) < MAX_OPEN_CALLS:
            execute = workflow_pb2.ExecuteWorkflowRequest(run=request)
            first, call = await self._rpc.begin(self._rpc.workflows.ExecuteWorkflow, execute, self._open.discard)
            self._open.add(call)
            return Started(first.accepted.run.run_id, call)
        answer = await self._rpc.call(self._rpc.workflows.RunWorkflow, request)
        return Started(answer.run.run_id)


def _check_parameters(graph: Graph[Any], given: Mapping[str, Any]) -> None:
    """Raise TaskDefinitionError for a parameter that the workflow does not have, or that it needs and is not given."""
    unknown = [name for name in given if name not in graph.parameters]
    missing = [name for name, found in graph.parameters.items() if found.default is UNSET and name not in given]
    if not unknown and not missing:
        return
    faults = [f"has no parameter {', '.join(map(repr, unknown))}"] * bool(unknown)
    faults += [f"needs parameter {', '.join(map(repr, missing))}"] * bool(missing)
    known = ", ".join(graph.parameters) or "none"
    raise errors.TaskDefinitionError(f"the workflow {' and '.join(faults)}; its parameters: {known}")
