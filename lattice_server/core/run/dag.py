"""Owns the graph of a workflow: its validation and its growth.

Rule: tasks that do not fit change nothing, and only this module imports networkx.
"""

import re
from collections import ChainMap
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx

from lattice_server.core.errors import FieldViolation, InvalidError
from lattice_server.core.model import Artifact, OutputRef, Parameter, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.references import leaves
from lattice_server.core.steps import Steps, finish, stepwise

MAX_VIOLATIONS = 25
ITEM_ID = re.compile(r"(.+)\[\d+\]", re.DOTALL)


@dataclass(slots=True)
class Dag:
    """A validated graph. `successors` and `predecessors` list each neighbour once.

    `optional` has the edges whose target can start without the output. `split` lists by task the outputs that other
    tasks are mapped over. `artifacts` are those of inputs and parameters; all other values take `kept_bytes`.
    `parameters` are the names that inputs refer to.
    """

    tasks: dict[str, TaskSpec] = field(default_factory=dict)
    successors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    predecessors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    optional: set[tuple[str, str]] = field(default_factory=set)
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    kept_bytes: int = 0
    parameters: set[str] = field(default_factory=set)

    def descendants(self, task_id: str) -> list[str]:
        """Return the tasks that depend on a task directly or indirectly, each once."""
        found: dict[str, None] = {}
        frontier = [task_id]
        while frontier:
            for successor in self.successors[frontier.pop()]:
                if successor not in found:
                    found[successor] = None
                    frontier.append(successor)
        return list(found)

    def final_task_ids(self) -> list[str]:
        """Return the tasks no other task depends on, in the order of definition."""
        return [task_id for task_id in self.tasks if not self.successors[task_id]]

    def add_item(self, spec: TaskSpec) -> None:
        """Add one item of a mapped task; only the mapped task has edges."""
        self.tasks[spec.task_id] = spec
        self.successors[spec.task_id] = self.predecessors[spec.task_id] = ()


def build(spec: WorkflowSpec, parameters: Iterable[str] | None = None) -> Dag:
    """Validate `spec` and return its graph.

    Args:
        spec: the workflow; tasks in any order.
        parameters: the names that a run provides; None for a workflow without a run, which may use any name.

    Raises:
        InvalidError: reason INVALID_WORKFLOW with the fields at fault, or WORKFLOW_CYCLE naming the cycle.
    """
    return finish(building(spec, parameters))


def building(spec: WorkflowSpec, parameters: Iterable[str] | None = None) -> Steps[Dag]:
    """As `build`, in steps."""
    dag = Dag(
        artifacts=[p.content for p in spec.parameters.values() if isinstance(p.content, Artifact)],
        kept_bytes=sum(payload.kept_bytes for payload in spec.parameters.values()),
    )
    given = None if parameters is None else set(parameters)
    extension = yield from extending(dag, spec.tasks, None if given is None else given | set(spec.parameters))
    extension.apply(dag)
    if unknown := sorted((given or set()) - set(spec.parameters) - dag.parameters):
        violations = [FieldViolation(f'parameters["{name}"]', "the workflow has no such parameter") for name in unknown]
        raise _refusal(violations)
    return dag


def artifacts_in(tasks: Iterable[TaskSpec]) -> Iterator[Artifact]:
    """Yield the artifacts that the inputs of tasks refer to."""
    for task in tasks:
        for binding in task.inputs.values():
            for leaf in leaves(binding):
                if isinstance(leaf, Payload) and isinstance(leaf.content, Artifact):
                    yield leaf.content


