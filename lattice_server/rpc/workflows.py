"""Serves `WorkflowService`: convert, ask the orchestrator, convert back."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from itertools import islice

from lattice.v1 import workflow_pb2, workflow_pb2_grpc

from lattice_server.core.errors import InvalidError, invalid_field
from lattice_server.core.model import WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.tenancy import Reach, key_of
from lattice_server.engine.draft_graphs import DraftGraphs
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.run_entry import RunEntry, fingerprint
from lattice_server.engine.slices import Slices
from lattice_server.engine.workflow_store import WorkflowEntry, WorkflowStore, expect_revision
from lattice_server.rpc import callers
from lattice_server.rpc.context import Context
from lattice_server.rpc.convert import payloads, tasks
from lattice_server.rpc.convert.graphs import graph_task_to_proto
from lattice_server.rpc.convert.runs import RUN_STATE_TO_PROTO, result_to_proto, run_to_proto, run_to_view
from lattice_server.rpc.idempotency import Repeats
from lattice_server.rpc.open_runs import OpenRunStreams
from lattice_server.rpc.paging import is_full, number_after, page
from lattice_server.rpc.request_parser import Intake
from lattice_server.rpc.sameness import reduce_values
from lattice_server.rpc.submissions import Submission, Submissions, merged


class WorkflowServicer(workflow_pb2_grpc.WorkflowServiceServicer):
    """The `WorkflowService`."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        library: WorkflowStore,
        drafts: DraftGraphs,
        intake: Intake,
        repeats: Repeats,
        slices: Slices,
        question_limit_bytes: int,
    ) -> None:
        self._orchestrator = orchestrator
        self._library = library
        self._drafts = drafts
        self._intake = intake
        self._repeats = repeats
        self._slices = slices
        self._submissions = Submissions(intake, drafts, slices)
        start = partial(self._start, is_open=True)
        self._open_runs = OpenRunStreams(orchestrator, question_limit_bytes, start, self._add_once)

    async def CreateWorkflow(
        self, request: workflow_pb2.CreateWorkflowRequest, context: Context
    ) -> workflow_pb2.CreateWorkflowResponse:
        """Store a workflow, or only check it."""
        reach = callers.reach()
        found = await self._submissions.graph(request.spec, reach, reach.tenant)
        if request.validate_only:
            found.check()
            await self._slices.finish(dag.building(found.spec))
            return workflow_pb2.CreateWorkflowResponse(workflow=workflow_pb2.Workflow(spec=request.spec))
        print_ = fingerprint(*found.print_parts)
        tasks.check_id(request.workflow_id, "workflow_id")
        entry = self._library.find(request.workflow_id, print_, reach.tenant)
        if entry is not None:
            return workflow_pb2.CreateWorkflowResponse(workflow=_workflow_to_proto(entry))
        found.check()
        graph = await self._slices.finish(dag.building(found.spec))
        definition = await self._submissions.definition(request.spec, found)
        size, functions = definition.ByteSize(), dict(found.functions)
        entry, created = self._library.create(
            request.workflow_id, found.spec, functions, definition, print_, size, graph, reach=reach
        )
        self._drafts.use_up(found.draft_key)
        return workflow_pb2.CreateWorkflowResponse(workflow=_workflow_to_proto(entry), created=created)

    async def AddTasks(self, request: workflow_pb2.AddTasksRequest, context: Context) -> workflow_pb2.AddTasksResponse:
        """Add tasks to a stored workflow, to a run, or to a draft."""
        parent = request.WhichOneof("parent")
        if parent is None:
            raise invalid_field("parent", "tasks are added to a workflow, a run or a draft: name one")
        if request.source_draft_id and parent != "run_id":
            raise invalid_field("source_draft_id", "what a draft has can be added to a run only")
        return await self._add_once(request)

    async def _add_once(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        adds = {"run_id": self._add_to_run, "workflow_id": self._add_to_workflow, "draft_id": self._add_to_draft}
        add = adds[request.WhichOneof("parent") or "run_id"]
        return await self._repeats.once(request, partial(add, request))

    async def _add_to_draft(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        revision = await self._submissions.part(request, expected_revision(request), callers.reach())
        return workflow_pb2.AddTasksResponse(revision=revision)

    async def _add_to_workflow(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        entry = self._expect(request.workflow_id, expected_revision(request))
        reach = callers.reach()
        own = Reach(entry.tenant, reach.is_any)
        added = self._intake.functions(request.functions, request.bundles, own)
        merged(entry.functions, added)
        tasks = await self._submissions.tasks(request.tasks, merged(entry.functions, added))
        while True:
            entry, revision = self._expect(request.workflow_id, expected_revision(request)), entry.revision
            changed = replace(entry.spec, tasks=entry.spec.tasks + tuple(tasks))
            graph = await self._slices.finish(dag.building(changed))
            if self._library.workflows.find(request.workflow_id, reach) is entry and entry.revision == revision:
                break
        functions = merged(entry.functions, added)
        definition = workflow_pb2.WorkflowSpec(functions=request.functions, tasks=request.tasks)
        definition = _merged(_definition(entry), definition)
        self._library.change(entry, changed, functions, definition, definition.ByteSize(), graph, reach=reach)
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
        yield workflow_pb2.ExecuteWorkflowResponse(ended=await result_to_proto(entry, self._slices))
        self._orchestrator.ended.note_read(entry)

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
        tasks.check_id(request.new_run_id, "new_run_id")
        print_ = fingerprint(b"retry", request.run_id.encode()) if request.new_run_id else ""
        entry, created = await self._orchestrator.retry_run(request.run_id, request.new_run_id, print_, callers.reach())
        return workflow_pb2.RetryRunResponse(run=run_to_proto(entry), created=created)

    async def _start(self, request: workflow_pb2.RunWorkflowRequest, *, is_open: bool = False) -> tuple[RunEntry, bool]:
        request.tenant, reach = callers.tenant_named(request.tenant), callers.reach()
        tasks.check_id(request.run_id, "run_id")
        tasks.check_request_id(request.request_id)
        parts: tuple[bytes, ...] = (b"open",) if is_open else ()
        found: Submission | None = None
        match request.WhichOneof("source"):
            case "workflow":
                found = await self._submissions.graph(request.workflow, reach, request.tenant)
                spec, parts = found.spec, (*parts, *found.run_parts)
                request.ClearField("workflow")
            case "workflow_id":
                spec = self._library.get(request.workflow_id, reach).spec
            case None if is_open:
                spec = WorkflowSpec(tasks=())
            case _:
                raise invalid_field("source", "a run needs a workflow, inline or by workflow_id")
        request_id, parameters = request.request_id, self._intake.payloads(request.parameters, "parameters")
        request.ClearField("request_id")
        reduce_values(request.parameters.values())
        # Without an id nobody can repeat the call, so there is nothing to compare later.
        print_ = fingerprint(request.SerializeToString(deterministic=True), *parts) if request.run_id else ""
        if entry := self._orchestrator.known(request.run_id, print_, request.tenant, request_id):
            return entry, False
        if found is not None:
            found.check()
        if not spec.tasks and not is_open:
            raise InvalidError("INVALID_WORKFLOW", "the workflow has no tasks")
        started = await self._orchestrator.submit(
            request.run_id,
            spec,
            parameters=parameters,
            labels=dict(request.labels),
            tenant=request.tenant,
            priority=request.priority,
            fingerprint=print_,
            request_id=request_id,
            workflow_id=request.workflow_id,
            timeout_s=tasks.limit_from_proto(request, "timeout", "timeout"),
            is_open=is_open,
            reach=reach,
        )
        if found is not None:
            self._drafts.use_up(found.draft_key)
        return started

    async def _add_to_run(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        reach = callers.reach()
        tenant = self._orchestrator.run(request.run_id, reach).run.tenant
        tasks = await self._submissions.added(request, reach, tenant)
        if not tasks:
            raise invalid_field("tasks", "there is nothing to add")
        entry = await self._orchestrator.add_tasks(request.run_id, tasks, expected_revision(request), reach)
        self._drafts.use_up(key_of(request.source_draft_id, reach.tenant))
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
        create_time=payloads.timestamp(entry.created_s),
    )
