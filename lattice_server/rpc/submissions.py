"""Owns how a graph that a caller sends becomes one of the core, inline or in parts.

Rule: a graph in parts is the same, and is refused for the same reasons, as one in a single message.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lattice.v1 import task_pb2, workflow_pb2

from lattice_server.core.errors import ConflictError, NotFoundError, invalid_field
from lattice_server.core.model import Function, TaskSpec, WorkflowSpec
from lattice_server.engine.drafts import Draft, Drafts
from lattice_server.engine.slices import Slices
from lattice_server.rpc.definitions import MAX_ID_LENGTH
from lattice_server.rpc.graphs import task_to_spec
from lattice_server.rpc.intake import Intake
from lattice_server.rpc.prints import GraphPrint


@dataclass(frozen=True, slots=True)
class Submission:
    """A graph that came in. `print_parts` tell it from others. A draft that was used has no tasks any more."""

    spec: WorkflowSpec
    functions: Mapping[str, Function]
    print_parts: tuple[bytes, ...]
    draft_id: str
    is_used: bool

    def check(self) -> None:
        """Raise NotFoundError when its draft was used."""
        if self.is_used:
            text = f"draft {self.draft_id!r} was used; send its parts again"
            raise NotFoundError("DRAFT_NOT_FOUND", text, metadata={"draft_id": self.draft_id})


class Submissions:
    """Takes graphs in, in slices."""

    def __init__(self, intake: Intake, drafts: Drafts, slices: Slices) -> None:
        self._intake = intake
        self._drafts = drafts
        self._slices = slices

    async def graph(self, message: workflow_pb2.WorkflowSpec) -> Submission:
        """Check and return a workflow, without looking at its edges.

        What stays in `message` of its code are digests, so that requests that mean the same are the same.

        Raises InvalidError, ConflictError, ExhaustedError, NotFoundError, PreconditionError.
        """
        draft = self._drafts.get(message.draft_id) if message.draft_id else None
        print_ = _print_of(draft)
        functions = self._functions(message, {} if draft is None else draft.functions)
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
        return Submission(spec, functions, parts, message.draft_id, draft is not None and draft.is_used)

    async def added(self, request: workflow_pb2.AddTasksRequest) -> list[TaskSpec]:
        """Check and return what is to be added to a run. Raises as `graph`."""
        draft = self._drafts.get(request.source_draft_id) if request.source_draft_id else None
        functions = self._functions(request, {} if draft is None else draft.functions)
        before = [] if draft is None else list(draft.tasks)
        return before + await self.tasks(request.tasks, functions)

    async def part(self, request: workflow_pb2.AddTasksRequest, revision: int | None) -> int:
        """Add to a draft; return its revision.

        Raises AbortedError when it has not the expected revision, and as `graph`.
        """
        draft_id = request.draft_id
        if not draft_id or len(draft_id) > MAX_ID_LENGTH:
            raise invalid_field("draft_id", f"must have 1 to {MAX_ID_LENGTH} characters")
        size, count = request.ByteSize(), len(request.tasks)
        known = self._drafts.expect(draft_id, revision, size, count)
        print_ = _print_of(self._drafts.get(draft_id) if known else None)
        functions = self._functions(request, known)
        print_.add_functions(functions)
        tasks = await self.tasks(request.tasks, functions, print_)
        # Another part may have come meanwhile.
        self._drafts.expect(draft_id, revision, size, count)
        return self._drafts.add(draft_id, functions, tasks, size, print_).revision

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

    def _functions(
        self, message: workflow_pb2.WorkflowSpec | workflow_pb2.AddTasksRequest, known: Mapping[str, Function]
    ) -> dict[str, Function]:
        return merged(known, self._intake.functions(message.functions, message.bundles))


def merged(known: Mapping[str, Function], added: Mapping[str, Function]) -> dict[str, Function]:
    """Return functions by name. Raises ConflictError when a name means two."""
    for name, function in added.items():
        if name in known and known[name].digest != function.digest:
            raise ConflictError("WORKFLOW_ID_CONFLICT", f"function {name!r} exists with other content")
    return {**known, **added}


def _print_of(draft: Draft | None) -> GraphPrint:
    if draft is None:
        return GraphPrint()
    assert isinstance(draft.print_, GraphPrint)
    return draft.print_.copy()
