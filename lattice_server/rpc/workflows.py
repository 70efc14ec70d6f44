"""Serves `WorkflowService`."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from itertools import islice

from lattice.v1 import workflow_pb2, workflow_pb2_grpc

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import Isolation
from lattice_server.core.trust import is_trusted
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.entry import fingerprint
from lattice_server.engine.slices import Slices
from lattice_server.engine.workflows.draft_graphs import DraftGraphs
from lattice_server.engine.workflows.workflow_store import WorkflowStore
from lattice_server.rpc import callers
from lattice_server.rpc.convert.environment import secrets_from_proto
from lattice_server.rpc.convert.payloads import question_from_proto
from lattice_server.rpc.convert.runs import (
    graph_task_to_proto,
    result_to_proto,
    run_to_proto,
    run_to_view,
    workflow_to_proto,
)
from lattice_server.rpc.convert.tasks import check_id, check_request_id
from lattice_server.rpc.executions import ExecutionStreams, Recall, RunTask
from lattice_server.rpc.graph_builder import GraphBuilder
from lattice_server.rpc.handlers import Context, OnError
from lattice_server.rpc.open_runs import OpenRunStreams
from lattice_server.rpc.paging import is_full, number_after, page, page_limit
from lattice_server.rpc.recorded_runs import RunFilter, rows_of, shown
from lattice_server.rpc.request_cache import RequestCache
from lattice_server.rpc.run_starter import RunStarter
from lattice_server.rpc.spec_parser import SpecParser
from lattice_server.rpc.workflow_editor import WorkflowEditor


class WorkflowServicer(workflow_pb2_grpc.WorkflowServiceServicer):
    """The `WorkflowService`."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        library: WorkflowStore,
        drafts: DraftGraphs,
        parser: SpecParser,
        cache: RequestCache,
        slices: Slices,
        question_limit_bytes: int,
        run_task: RunTask,
        recall: Recall | None,
        on_error: OnError,
    ) -> None:
        self._orchestrator = orchestrator
        self._library = library
        self._cache = cache
        self._slices = slices
        self._question_limit_bytes = question_limit_bytes
        graphs = GraphBuilder(parser, drafts, slices)
        self._starter = RunStarter(orchestrator, library, drafts, parser, graphs)
        self._editor = WorkflowEditor(orchestrator, library, drafts, parser, graphs, slices)
        self._executions = ExecutionStreams(orchestrator, slices, self._starter.start, run_task, recall, on_error)
        starts = self._starter.start_open, self._add_tasks
        self._open_runs = OpenRunStreams(orchestrator, question_limit_bytes, *starts, recall, on_error)

    async def CreateWorkflow(
        self, request: workflow_pb2.CreateWorkflowRequest, context: Context
    ) -> workflow_pb2.CreateWorkflowResponse:
        """Store a workflow, or only check it."""
        return await self._editor.create(request)

    async def AddTasks(self, request: workflow_pb2.AddTasksRequest, context: Context) -> workflow_pb2.AddTasksResponse:
        """Add tasks to a stored workflow, to a run, or to a draft."""
        return await self._add_tasks(request)

    async def AddEdges(self, request: workflow_pb2.AddEdgesRequest, context: Context) -> workflow_pb2.AddEdgesResponse:
        """Add order-only edges to a stored workflow."""
        return await self._cache.once(request, partial(self._editor.add_edges, request))

    async def GetWorkflow(
        self, request: workflow_pb2.GetWorkflowRequest, context: Context
    ) -> workflow_pb2.GetWorkflowResponse:
        """Return a stored workflow."""
        entry = self._library.get(request.workflow_id, callers.reach())
        return workflow_pb2.GetWorkflowResponse(workflow=workflow_to_proto(entry))

    async def ListWorkflows(
        self, request: workflow_pb2.ListWorkflowsRequest, context: Context
    ) -> workflow_pb2.ListWorkflowsResponse:
        """List stored workflows, newest first."""
        after, reach = number_after(request), callers.reach()
        rows = (
            (entry.number, entry)
            for entry in reversed(self._library.workflows.values())
            if (after is None or entry.number < after) and reach.covers(entry.tenant)
        )
        show = partial(workflow_to_proto, is_brief=not is_full(request.view))
        workflows, token = page(request, rows, show)
        return workflow_pb2.ListWorkflowsResponse(workflows=workflows, next_page_token=token)

    async def DeleteWorkflow(
        self, request: workflow_pb2.DeleteWorkflowRequest, context: Context
    ) -> workflow_pb2.DeleteWorkflowResponse:
        """Delete a stored workflow."""

        async def delete() -> workflow_pb2.DeleteWorkflowResponse:
            self._library.delete(request.workflow_id, callers.reach())
            return workflow_pb2.DeleteWorkflowResponse()

        return await self._cache.once(request, delete)

    async def RunWorkflow(
        self, request: workflow_pb2.RunWorkflowRequest, context: Context
    ) -> workflow_pb2.RunWorkflowResponse:
        """Start a run."""
        entry, created = await self._starter.start(request)
        return workflow_pb2.RunWorkflowResponse(run=run_to_proto(entry), created=created)

    async def ExecuteWorkflow(
        self, request: workflow_pb2.ExecuteWorkflowRequest, context: Context
    ) -> AsyncIterator[workflow_pb2.ExecuteWorkflowResponse]:
        """Start a run; answer again when it has ended."""
        entry, created = await self._starter.start(request.run)
        accepted = workflow_pb2.RunWorkflowResponse(run=run_to_proto(entry), created=created)
        with self._orchestrator.tethers.held(entry, entry.disconnect_grace_s):
            yield workflow_pb2.ExecuteWorkflowResponse(accepted=accepted)
            await entry.log.completed()
        yield workflow_pb2.ExecuteWorkflowResponse(ended=await result_to_proto(entry, self._slices))
        self._orchestrator.ended.note_read(entry)

    async def ExecuteWorkflows(
        self, request_iterator: AsyncIterator[workflow_pb2.ExecuteWorkflowsRequest], context: Context
    ) -> AsyncIterator[workflow_pb2.ExecuteWorkflowsResponse]:
        """Start runs; answer again when each has ended."""
        async with contextlib.aclosing(self._executions.serve(request_iterator)) as responses:
            async for response in responses:
                yield response

    def stop(self) -> None:
        """End the streams that wait for nothing; see `ExecutionStreams.stop`."""
        self._executions.stop()

    async def OpenRun(
        self, request_iterator: AsyncIterator[workflow_pb2.OpenRunRequest], context: Context
    ) -> AsyncIterator[workflow_pb2.OpenRunResponse]:
        """Start a run that accepts tasks while its stream is open, or take one over."""
        async with contextlib.aclosing(self._open_runs.serve(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def GetRun(self, request: workflow_pb2.GetRunRequest, context: Context) -> workflow_pb2.GetRunResponse:
        """Return a run."""
        return workflow_pb2.GetRunResponse(
            run=run_to_view(self._orchestrator.run(request.run_id, callers.reach()), is_full=is_full(request.view))
        )

    async def GetRunGraph(
        self, request: workflow_pb2.GetRunGraphRequest, context: Context
    ) -> workflow_pb2.GetRunGraphResponse:
        """Return a page of the graph of a run."""
        run = self._orchestrator.run(request.run_id, callers.reach()).run
        start = number_after(request) or 0
        rows = enumerate(islice(run.tasks, start, None), start + 1)
        show = partial(graph_task_to_proto, run, is_brief=not is_full(request.view))
        tasks, token = page(request, rows, show)
        return workflow_pb2.GetRunGraphResponse(tasks=tasks, next_page_token=token, revision=run.revision)

    async def ListRuns(self, request: workflow_pb2.ListRunsRequest, context: Context) -> workflow_pb2.ListRunsResponse:
        """List runs, newest first."""
        tenant = callers.tenant_named(request.tenant) if request.tenant else ""
        wanted = RunFilter(set(request.states), request.labels, tenant, callers.reach())
        after, full = number_after(request), is_full(request.view)
        rows = await rows_of(self._orchestrator, wanted, after, page_limit(request))
        show = partial(shown, is_full=full)
        runs, token = page(request, rows, show)
        return workflow_pb2.ListRunsResponse(runs=runs, next_page_token=token)

    async def CancelRun(
        self, request: workflow_pb2.CancelRunRequest, context: Context
    ) -> workflow_pb2.CancelRunResponse:
        """Cancel a run."""

        async def cancel() -> workflow_pb2.CancelRunResponse:
            entry = self._orchestrator.cancel_run(request.run_id, request.reason, callers.reach())
            return workflow_pb2.CancelRunResponse(run=run_to_proto(entry))

        return await self._cache.once(request, cancel)

    async def DeleteRun(
        self, request: workflow_pb2.DeleteRunRequest, context: Context
    ) -> workflow_pb2.DeleteRunResponse:
        """Delete a run that has ended."""

        async def delete() -> workflow_pb2.DeleteRunResponse:
            self._orchestrator.delete_run(request.run_id, callers.reach())
            return workflow_pb2.DeleteRunResponse()

        return await self._cache.once(request, delete)

    async def SignalRun(
        self, request: workflow_pb2.SignalRunRequest, context: Context
    ) -> workflow_pb2.SignalRunResponse:
        """Send a signal to a run."""
        check_request_id(request.request_id)
        value = question_from_proto(request.value, self._question_limit_bytes, "value")
        if not is_trusted(value, Isolation.NONE):
            raise invalid_field("value", "it is a pickle of a sandboxed task, which a task would have to unpickle")
        entry = self._orchestrator.run(request.run_id, callers.reach())
        index = self._orchestrator.signals.send(entry, request.name, value, request.request_id)
        return workflow_pb2.SignalRunResponse(index=index)

    async def RetryRun(self, request: workflow_pb2.RetryRunRequest, context: Context) -> workflow_pb2.RetryRunResponse:
        """Start a run that takes over what another one finished."""
        secrets = secrets_from_proto(request.secrets)
        request.ClearField("secrets")
        check_id(request.new_run_id, "new_run_id")
        own_fingerprint = fingerprint(b"retry", request.run_id.encode()) if request.new_run_id else ""
        entry, created = await self._orchestrator.retry_run(
            request.run_id, request.new_run_id, own_fingerprint, callers.reach(), secrets
        )
        return workflow_pb2.RetryRunResponse(run=run_to_proto(entry), created=created)

    async def _add_tasks(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        return await self._cache.once(request, partial(self._editor.add_tasks, request))
