"""Builds the graphs that callers submit, in one message or in the parts of a draft.

Rule: a graph in parts is accepted or refused exactly as the same graph in one message.
"""

from collections.abc import Iterable, Mapping

from lattice.v1 import task_pb2, workflow_pb2

from lattice_server.core.errors import ConflictError, NotFoundError, invalid_field
from lattice_server.core.frozen import frozen
from lattice_server.core.model import Function, TaskSpec, WorkflowSpec
from lattice_server.core.tenancy import Reach, id_of, key_of
from lattice_server.engine.slices import Slices
from lattice_server.engine.workflows.draft_graphs import DraftGraph, DraftGraphs
from lattice_server.rpc.convert.tasks import MAX_ID_LENGTH, check_id, task_to_spec
from lattice_server.rpc.fingerprints import GraphFingerprint, drop_pickles
from lattice_server.rpc.spec_parser import SpecParser


@frozen
class SubmittedGraph:
    """A graph of a caller with the parts of its fingerprint as a stored workflow, and as a run.

    The graph of a draft that was used before has no tasks any more.
    """

    spec: WorkflowSpec
    functions: Mapping[str, Function]
    parts: tuple[bytes, ...]
    run_parts: tuple[bytes, ...]
    draft_key: str
    is_used: bool

    def check(self) -> None:
        """Raise NotFoundError when its draft was used."""
        if self.is_used:
            draft_id = id_of(self.draft_key)
            text = f"draft {draft_id!r} was used; send its parts again"
            raise NotFoundError("DRAFT_NOT_FOUND", text, metadata={"draft_id": draft_id})


class GraphBuilder:
    """Checks and builds graphs, in slices.

    A draft belongs to the tenant of its caller's `reach`. Code is stored for the tenant of the run or the workflow.
    """

    def __init__(self, parser: SpecParser, drafts: DraftGraphs, slices: Slices) -> None:
        self._parser = parser
        self._drafts = drafts
        self._slices = slices

    async def graph(self, message: workflow_pb2.WorkflowSpec, reach: Reach, tenant: str) -> SubmittedGraph:
        """Check and return a workflow, without checking its edges.

        The code in `message` is replaced by its digests.

        Raises InvalidError, ConflictError, ExhaustedError, NotFoundError, PreconditionError.
        """
        draft, key = self._draft(message.draft_id, reach)
        fingerprint = _fingerprint_of(draft)
        functions = self._functions(message, {} if draft is None else draft.functions, Reach(tenant, reach.is_any))
        fingerprint.add_functions(functions)
        tasks = [] if draft is None else list(draft.tasks)
        if draft is not None and draft.is_used:
            # Its functions are gone, so only the fingerprint can be made.
            async for task in self._slices.each(message.tasks):
                fingerprint.add_task(task)
        else:
            tasks += await self.tasks(message.tasks, functions, fingerprint)
        spec = self._parser.workflow(message, tuple(tasks))
        head = workflow_pb2.WorkflowSpec(
            display_name=message.display_name, failure_policy=message.failure_policy, parameters=message.parameters
        )
        parts = (head.SerializeToString(deterministic=True), *fingerprint.parts())
        drop_pickles(head.parameters.values())
        run_parts = (head.SerializeToString(deterministic=True), *fingerprint.run_parts())
        is_used = draft is not None and draft.is_used
        return SubmittedGraph(spec, functions, parts, run_parts, key, is_used)

    async def added(self, request: workflow_pb2.AddTasksRequest, reach: Reach, tenant: str) -> list[TaskSpec]:
        """Check and return the tasks to add to a run. Raises as `graph`."""
        draft, _ = self._draft(request.source_draft_id, reach)
        functions = self._functions(request, {} if draft is None else draft.functions, Reach(tenant, reach.is_any))
        before = [] if draft is None else list(draft.tasks)
        return before + await self.tasks(request.tasks, functions)

    async def part(self, request: workflow_pb2.AddTasksRequest, revision: int | None, reach: Reach) -> int:
        """Add a part to a draft; return the draft's revision.

        Raises AbortedError when the draft does not have the expected revision, and as `graph`.
        """
        if not request.draft_id:
            raise invalid_field("draft_id", f"must have 1 to {MAX_ID_LENGTH} characters")
        check_id(request.draft_id, "draft_id")
        key = key_of(request.draft_id, reach.tenant)
        size, count = request.ByteSize(), len(request.tasks)
        known = self._drafts.expect(key, reach.tenant, revision, size, count)
        fingerprint = _fingerprint_of(self._drafts.get(key) if known else None)
        functions = self._functions(request, known, reach)
        fingerprint.add_functions(functions)
        tasks = await self.tasks(request.tasks, functions, fingerprint)
        # Another part may have been added meanwhile.
        self._drafts.expect(key, reach.tenant, revision, size, count)
        return self._drafts.add(key, functions, tasks, size, fingerprint, reach).revision

    async def definition(self, message: workflow_pb2.WorkflowSpec, found: SubmittedGraph) -> workflow_pb2.WorkflowSpec:
        """Return the definition of a workflow to show to callers, with the parts of its draft."""
        if not message.draft_id:
            return message
        names = {function.digest: name for name, function in found.functions.items()}
        whole = workflow_pb2.WorkflowSpec()
        whole.CopyFrom(message)
        for field in ("draft_id", "tasks"):
            whole.ClearField(field)
        for name, function in found.functions.items():
            whole.functions[name].digest = function.digest
        async for task in self._slices.each(found.spec.tasks):
            shown = task_to_spec(task)
            shown.function = names[shown.function]
            whole.tasks.append(shown)
        return whole

    async def tasks(
        self,
        messages: Iterable[task_pb2.TaskSpec],
        functions: Mapping[str, Function],
        fingerprint: GraphFingerprint | None = None,
    ) -> list[TaskSpec]:
        """Check and return tasks, and add them to a fingerprint. Raises InvalidError, ExhaustedError."""
        tasks: list[TaskSpec] = []
        async for message in self._slices.each(messages):
            tasks.append(self._parser.task(message, f"tasks[{len(tasks)}]", functions))
            if fingerprint is not None:
                fingerprint.add_task(message)
        return tasks

    def _draft(self, draft_id: str, reach: Reach) -> tuple[DraftGraph | None, str]:
        """Return a draft and its key; None when no draft is named. Raises NotFoundError."""
        key = key_of(draft_id, reach.tenant)
        return self._drafts.get(key) if draft_id else None, key

    def _functions(
        self,
        message: workflow_pb2.WorkflowSpec | workflow_pb2.AddTasksRequest,
        known: Mapping[str, Function],
        reach: Reach,
    ) -> dict[str, Function]:
        return merged(known, self._parser.functions(message.functions, message.bundles, reach))


def merged(known: Mapping[str, Function], added: Mapping[str, Function]) -> dict[str, Function]:
    """Return all functions by name. Raises ConflictError when one name has two functions."""
    for name, function in added.items():
        if name in known and known[name].digest != function.digest:
            raise ConflictError("WORKFLOW_ID_CONFLICT", f"function {name!r} exists with other content")
    return {**known, **added}


def _fingerprint_of(draft: DraftGraph | None) -> GraphFingerprint:
    if draft is None:
        return GraphFingerprint()
    assert isinstance(draft.print_, GraphFingerprint)
    return draft.print_.copy()
