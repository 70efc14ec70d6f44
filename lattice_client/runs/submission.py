"""Owns starting runs, storing workflows and adding tasks to runs. Rule: one call starts a run."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack
from uuid import uuid4

from lattice.v1 import payload_pb2, task_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.convert import specs
from lattice_client.convert.inputs import Binder
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.deferred import UNSET
from lattice_client.graph.environment import Env, secret
from lattice_client.graph.names import texts_of
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import Scope
from lattice_client.graph.settings import RunSettings, TaskRunSettings, check_settings, disconnect_grace_s
from lattice_client.graph.workflow import Graph
from lattice_client.runs.artifacts import Transfer
from lattice_client.runs.executions import Execution, Executions
from lattice_client.runs.parts import ENVELOPE_BYTES, GraphMessage, Parts
from lattice_client.runs.reader import WAIT_S
from lattice_client.runs.sending import Sender
from lattice_client.runs.tracebacks import note_continues
from lattice_client.transport.channel import Channel
from lattice_client.transport.requests import building, duration, made

# How long a call is repeated while the server has too much work.
ADMISSION_TIMEOUT_S = 600.0
NO_ENV: Env = {}


@dataclass(frozen=True, slots=True)
class Started:
    """A started run, and how its result comes, unless it has to be asked for."""

    run_id: str
    execution: Execution | None = None


class Starter:
    """Starts runs."""

    def __init__(self, channel: Channel, transfer: Transfer, admission_timeout_s: float, env: Env) -> None:
        self._rpc = channel
        self._env = env
        self._transfer = transfer
        self._sender = Sender(channel, admission_timeout_s)
        self._executions = Executions(channel)

    async def opening(
        self, graph: Graph[Any], run_id: str, settings: TaskRunSettings
    ) -> workflow_pb2.RunWorkflowRequest:
        """Return the request for an open run without tasks. Raises TaskDefinitionError."""
        check_settings(settings)
        with building():
            request = made(workflow_pb2.RunWorkflowRequest, **self._common(settings, run_id))
        request.workflow.CopyFrom(await self._spec_of(graph))
        request.secrets.update(self._secrets_of(graph))
        return request

    async def run(self, graph: Graph[Any], run_id: str = "", **settings: Unpack[RunSettings]) -> Started:
        """Start a run. Raises TaskDefinitionError, RequestError."""
        check_settings(settings)
        parameters = settings.get("parameters") or {}
        is_stored = bool(graph.workflow_id) and not graph.tasks
        if not is_stored:
            _check_parameters(graph, parameters)
        with building():
            # With an id chosen here the call can be repeated when its answer is lost.
            request = made(workflow_pb2.RunWorkflowRequest, **self._common(settings, run_id))
            for name, value in parameters.items():
                request.parameters[name].CopyFrom(await self._parameter(name, value))
            request.secrets.update(self._secrets_of(graph))
        if is_stored:
            request.workflow_id = graph.workflow_id
            return await self._sender.admitted(lambda: self._start(request))
        # Built once for all repetitions of the call, because building it uploads large inputs.
        message, around_bytes = GraphMessage(await self._spec_of(graph)), request.ByteSize()

        async def call() -> Started:
            await self._sender.prepare(message, graph.tasks.values(), around_bytes)
            request.workflow.CopyFrom(message.last_message())
            return await self._start(request)

        return await self._sender.accepted(call, message)

    async def run_task(self, task: LatticeTask, **settings: Unpack[TaskRunSettings]) -> task_pb2.RunTaskResponse:
        """Run one task; return the server's answer when the task has ended, or after WAIT_S.

        Raises TaskDefinitionError, RequestError.
        """
        check_settings(settings)
        specs.pack_code([task])
        with building():
            request = made(task_pb2.RunTaskRequest, wait=duration(WAIT_S), **self._common(settings))
            request.task.CopyFrom(await specs.task_of(task, "", self._transfer.store, self._env))
            request.secrets.update(specs.secrets_of([task], self._env))
        function, _ = task.definition.packed

        async def call() -> task_pb2.RunTaskResponse:
            code = workflow_pb2.WorkflowSpec()
            specs.fill_code(code, [task], self._sender.known_code)
            if parts := await Parts.needed(self._rpc, code, request.task.ByteSize()):
                if request.task.ByteSize() + ENVELOPE_BYTES > parts.message_bytes:
                    raise parts.refusal("", request.task)
                # The server keeps the code of a draft until the run refers to it.
                await self._sender.send_parts(code, parts)
                self._sender.known_code.note_sent([function])
                specs.fill_code(code, [task], self._sender.known_code)
            (sent,) = code.functions.values()
            request.function.CopyFrom(sent)
            request.ClearField("bundle")
            for bundle in code.bundles:
                request.bundle.CopyFrom(bundle)
            if (answer := await self._executions.run_task(request)) is None:
                answer = await self._rpc.call(self._rpc.tasks.RunTask, request)
                self._executions.note_call()
            return answer

        try:
            response = await self._sender.accepted(call)
        except (KeyboardInterrupt, asyncio.CancelledError) as error:
            if not settings.get("cancel_on_disconnect"):
                note_continues(error, request.run_id, " if it was started")
            raise
        self._sender.known_code.note_sent([function])
        return response

    async def store(self, graph: Graph[Any], workflow_id: str) -> str:
        """Store a workflow; return its id. Raises TaskDefinitionError, RequestError."""
        with building():
            request = made(workflow_pb2.CreateWorkflowRequest, workflow_id=workflow_id or f"workflow-{uuid4().hex}")
        message = GraphMessage(await self._spec_of(graph))

        async def call() -> str:
            await self._sender.prepare(message, graph.tasks.values())
            request.spec.CopyFrom(message.last_message())
            return (await self._rpc.call(self._rpc.workflows.CreateWorkflow, request)).workflow.workflow_id

        return await self._sender.accepted(call, message)

    async def add_tasks(
        self, run_id: str, tasks: Sequence[LatticeTask], scope: Scope, expected_revision: int | None, env: Env = NO_ENV
    ) -> int:
        """Add tasks to a run; return its revision. Raises TaskDefinitionError, RequestError."""

        async def add(request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
            return await self._rpc.call(self._rpc.workflows.AddTasks, request)

        return await self.add_by(add, run_id, tasks, scope, expected_revision, env)

    async def add_by(
        self,
        add: Callable[[workflow_pb2.AddTasksRequest], Awaitable[workflow_pb2.AddTasksResponse]],
        run_id: str,
        tasks: Sequence[LatticeTask],
        scope: Scope,
        expected_revision: int | None,
        env: Env = NO_ENV,
    ) -> int:
        """As `add_tasks`, where `add` sends the request. Raises also the exceptions of `add`."""
        specs.pack_code(tasks)
        with building():
            env = {**self._env, **env}
            message = GraphMessage(await specs.tasks_of(tasks, self._transfer.store, scope, env))
            secrets = specs.secrets_of(tasks, env)
        # The same id for all repetitions, so that the server adds the tasks once.
        request_id = uuid4().hex

        async def call() -> int:
            await self._sender.prepare(message, tasks)
            last = message.last_message()
            request = made(
                workflow_pb2.AddTasksRequest,
                run_id=run_id,
                tasks=last.tasks,
                functions=last.functions,
                bundles=last.bundles,
                expected_revision=expected_revision,
                request_id=request_id,
                source_draft_id=last.draft_id,
                secrets=secrets,
            )
            return (await add(request)).revision

        return await self._sender.accepted(call, message)

    def _common(self, settings: TaskRunSettings, run_id: str = "") -> dict[str, Any]:
        """Return the fields that the requests for a run of one task and of a workflow share."""
        if not isinstance(run_id, str):
            raise TaskDefinitionError(f"the id of a run must be a text, not {run_id!r}; settings are given by name")
        timeout = settings.get("timeout")
        grace_s = disconnect_grace_s(settings.get("cancel_on_disconnect", False))
        return {
            "run_id": run_id or f"run-{uuid4().hex}",
            "labels": settings.get("labels"),
            "priority": settings.get("priority", 0),
            "timeout": None if timeout is None else duration(timeout),
            "cancel_on_disconnect": None if grace_s is None else duration(grace_s),
        }

    async def _spec_of(self, graph: Graph[Any]) -> workflow_pb2.WorkflowSpec:
        """Return a workflow without its code."""
        specs.pack_code(graph.tasks.values())
        with building():
            env = {**self._env, **graph.env}
            spec = await specs.tasks_of(graph.tasks.values(), self._transfer.store, graph.scope, env)
            spec.display_name = graph.name
            spec.failure_policy = specs.FAILURE_POLICIES[graph.failure_policy]
            for name, parameter in graph.parameters.items():
                if parameter.default is not UNSET:
                    spec.parameters[name].CopyFrom(await self._parameter(name, parameter.default))
        return spec

    def secrets_again(
        self, graph: Graph[Any] | None, added: Iterable[LatticeTask], names: Iterable[str]
    ) -> dict[str, str]:
        """Return the secrets for a run that retries one: those of its tasks that this process defined, those of the
        client, and those by these names. Raises TaskDefinitionError when this process has none of such a name.
        """
        tasks = [*(() if graph is None else graph.tasks.values()), *added]
        env = {**self._env, **({} if graph is None else graph.env)}
        return specs.secrets_of(tasks, env) | {
            name: secret(name).value() for name in texts_of("secrets", "a list of names of variables", names)
        }

    def _secrets_of(self, graph: Graph[Any]) -> dict[str, str]:
        return specs.secrets_of(graph.tasks.values(), {**self._env, **graph.env})

    async def _parameter(self, name: str, value: Any) -> payload_pb2.Payload:
        no_outputs = Scope(lambda output: False, ())
        return await Binder(f"parameter {name!r}", self._transfer.store, no_outputs).payload_of(value)

    async def _start(self, request: workflow_pb2.RunWorkflowRequest) -> Started:
        execution = await self._executions.start(request)
        if execution is None:
            await self._rpc.call(self._rpc.workflows.RunWorkflow, request)
            self._executions.note_call()
        return Started(request.run_id, execution)


def _check_parameters(graph: Graph[Any], given: Mapping[str, Any]) -> None:
    """Raise TaskDefinitionError for an unknown parameter, and for a required one that is missing."""
    unknown = [name for name in given if name not in graph.parameters]
    missing = [name for name, found in graph.parameters.items() if found.default is UNSET and name not in given]
    if not unknown and not missing:
        return
    faults = [f"has no parameter {', '.join(map(repr, unknown))}"] * bool(unknown)
    faults += [f"needs parameter {', '.join(map(repr, missing))}"] * bool(missing)
    known = ", ".join(graph.parameters) or "none"
    raise errors.TaskDefinitionError(f"the workflow {' and '.join(faults)}; its parameters: {known}")
