"""Serves `WorkflowService`: convert, ask the orchestrator, convert back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from itertools import islice

from lattice.v1 import workflow_pb2, workflow_pb2_grpc

from lattice_server.core import dag
from lattice_server.core.errors import ConflictError, InvalidError, invalid_field
from lattice_server.core.model import WorkflowSpec
from lattice_server.core.tenancy import Reach
from lattice_server.engine.library import WorkflowEntry, WorkflowLibrary, expect_revision
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.run_entry import RunEntry, fingerprint
from lattice_server.rpc import callers, convert, definitions
from lattice_server.rpc.context import Context
from lattice_server.rpc.events import RUN_STATE_TO_PROTO, result_to_proto, run_to_proto, run_to_view
from lattice_server.rpc.graphs import graph_task_to_proto
from lattice_server.rpc.intake import Intake
from lattice_server.rpc.open_runs import OpenRunStreams
from lattice_server.rpc.paging import is_full, number_after, page
from lattice_server.rpc.repeats import Repeats

LARGE_GRAPH = 1000


class WorkflowServicer(workflow_pb2_grpc.WorkflowServiceServicer):
    """The `WorkflowService`."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        library: WorkflowLibrary,
        intake: Intake,
        repeats: Repeats,
        question_limit_bytes: int,
    ) -> None:
        self._orchestrator = orchestrator
        self._library = library
        self._intake = intake
        self._repeats = repeats
        start = partial(self._start, is_open=True)
        self._open_runs = OpenRunStreams(orchestrator, question_limit_bytes, start, self._add_once)

    async def CreateWorkflow(
        self, request: workflow_pb2.CreateWorkflowRequest, context: Context
    ) -> workflow_pb2.CreateWorkflowResponse:
        """Store a workflow, or only check it."""
        reach = callers.reach()
        spec, functions = self._intake.spec(request.spec, reach)
        if request.validate_only:
            dag.build(spec)
            return workflow_pb2.CreateWorkflowResponse(workflow=workflow_pb2.Workflow(spec=request.spec))
        print_ = fingerprint(request.spec.SerializeToString(deterministic=True))
        size = request.spec.ByteSize()
        definition = request.spec
        definitions.check_id(request.workflow_id, "workflow_id")
        entry, created = self._library.create(
            request.workflow_id, spec, functions, definition, print_, size, reach=reach
        )
        return workflow_pb2.CreateWorkflowResponse(workflow=_workflow_to_proto(entry), created=created)

    async def AddTasks(self, request: workflow_pb2.AddTasksRequest, context: Context) -> workflow_pb2.AddTasksResponse:
        """Add tasks to a stored workflow, or to a run."""
        parent = request.WhichOneof("parent")
        if parent is None:
            raise invalid_field("parent", "tasks are added to a workflow or to a run: name one")
        return await self._add_once(request)

    async def _add_once(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        add = self._add_to_run if request.WhichOneof("parent") == "run_id" else self._add_to_workflow
        return await self._repeats.once(request, partial(add, request))

    async def _add_to_workflow(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        entry = self._expect(request.workflow_id, expected_revision(request))
        reach = callers.reach()
        added = self._intake.functions(request.functions, request.bundles, Reach(entry.tenant, reach.is_any))
        for name, function in added.items():
            if name in entry.functions and entry.functions[name].digest != function.digest:
                raise ConflictError("WORKFLOW_ID_CONFLICT", f"function {name!r} exists with other content")
        functions = {**entry.functions, **added}
        tasks = self._intake.tasks(request.tasks, functions)
        definition = workflow_pb2.WorkflowSpec(functions=request.functions, tasks=request.tasks)
        definition = _merged(_definition(entry), definition)
        changed = replace(entry.spec, tasks=entry.spec.tasks + tasks)
        self._library.change(entry, changed, functions, definition, definition.ByteSize(), reach=reach)
        return workflow_pb2.AddTasksResponse(revision=entry.revision)

    async def AddEdges(self, request: workflow_pb2.AddEdgesRequest, context: Context) -> workflow_pb2.AddEdgesResponse:
        """Add order-only edges to a stored workflow."""
        return await self._repeats.once(request, partial(self._add_edges, request))

    async def _add_edges(self, request: workflow_pb2.AddEdgesRequest) -> workflow_pb2.AddEdgesResponse:
        entry = self._expect(request.workflow_id, expected_revision(request))
        tasks = {task.task_id: task for task in entry.spec.tasks}
        for index, edge in enumerate(request.edges):
            for name in (edge.source_task_id, edge.target_task_id):
                if name not in tasks:
                    raise invalid_field(f"edges[{index}]", f"there is no task {name!r}")
            target = tasks[edge.target_task_id]
            if edge.source_task_id not in target.after:
                tasks[target.task_id] = replace(target, after=(*target.after, edge.source_task_id))
        definition = _merged(_definition(entry), workflow_pb2.WorkflowSpec())
        for message in definition.tasks:
            message.after[:] = tasks[message.task_id].after
        changed = replace(entry.spec, tasks=tuple(tasks.values()))
        size = definition.ByteSize()
        self._library.change(entry, changed, entry.functions, definition, size, reach=callers.reach())
        return workflow_pb2.AddEdgesResponse(revision=entry.revision)

    async def GetWorkflow(
        self, request: workflow_pb2.GetWorkflowRequest, context: Context
    ) -> workflow_pb2.GetWorkflowResponse:
        """Return a stored workflow."""
        entry = self._library.get(request.workflow_id, callers.reach())
        return workflow_pb2.GetWorkflowResponse(workflow=_workflow_to_proto(entry))

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
        show = partial(_workflow_to_proto, is_brief=not is_full(request.view))
        workflows, token = page(request, rows, show)
        return workflow_pb2.ListWorkflowsResponse(workflows=workflows, next_page_token=token)

    async def DeleteWorkflow(
        self, request: workflow_pb2.DeleteWorkflowRequest, context: Context
    ) -> workflow_pb2.DeleteWorkflowResponse:
        """Delete a stored workflow."""

        async def delete() -> workflow_pb2.DeleteWorkflowResponse:
            self._library.delete(request.workflow_id, callers.reach())
            return workflow_pb2.DeleteWorkflowResponse()

        return await self._repeats.once(request, delete)

    async def RunWorkflow(
        self, request: workflow_pb2.RunWorkflowRequest, context: Context
    ) -> workflow_pb2.RunWorkflowResponse:
        """Start a run."""
        entry, created = await self._start(request)
        return workflow_pb2.RunWorkflowResponse(run=run_to_proto(entry), created=created)

    async def ExecuteWorkflow(
        self, request: workflow_pb2.ExecuteWorkflowRequest, context: Context
    ) -> AsyncIterator[workflow_pb2.ExecuteWorkflowResponse]:
        """Start a run; answer again when it has ended."""
        entry, created = await self._start(request.run)
        accepted = workflow_pb2.RunWorkflowResponse(run=run_to_proto(entry), created=created)
        yield workflow_pb2.ExecuteWorkflowResponse(accepted=accepted)
        await entry.log.completed()
        yield workflow_pb2.ExecuteWorkflowResponse(ended=result_to_proto(entry))

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
        states = set(request.states)
        wanted = request.labels.items()
        tenant = callers.tenant_named(request.tenant) if request.tenant else ""
        after, reach = number_after(request), callers.reach()
        rows = (
            (entry.number, entry)
            for entry in reversed(self._orchestrator.runs.values())
            if (after is None or entry.number < after)
            and (not states or RUN_STATE_TO_PROTO[entry.run.state] in states)
            and (entry.run.tenant == tenant if tenant else reach.covers(entry.run.tenant))
            and all(entry.labels.get(key) == value for key, value in wanted)
        )
        runs, token = page(request, rows, partial(run_to_view, is_full=is_full(request.view)))
        return workflow_pb2.ListRunsResponse(runs=runs, next_page_token=token)

    async def CancelRun(
        self, request: workflow_pb2.CancelRunRequest, context: Context
    ) -> workflow_pb2.CancelRunResponse:
        """Cancel a run."""

        async def cancel() -> workflow_pb2.CancelRunResponse:
            entry = self._orchestrator.cancel_run(request.run_id, request.reason, callers.reach())
            return workflow_pb2.CancelRunResponse(run=run_to_proto(entry))

        return await self._repeats.once(request, cancel)

    async def RetryRun(self, request: workflow_pb2.RetryRunRequest, context: Context) -> workflow_pb2.RetryRunResponse:
        """Start a run that takes over what another one finished."""
        definitions.check_id(request.new_run_id, "new_run_id")
        print_ = fingerprint(b"retry", request.run_id.encode()) if request.new_run_id else ""
        entry, created = self._orchestrator.retry_run(request.run_id, request.new_run_id, print_, callers.reach())
        return workflow_pb2.RetryRunResponse(run=run_to_proto(entry), created=created)

    async def _start(self, request: workflow_pb2.RunWorkflowRequest, *, is_open: bool = False) -> tuple[RunEntry, bool]:
        request.tenant, reach = callers.tenant_named(request.tenant), callers.reach()
        match request.WhichOneof("source"):
            case "workflow":
                own = Reach(request.tenant, reach.is_any)
                functions = self._intake.functions(request.workflow.functions, request.workflow.bundles, own)
                if len(request.workflow.tasks) > LARGE_GRAPH:
                    # A graph this large takes long to convert; other callers and workers must not wait for it.
                    spec = await asyncio.to_thread(self._intake.graph, request.workflow, functions)
                else:
                    spec = self._intake.graph(request.workflow, functions)
            case "workflow_id":
                spec = self._library.get(request.workflow_id, reach).spec
            case None if is_open:
                spec = WorkflowSpec(tasks=())
            case _:
                raise invalid_field("source", "a run needs a workflow, inline or by workflow_id")
        if not spec.tasks and not is_open:
            raise InvalidError("INVALID_WORKFLOW", "the workflow has no tasks")
        definitions.check_id(request.run_id, "run_id")
        # Without an id nobody can repeat the call, so there is nothing to compare later.
        content = request.SerializeToString(deterministic=True)
        print_ = fingerprint(*[b"open"] * is_open, content) if request.run_id else ""
        return self._orchestrator.start_run(
            request.run_id,
            spec,
            parameters=self._intake.payloads(request.parameters, "parameters"),
            labels=dict(request.labels),
            tenant=request.tenant,
            priority=request.priority,
            fingerprint=print_,
            workflow_id=request.workflow_id,
            timeout_s=definitions.limit_from_proto(request, "timeout", "timeout"),
            is_open=is_open,
            reach=reach,
        )

    async def _add_to_run(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        if not request.tasks:
            raise invalid_field("tasks", "there is nothing to add")
        reach = callers.reach()
        tenant = self._orchestrator.run(request.run_id, reach).run.tenant
        functions = self._intake.functions(request.functions, request.bundles, Reach(tenant, reach.is_any))
        tasks = self._intake.tasks(request.tasks, functions)
        entry = self._orchestrator.add_tasks(request.run_id, tasks, expected_revision(request), reach)
        return workflow_pb2.AddTasksResponse(revision=entry.run.revision)

    def _expect(self, workflow_id: str, revision: int | None) -> WorkflowEntry:
        entry = self._library.get(workflow_id, callers.reach())
        expect_revision(f"workflow {workflow_id!r}", entry.revision, revision)
        return entry


def expected_revision(request: workflow_pb2.AddTasksRequest | workflow_pb2.AddEdgesRequest) -> int | None:
    """Return the revision a caller expects; None for any."""
    return request.expected_revision if request.HasField("expected_revision") else None


def _merged(first: workflow_pb2.WorkflowSpec, second: workflow_pb2.WorkflowSpec) -> workflow_pb2.WorkflowSpec:
    merged = workflow_pb2.WorkflowSpec()
    merged.CopyFrom(first)
    merged.MergeFrom(second)
    return merged


def _definition(entry: WorkflowEntry) -> workflow_pb2.WorkflowSpec:
    assert isinstance(entry.definition, workflow_pb2.WorkflowSpec)
    return entry.definition


def _workflow_to_proto(entry: WorkflowEntry, *, is_brief: bool = False) -> workflow_pb2.Workflow:
    spec, whole = workflow_pb2.WorkflowSpec(), _definition(entry)
    if is_brief:
        spec.display_name, spec.failure_policy = whole.display_name, whole.failure_policy
    else:
        spec.CopyFrom(whole)
    return workflow_pb2.Workflow(
        workflow_id=entry.workflow_id,
        revision=entry.revision,
        spec=spec,
        create_time=convert.timestamp(entry.created_s),
    )
