"""Starts runs from requests. Rule: the same run id with the same content returns the run that exists."""

from lattice.v1 import workflow_pb2

from lattice_server.core.errors import InvalidError, invalid_field
from lattice_server.core.model import WorkflowSpec
from lattice_server.core.tenancy import Reach
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.entry import RunEntry, fingerprint
from lattice_server.engine.workflows.draft_graphs import DraftGraphs
from lattice_server.engine.workflows.workflow_store import WorkflowStore
from lattice_server.rpc import callers
from lattice_server.rpc.convert.environment import secrets_from_proto
from lattice_server.rpc.convert.tasks import check_id, check_request_id
from lattice_server.rpc.convert.times import disconnect_grace_from_proto, limit_from_proto
from lattice_server.rpc.fingerprints import drop_pickles
from lattice_server.rpc.graph_builder import GraphBuilder, SubmittedGraph
from lattice_server.rpc.spec_parser import SpecParser


class RunStarter:
    """Starts runs of inline graphs, drafts and stored workflows."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        library: WorkflowStore,
        drafts: DraftGraphs,
        parser: SpecParser,
        graphs: GraphBuilder,
    ) -> None:
        self._orchestrator = orchestrator
        self._library = library
        self._drafts = drafts
        self._parser = parser
        self._graphs = graphs

    async def start(self, request: workflow_pb2.RunWorkflowRequest, *, is_open: bool = False) -> tuple[RunEntry, bool]:
        """Start a run, or find the run that the same request started; return it and whether it was created.

        The request is changed. Raises LatticeError.
        """
        request.tenant, reach = callers.tenant_named(request.tenant), callers.reach()
        # Taken out at once: nothing that is made of the request, such as its fingerprint, may hold them.
        secrets = secrets_from_proto(request.secrets)
        request.ClearField("secrets")
        check_id(request.run_id, "run_id")
        check_request_id(request.request_id)
        graph, spec = await self._source(request, reach, is_open)
        request_id, parameters = request.request_id, self._parser.payloads(request.parameters, "parameters")
        run_fingerprint = _fingerprint(request, graph, is_open)
        if entry := self._orchestrator.known(request.run_id, run_fingerprint, request.tenant, request_id, secrets):
            return entry, False
        if graph is not None:
            graph.check()
        if not spec.tasks and not is_open:
            raise InvalidError("INVALID_WORKFLOW", "the workflow has no tasks")
        started = await self._orchestrator.submit(
            request.run_id,
            spec,
            parameters=parameters,
            labels=dict(request.labels),
            tenant=request.tenant,
            priority=request.priority,
            fingerprint=run_fingerprint,
            request_id=request_id,
            workflow_id=request.workflow_id,
            timeout_s=limit_from_proto(request, "timeout", "timeout"),
            disconnect_grace_s=disconnect_grace_from_proto(request),
            is_open=is_open,
            reach=reach,
            secrets=secrets,
        )
        if graph is not None:
            self._drafts.use_up(graph.draft_key)
        return started

    async def start_open(self, request: workflow_pb2.RunWorkflowRequest) -> tuple[RunEntry, bool]:
        """Start an open run, as `start` does."""
        return await self.start(request, is_open=True)

    async def _source(
        self, request: workflow_pb2.RunWorkflowRequest, reach: Reach, is_open: bool
    ) -> tuple[SubmittedGraph | None, WorkflowSpec]:
        match request.WhichOneof("source"):
            case "workflow":
                graph = await self._graphs.graph(request.workflow, reach, request.tenant)
                request.ClearField("workflow")
                return graph, graph.spec
            case "workflow_id":
                return None, self._library.get(request.workflow_id, reach).spec
            case None if is_open:
                return None, WorkflowSpec(tasks=())
            case _:
                raise invalid_field("source", "a run needs a workflow, inline or by workflow_id")


def _fingerprint(request: workflow_pb2.RunWorkflowRequest, graph: SubmittedGraph | None, is_open: bool) -> str:
    """Return the fingerprint of a run; empty without a run id, since then no later call can name the run."""
    if not request.run_id:
        return ""
    request.ClearField("request_id")
    drop_pickles(request.parameters.values())
    parts: tuple[bytes, ...] = (b"open",) if is_open else ()
    if graph is not None:
        parts += graph.run_parts
    return fingerprint(request.SerializeToString(deterministic=True), *parts)