@dataclass(slots=True)
class Extension:
    """Tasks that were checked against a graph and are not yet part of it, with their edges.

    `behind` has the new tasks that depend on a task of the graph, by that task.
    """

    tasks: dict[str, TaskSpec] = field(default_factory=dict)
    successors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    predecessors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    optional: set[tuple[str, str]] = field(default_factory=set)
    behind: dict[str, list[str]] = field(default_factory=dict)
    split: Mapping[str, list[str]] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    kept_bytes: int = 0
    parameters: set[str] = field(default_factory=set)

    def apply(self, dag: Dag) -> None:
        """Add the tasks to the graph that they were checked against, which must not have grown since."""
        if dag.tasks:
            dag.tasks.update(self.tasks)
            dag.successors.update(self.successors)
            dag.predecessors.update(self.predecessors)
        else:
            dag.tasks, dag.successors, dag.predecessors = self.tasks, self.successors, self.predecessors
            self.tasks, self.successors, self.predecessors = {}, {}, {}
        dag.optional |= self.optional
        for source, targets in self.behind.items():
            dag.successors[source] += tuple(targets)
        for source, outputs in self.split.items():
            dag.split[source] = tuple(dict.fromkeys([*dag.split.get(source, ()), *outputs]))
        dag.artifacts += self.artifacts
        dag.kept_bytes += self.kept_bytes
        dag.parameters |= self.parameters


def extending(dag: Dag, added: Iterable[TaskSpec], parameters: Container[str] | None) -> Steps[Extension]:
    """Check tasks against a graph, in steps; the graph does not change. Raises as `build`."""
    new: dict[str, TaskSpec] = {}
    found = _Validation(ChainMap(new, dag.tasks) if dag.tasks else new, parameters)
    has_maps = False
    for (index, task), is_step in stepwise(enumerate(added)):
        if task.task_id in found.tasks:
            found.complain(f"tasks[{index}].task_id", f"task id {task.task_id!r} is used twice")
        new[task.task_id] = task
        has_maps = has_maps or bool(task.over)
        if is_step:
            yield
    # A copy, because the graph may grow between two steps.
    yield from found.check_item_ids(new, list(found.tasks) if has_maps and dag.tasks else new)
    edges: dict[str, dict[str, bool]] = {}
    for (index, task), is_step in stepwise(enumerate(new.values())):
        edges[task.task_id] = found.edges_of(task, f"tasks[{index}]")
        if is_step:
            yield
    found.refuse()
    linked = (yield from _link(new, edges)) if any(edges.values()) else {}
    made = Extension(new, split=found.split, artifacts=found.artifacts, kept_bytes=found.kept_bytes)
    made.parameters = found.parameters
    for task_id, is_step in stepwise(new):
        sources = edges.pop(task_id)  # Freed one by one: to free all edges at once takes long.
        made.successors[task_id] = linked.get(task_id, ())
        made.predecessors[task_id] = tuple(sources)
        made.optional.update((source, task_id) for source, is_optional in sources.items() if is_optional)
        for source in sources:
            if source not in new:
                made.behind.setdefault(source, []).append(task_id)
        if is_step:
            yield
    return made


def _refusal(violations: list[FieldViolation]) -> InvalidError:
    return InvalidError(
        "INVALID_WORKFLOW",
        f"{violations[0].field}: {violations[0].description}",
        metadata={"total_violations": str(len(violations))},
        violations=violations[:MAX_VIOLATIONS],
    )


