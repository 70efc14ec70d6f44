"""Serves `TaskService`: the tasks inside runs, and runs of one task."""

import asyncio
from functools import partial
from itertools import islice

from lattice.v1 import resources_pb2, run_pb2, task_pb2, task_pb2_grpc

from lattice_server.core.messages import Explanation, ReasonKind
from lattice_server.core.model import WorkflowSpec
from lattice_server.core.states import TASK_TERMINAL
from lattice_server.core.tenancy import Reach
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.run_entry import RunEntry
from lattice_server.rpc import callers
from lattice_server.rpc.context import Context
from lattice_server.rpc.convert import payloads, tasks
from lattice_server.rpc.convert.runs import TASK_STATE_TO_PROTO, run_to_proto, task_to_proto
from lattice_server.rpc.idempotency import Repeats
from lattice_server.rpc.paging import is_full, number_after, page
from lattice_server.rpc.request_parser import Intake
from lattice_server.rpc.sameness import task_fingerprint
from lattice_server.rpc.waiting import wait_from_proto

REASON_KIND_TO_PROTO = {kind: task_pb2.WaitKind.Value(f"WAIT_KIND_{kind.name}") for kind in ReasonKind}
# By the names that the ledger has for what a node is short of.
RESOURCE_KIND_TO_PROTO = {
    "cpu": resources_pb2.RESOURCE_KIND_CPU,
    "memory": resources_pb2.RESOURCE_KIND_MEMORY,
    "gpu": resources_pb2.RESOURCE_KIND_GPU,
    "gpu_memory": resources_pb2.RESOURCE_KIND_GPU_MEMORY,
}
FUNCTION_NAME = "function"


class TaskServicer(task_pb2_grpc.TaskServiceServicer):
    """The `TaskService`."""

    def __init__(self, orchestrator: Orchestrator, intake: Intake, repeats: Repeats) -> None:
        self._orchestrator = orchestrator
        self._intake = intake
        self._repeats = repeats

    async def RunTask(self, request: task_pb2.RunTaskRequest, context: Context) -> task_pb2.RunTaskResponse:
        """Run one task as a run of its own."""
        wait_s = wait_from_proto(request.wait, "wait")
        tasks.check_request_id(request.request_id)
        request_id = request.request_id
        bundles = [request.bundle] if request.HasField("bundle") else []
        name = request.task.function or FUNCTION_NAME
        request.tenant, reach = callers.tenant_named(request.tenant), callers.reach()
        functions = self._intake.functions({name: request.function}, bundles, Reach(request.tenant, reach.is_any))
        task = task_pb2.TaskSpec()
        task.CopyFrom(request.task)
        task.function = name
        task.task_id = task.task_id or "task"
        spec = WorkflowSpec(
            tasks=self._intake.tasks([task], functions),
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
            timeout_s=tasks.limit_from_proto(request, "timeout", "timeout"),
            reach=reach,
        )
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
        # Tasks keep their places, since a run only grows; so a task's place is a name for it.
        start = number_after(request) or 0
        rows = (
            (place, task_id)
            for place, (task_id, record) in enumerate(islice(entry.run.tasks.items(), start, None), start + 1)
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

        return await self._repeats.once(request, cancel)

    async def ExplainTask(self, request: task_pb2.ExplainTaskRequest, context: Context) -> task_pb2.ExplainTaskResponse:
        """Say what a task waits for."""
        reach = callers.reach()
        entry = self._orchestrator.task(request.run_id, request.task_id, reach)
        explanation = await self._orchestrator.explain(request.run_id, request.task_id, reach)
        shown = task_to_proto(entry, request.task_id)
        return _explanation_to_proto(explanation, shown)

    async def _wait(self, entry: RunEntry, task_id: str, wait_s: float) -> None:
        record = entry.run.tasks[task_id]
        try:
            async with asyncio.timeout(wait_s):
                while record.state not in TASK_TERMINAL:
                    await entry.log.changed()
        except TimeoutError:
            return


def _explanation_to_proto(explanation: Explanation, task: run_pb2.TaskRun) -> task_pb2.ExplainTaskResponse:
    response = task_pb2.ExplainTaskResponse(task=task, waited=payloads.duration(explanation.waited_s))
    if explanation.start_in_s is not None:
        response.start_in.CopyFrom(payloads.duration(explanation.start_in_s))
    for reason in explanation.reasons:
        response.reasons.add(
            kind=REASON_KIND_TO_PROTO[reason.kind],
            message=reason.message,
            task_id=reason.task_id,
            node_id=reason.node_id,
            resource=RESOURCE_KIND_TO_PROTO.get(reason.resource, resources_pb2.RESOURCE_KIND_UNSPECIFIED),
            wanted=reason.wanted,
            free=reason.free,
        )
    return response
