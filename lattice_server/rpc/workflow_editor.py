"""Stores and changes workflows, and adds tasks to workflows, runs and drafts.

Rule: a change is checked as a whole, and applied only while the revision it was checked against is current.
"""

from dataclasses import replace

from lattice.v1 import workflow_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.run import dag
from lattice_server.core.tenancy import Reach, key_of
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.entry import fingerprint
from lattice_server.engine.slices import Slices
from lattice_server.engine.workflows.draft_graphs import DraftGraphs
from lattice_server.engine.workflows.workflow_store import WorkflowEntry, WorkflowStore, expect_revision
from lattice_server.rpc import callers
from lattice_server.rpc.convert.environment import secrets_from_proto
from lattice_server.rpc.convert.runs import definition_of, workflow_to_proto
from lattice_server.rpc.convert.tasks import check_id
from lattice_server.rpc.graph_builder import GraphBuilder, merged
from lattice_server.rpc.spec_parser import SpecParser


class WorkflowEditor:
    """Carries out `CreateWorkflow`, `AddTasks` and `AddEdges`. Every method raises LatticeError for a refusal."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        library: WorkflowStore,
        drafts: DraftGraphs,
        parser: SpecParser,
        graphs: GraphBuilder,
        slices: Slices,
    ) -> None:
        self._orchestrator = orchestrator
        self._library = library
        self._drafts = drafts
        self._parser = parser
        self._graphs = graphs
        self._slices = slices

    async def create(self, request: workflow_pb2.CreateWorkflowRequest) -> workflow_pb2.CreateWorkflowResponse:
        """Store a workflow, or only check it."""
        reach = callers.reach()
        found = await self._graphs.graph(request.spec, reach, reach.tenant)
        if request.validate_only:
            found.check()
            await self._slices.finish(dag.building(found.spec))
            return workflow_pb2.CreateWorkflowResponse(workflow=workflow_pb2.Workflow(spec=request.spec))
        check_id(request.workflow_id, "workflow_id")
        own_fingerprint = fingerprint(*found.parts)
        entry = self._library.find(request.workflow_id, own_fingerprint, reach.tenant)
        if entry is not None:
            return workflow_pb2.CreateWorkflowResponse(workflow=workflow_to_proto(entry))
        found.check()
        graph = await self._slices.finish(dag.building(found.spec))
        definition = await self._graphs.definition(request.spec, found)
        size, functions = definition.ByteSize(), dict(found.functions)
        entry, created = self._library.create(
            request.workflow_id, found.spec, functions, definition, own_fingerprint, size, graph, reach=reach
        )
        self._drafts.use_up(found.draft_key)
        return workflow_pb2.CreateWorkflowResponse(workflow=workflow_to_proto(entry), created=created)

    async def add_tasks(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        """Add tasks to a stored workflow, a run or a draft."""
        parent = request.WhichOneof("parent")
        if request.secrets and parent != "run_id":
            raise invalid_field("secrets", "only a run has secrets")
        if request.source_draft_id and parent != "run_id":
            raise invalid_field("source_draft_id", "only the tasks of a run can come from a draft")
        match parent:
            case "run_id":
                revision = await self._add_to_run(request)
            case "workflow_id":
                revision = await self._add_to_workflow(request)
            case "draft_id":
                revision = await self._graphs.part(request, _expected_revision(request), callers.reach())
            case _:
                raise invalid_field("parent", "name the workflow, run or draft that gets the tasks")
        return workflow_pb2.AddTasksResponse(revision=revision)

    async def add_edges(self, request: workflow_pb2.AddEdgesRequest) -> workflow_pb2.AddEdgesResponse:
        """Add order-only edges to a stored workflow."""
        entry = self._expect(request)
        tasks = {task.task_id: task for task in entry.spec.tasks}
        for index, edge in enumerate(request.edges):
            for name in (edge.source_task_id, edge.target_task_id):
                if name not in tasks:
                    raise invalid_field(f"edges[{index}]", f"there is no task {name!r}")
            target = tasks[edge.target_task_id]
            if edge.source_task_id not in target.after:
                tasks[target.task_id] = replace(target, after=(*target.after, edge.source_task_id))
        definition = _merged(definition_of(entry), workflow_pb2.WorkflowSpec())
        for message in definition.tasks:
            message.after[:] = tasks[message.task_id].after
        changed = replace(entry.spec, tasks=tuple(tasks.values()))
        size = definition.ByteSize()
        self._library.change(entry, changed, entry.functions, definition, size, reach=callers.reach())
        return workflow_pb2.AddEdgesResponse(revision=entry.revision)

    async def _add_to_run(self, request: workflow_pb2.AddTasksRequest) -> int:
        reach = callers.reach()
        secrets = secrets_from_proto(request.secrets)
        request.ClearField("secrets")
        tenant = self._orchestrator.run(request.run_id, reach).run.tenant
        tasks = await self._graphs.added(request, reach, tenant)
        if not tasks:
            raise invalid_field("tasks", "there is nothing to add")
        entry = await self._orchestrator.add_tasks(request.run_id, tasks, _expected_revision(request), reach, secrets)
        self._drafts.use_up(key_of(request.source_draft_id, reach.tenant))
        return entry.run.revision

    async def _add_to_workflow(self, request: workflow_pb2.AddTasksRequest) -> int:
        entry = self._expect(request)
        reach = callers.reach()
        added = self._parser.functions(request.functions, request.bundles, Reach(entry.tenant, reach.is_any))
        tasks = await self._graphs.tasks(request.tasks, merged(entry.functions, added))
        while True:
            entry = self._expect(request)
            revision = entry.revision
            changed = replace(entry.spec, tasks=entry.spec.tasks + tuple(tasks))
            graph = await self._slices.finish(dag.building(changed))
            if self._library.workflows.find(request.workflow_id, reach) is entry and entry.revision == revision:
                break
        functions = merged(entry.functions, added)
        addition = workflow_pb2.WorkflowSpec(functions=request.functions, tasks=request.tasks)
        definition = _merged(definition_of(entry), addition)
        self._library.change(entry, changed, functions, definition, definition.ByteSize(), graph, reach=reach)
        return entry.revision

    def _expect(self, request: workflow_pb2.AddTasksRequest | workflow_pb2.AddEdgesRequest) -> WorkflowEntry:
        """Return the workflow of a request. Raises AbortedError when it does not have the expected revision."""
        entry = self._library.get(request.workflow_id, callers.reach())
        expect_revision(f"workflow {request.workflow_id!r}", entry.revision, _expected_revision(request))
        return entry


def _expected_revision(request: workflow_pb2.AddTasksRequest | workflow_pb2.AddEdgesRequest) -> int | None:
    """Return the revision that a caller expects; None for any."""
    return request.expected_revision if request.HasField("expected_revision") else None


def _merged(first: workflow_pb2.WorkflowSpec, second: workflow_pb2.WorkflowSpec) -> workflow_pb2.WorkflowSpec:
    merged = workflow_pb2.WorkflowSpec()
    merged.CopyFrom(first)
    merged.MergeFrom(second)
    return merged
