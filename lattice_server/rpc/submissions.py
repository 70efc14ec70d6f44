"""Owns how a graph that a caller sends becomes one of the core, inline or in parts.

Rule: a graph in parts is the same, and is refused for the same reasons, as one in a single message.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lattice.v1 import task_pb2, workflow_pb2

from lattice_server.core.errors import ConflictError, NotFoundError, invalid_field
from lattice_server.core.model import Function, TaskSpec, WorkflowSpec
from lattice_server.core.tenancy import Reach, id_of, key_of
from lattice_server.engine.draft_graphs import DraftGraph, DraftGraphs
from lattice_server.engine.slices import Slices
from lattice_server.rpc.convert.graphs import task_to_spec
from lattice_server.rpc.convert.tasks import MAX_ID_LENGTH, check_id
from lattice_server.rpc.fingerprints import GraphPrint
from lattice_server.rpc.request_parser import Intake
from lattice_server.rpc.sameness import reduce_values


@dataclass(frozen=True, slots=True)
class Submission:
    """A graph that came in. `print_parts` tell it from others, and `run_parts` a run of it from other runs. A draft
    that was used has no tasks any more."""

    spec: WorkflowSpec
    functions: Mapping[str, Function]
    print_parts: tuple[bytes, ...]
    run_parts: tuple[bytes, ...]
    draft_key: str
    is_used: bool

    def check(self) -> None:
        """Raise NotFoundError when its draft was used."""
        if self.is_used:
            draft_id = id_of(self.draft_key)
            text = f"draft {draft_id!r} was used; send its parts again"
            raise NotFoundError("DRAFT_NOT_FOUND", text, metadata={"draft_id": draft_id})


class Submissions:
    """Takes graphs in, in slices.

    A draft is found by the tenant of its caller's `reach`. Code is kept for the tenant whose run or workflow it is.
    """

    def __init__(self, intake: Intake, drafts: DraftGraphs, slices: Slices) -> None:
        self._intake = intake
        self._drafts = drafts
        self._slices = slices

    async def graph(self, message: workflow_pb2.WorkflowSpec, reach: Reach, tenant: str) -> Submission:
        """Check and return a workflow, without looking at its edges.

        What stays in `message` of its code are digests, so that requests that mean the same are the same.

        Raises InvalidError, ConflictError, ExhaustedError, NotFoundError, PreconditionError.
        """
        draft, key = self._draft(message.draft_id, reach)
        print_ = _print_of(draft)
        functions = self._functions(message, {} if draft is None else draft.functions, Reach(tenant, reach.is_any))
        print_.add_functions(functions)
        tasks = [] if draft is None else list(draft.tasks)
        if draft is not None and draft.is_used:
            # Its functions are gone; what it was is all that can be told.
            async for task in self._slices.each(message.tasks):
                print_.add_task(task)
        else:
            tasks += await self.tasks(message.tasks, functions, print_)
        spec = self._intake.workflow(message, tuple(tasks))
        head = workflow_pb2.WorkflowSpec(
            display_name=message.display_name, failure_policy=message.failure_policy, parameters=message.parameters
        )
        parts = (head.SerializeToString(deterministic=True), *print_.parts())
        reduce_values(head.parameters.values())
        run_parts = (head.SerializeToString(deterministic=True), *print_.run_parts())
        is_used = draft is not None and draft.is_used
        return Submission(spec, functions, parts, run_parts, key, is_used)

    async def added(self, request: workflow_pb2.AddTasksRequest, reach: Reach, tenant: str) -> list[TaskSpec]:
        """Check and return what is to be added to a run. Raises as `graph`."""
        draft, _ = self._draft(request.source_draft_id, reach)
        functions = self._functions(request, {} if draft is None else draft.functions, Reach(tenant, reach.is_any))
        before = [] if draft is None else list(draft.tasks)
        return before + await self.tasks(request.tasks, functions)

    async def part(self, request: workflow_pb2.AddTasksRequest, revision: int | None, reach: Reach) -> int:
        """Add to a draft; return its revision.

        Raises AbortedError when it has not the expected revision, and as `graph`.
        """
        if not request.draft_id:
            raise invalid_field("draft_id", f"must have 1 to {MAX_ID_LENGTH} characters")
        check_id(request.draft_id, "draft_id")
        key = key_of(request.draft_id, reach.tenant)
        size, count = request.ByteSize(), len(request.tasks)
        known = self._drafts.expect(key, reach.tenant, revision, size, count)
        print_ = _print_of(self._drafts.get(key) if known else None)
        functions = self._functions(request, known, reach)
        print_.add_functions(functions)
        tasks = await self.tasks(request.tasks, functions, print_)
        # Another part may have come meanwhile.
        self._drafts.expect(key, reach.tenant, revision, size, count)
        return self._drafts.add(key, functions, tasks, size, print_, reach).revision

    async def definition(self, message: workflow_pb2.WorkflowSpec, found: Submission) -> workflow_pb2.WorkflowSpec:
        """Return the definition of a workflow for those who read it back, with the parts that came before."""
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
        print_: GraphPrint | None = None,
    ) -> list[TaskSpec]:
        """Check and return tasks, and add them to a print. Raises InvalidError, ExhaustedError."""
        tasks: list[TaskSpec] = []
        async for message in self._slices.each(messages):
            tasks.append(self._intake.task(message, f"tasks[{len(tasks)}]", functions))
            if print_ is not None:
                print_.add_task(message)
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
        return merged(known, self._intake.functions(message.functions, message.bundles, reach))


def merged(known: Mapping[str, Function], added: Mapping[str, Function]) -> dict[str, Function]:
    """Return functions by name. Raises ConflictError when a name means two."""
    for name, function in added.items():
        if name in known and known[name].digest != function.digest:
            raise ConflictError("WORKFLOW_ID_CONFLICT", f"function {name!r} exists with other content")
    return {**known, **added}


def _print_of(draft: DraftGraph | None) -> GraphPrint:
    if draft is None:
        return GraphPrint()
    assert isinstance(draft.print_, GraphPrint)
    return draft.print_.copy()
