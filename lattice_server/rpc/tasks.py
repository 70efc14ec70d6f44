"""Serves `TaskService`: the tasks inside runs, and runs of one task."""

import asyncio
import contextlib
from functools import partial
from itertools import islice

from lattice.v1 import task_pb2, task_pb2_grpc

from lattice_server.core.model import WorkflowSpec
from lattice_server.core.states import TASK_TERMINAL
from lattice_server.core.tenancy import Reach
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.rpc import callers
from lattice_server.rpc.convert.environment import secrets_from_proto
from lattice_server.rpc.convert.runs import TASK_STATE_TO_PROTO, run_to_proto, task_to_proto
from lattice_server.rpc.convert.tasks import check_request_id, explanation_to_proto
from lattice_server.rpc.convert.times import disconnect_grace_from_proto, limit_from_proto, wait_from_proto
from lattice_server.rpc.fingerprints import task_fingerprint
from lattice_server.rpc.handlers import Context
from lattice_server.rpc.paging import is_full, number_after, page
from lattice_server.rpc.request_cache import RequestCache
from lattice_server.rpc.spec_parser import SpecParser

FUNCTION_NAME = "function"


class TaskServicer(task_pb2_grpc.TaskServiceServicer):
    """The `TaskService`."""

    def __init__(self, orchestrator: Orchestrator, parser: SpecParser, cache: RequestCache) -> None:
        self._orchestrator = orchestrator
        self._parser = parser
        self._cache = cache

    async def RunTask(self, request: task_pb2.RunTaskRequest, context: Context) -> task_pb2.RunTaskResponse:
        """Run one task as a run of its own."""
        return await self.run(request)

    async def run(self, request: task_pb2.RunTaskRequest) -> task_pb2.RunTaskResponse:
        """Run one task as a run of its own; return when it has ended, or its wait is over. Raises LatticeError."""
        wait_s, grace_s = wait_from_proto(request.wait, "wait"), disconnect_grace_from_proto(request)
        check_request_id(request.request_id)
        request_id = request.request_id
        secrets = secrets_from_proto(request.secrets)
        request.ClearField("secrets")
        bundles = [request.bundle] if request.HasField("bundle") else []
        name = request.task.function or FUNCTION_NAME
        request.tenant, reach = callers.tenant_named(request.tenant), callers.reach()
        functions = self._parser.functions({name: request.function}, bundles, Reach(request.tenant, reach.is_any))
        task = task_pb2.TaskSpec()
        task.CopyFrom(request.task)
        task.function = name
        task.task_id = task.task_id or "task"
        spec = WorkflowSpec(
            tasks=self._parser.tasks([task], functions),
            display_name=task.display_name or task.task_id,
        )
        entry, created = self._orchestrator.start_run(
            request.run_id,
            spec,
            parameters={},
            labels=dict(request.labels),
            tenant=request.tenant,
            priority=request.priority,
            fingerprint=task_fingerprint(request, functions[name]),
            request_id=request_id,
            timeout_s=limit_from_proto(request, "timeout", "timeout"),
            disconnect_grace_s=grace_s,
            reach=reach,
            secrets=secrets,
        )
        with self._orchestrator.tethers.held(entry, grace_s):
            await self._wait(entry, task.task_id, wait_s)
        shown = task_to_proto(entry, task.task_id)
        response = task_pb2.RunTaskResponse(run=run_to_proto(entry), created=created, task=shown)
        self._orchestrator.ended.note_read(entry)
        return response

    async def GetTask(self, request: task_pb2.GetTaskRequest, context: Context) -> task_pb2.GetTaskResponse:
        """Return one task of a run."""
        entry = self._orchestrator.task(request.run_id, request.task_id, callers.reach())
        await self._wait(entry, request.task_id, wait_from_proto(request.wait, "wait"))
        return task_pb2.GetTaskResponse(task=task_to_proto(entry, request.task_id))

    async def ListTasks(self, request: task_pb2.ListTasksRequest, context: Context) -> task_pb2.ListTasksResponse:
        """List the tasks of a run."""
        entry = self._orchestrator.run(request.run_id, callers.reach())
        states = set(request.states)
        # A run only grows, so the position of a task never changes and names it in a page token.
        start = number_after(request) or 0
        rows = (
            (position, task_id)
            for position, (task_id, record) in enumerate(islice(entry.run.tasks.items(), start, None), start + 1)
            if not states or TASK_STATE_TO_PROTO[record.state] in states
        )
        show = partial(task_to_proto, entry, is_brief=not is_full(request.view))
        tasks, token = page(request, rows, show)
        sequence = len(entry.log.events)
        return task_pb2.ListTasksResponse(tasks=tasks, next_page_token=token, sequence=sequence)

    async def CancelTask(self, request: task_pb2.CancelTaskRequest, context: Context) -> task_pb2.CancelTaskResponse:
        """Cancel one task of a run."""

        async def cancel() -> task_pb2.CancelTaskResponse:
            entry = self._orchestrator.cancel_task(request.run_id, request.task_id, callers.reach())
            return task_pb2.CancelTaskResponse(task=task_to_proto(entry, request.task_id))

        return await self._cache.once(request, cancel)

    async def ExplainTask(self, request: task_pb2.ExplainTaskRequest, context: Context) -> task_pb2.ExplainTaskResponse:
        """Explain why a task waits."""
        reach = callers.reach()
        entry = self._orchestrator.task(request.run_id, request.task_id, reach)
        explanation = await self._orchestrator.explain(request.run_id, request.task_id, reach)
        shown = task_to_proto(entry, request.task_id)
        return explanation_to_proto(explanation, shown)

    async def _wait(self, entry: RunEntry, task_id: str, wait_s: float) -> None:
        if entry.run.tasks[task_id].state not in TASK_TERMINAL:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await entry.log.task_ended(task_id)