class _Validation:
    """The results of a look at new tasks, before the graph is changed."""

    def __init__(self, tasks: Mapping[str, TaskSpec], parameters: Container[str] | None) -> None:
        self.tasks = tasks
        self.artifacts: list[Artifact] = []
        self.kept_bytes = 0
        self.split: dict[str, list[str]] = {}
        self.parameters: set[str] = set()
        self._provided = parameters
        self._violations: list[FieldViolation] = []

    def complain(self, where: str, what: str) -> None:
        """Note that a field is invalid."""
        self._violations.append(FieldViolation(where, what))

    def refuse(self) -> None:
        """Raise InvalidError if a field is invalid."""
        if self._violations:
            raise _refusal(self._violations)

    def check_item_ids(self, new: Mapping[str, TaskSpec], named: Iterable[str]) -> Steps[None]:
        """Refuse those ids of `named` that items of mapped tasks may get."""
        for task_id, is_step in stepwise(named):
            if is_step:
                yield
            found = ITEM_ID.fullmatch(task_id)
            mapped = found and self.tasks.get(found[1])
            if found and mapped and mapped.over and (task_id in new or found[1] in new):
                position = next(i for i, added in enumerate(new) if added in {task_id, found[1]})
                text = f"task id {task_id!r} is that of an item of the mapped task {found[1]!r}"
                self.complain(f"tasks[{position}].task_id", text)

    def edges_of(self, task: TaskSpec, path: str) -> dict[str, bool]:
        """Return the tasks that `task` depends on, and for each whether its output is optional."""
        found: dict[str, bool] = {}
        for name, binding in task.inputs.items():
            for leaf in leaves(binding):
                self._note(leaf, f'{path}.inputs["{name}"]', found)
        if task.over:
            self._note_map(task, path, found)
        if task.condition is not None and self._is_output(task.condition.output, f"{path}.condition"):
            found[task.condition.output.task_id] = False
            field = "equals" if task.condition.equals is not None else "output.path"
            is_of_one = task.condition.equals is not None or task.condition.output.path
            if is_of_one and self.tasks[task.condition.output.task_id].over:
                text = "the outputs of a mapped task are not one value to compare; have a task compare them"
                self.complain(f"{path}.condition.{field}", text)
        for position, source in enumerate(task.after):
            if source in self.tasks:
                found[source] = False
            else:
                self.complain(f"{path}.after[{position}]", f"there is no task {source!r}")
        return found

    def _note(self, leaf: Payload | OutputRef | Parameter, where: str, found: dict[str, bool]) -> None:
        match leaf:
            case OutputRef(source, _, is_optional):
                if self._is_output(leaf, where):
                    found[source] = is_optional and found.get(source, True)
            case Parameter(parameter):
                self.parameters.add(parameter)
                if self._provided is not None and parameter not in self._provided:
                    self.complain(where, f"the run has no parameter {parameter!r}")
            case Payload(content=Artifact() as artifact):
                self.artifacts.append(artifact)
            case Payload():
                self.kept_bytes += leaf.kept_bytes

    def _note_map(self, task: TaskSpec, path: str, found: dict[str, bool]) -> None:
        over = task.inputs.get(task.over)
        if not isinstance(over, OutputRef):
            self.complain(f"{path}.over", f"must name an input that is wired to an output; {task.over!r} is not")
        elif over.path:
            self.complain(f"{path}.over", "a task is mapped over a whole output; have a task return the part")
        elif over.task_id in self.tasks:
            found[over.task_id] = False
            if not self.tasks[over.task_id].over:
                self.split.setdefault(over.task_id, []).append(over.output)

    def _is_output(self, reference: OutputRef, where: str) -> bool:
        source = self.tasks.get(reference.task_id)
        if source is None:
            self.complain(where, f"there is no task {reference.task_id!r}")
        elif reference.output not in source.outputs:
            offered = ", ".join(source.outputs) or "none"
            text = f"task {reference.task_id!r} has no output {reference.output!r}; its outputs: {offered}"
            self.complain(where, text)
        else:
            return True
        return False


def _link(tasks: Mapping[str, TaskSpec], edges: Mapping[str, Mapping[str, bool]]) -> Steps[dict[str, tuple[str, ...]]]:
    """Return the successors of new tasks among each other. Raises InvalidError when there is a cycle.

    Earlier tasks cannot depend on new ones, so a cycle has new tasks only.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    for (target, sources), is_step in stepwise(edges.items()):
        graph.add_edges_from((source, target) for source in sources if source in tasks)
        if is_step:
            yield
    linked: dict[str, tuple[str, ...]] = {}
    try:
        for source, is_step in stepwise(nx.topological_sort(graph)):
            linked[source] = tuple(graph.successors(source))
            graph.remove_node(source)  # Freed one by one: to free the whole graph at once takes long.
            if is_step:
                yield
    except nx.NetworkXUnfeasible:
        cycle = [source for source, _ in nx.find_cycle(graph)]
        path = " -> ".join([*cycle, cycle[0]])
        metadata = {"cycle": path[:1024]}
        raise InvalidError("WORKFLOW_CYCLE", f"the tasks form a cycle: {path}", metadata=metadata) from None
    return linked
