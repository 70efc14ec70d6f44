"""Owns the graph of a workflow: validation, and who follows whom. Rule: networkx stays inside this file."""

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from lattice_server.core.errors import FieldViolation, InvalidError
from lattice_server.core.model import Artifact, OutputRef, Parameter, Payload, TaskSpec, WorkflowSpec, leaves

MAX_VIOLATIONS = 25


@dataclass(frozen=True, slots=True)
class Dag:
    """A validated graph. `successors` and `predecessors` list each neighbour once; `artifacts` are those its inputs
    and parameters refer to."""

    tasks: dict[str, TaskSpec]
    successors: dict[str, tuple[str, ...]]
    predecessors: dict[str, tuple[str, ...]]
    artifacts: tuple[Artifact, ...] = ()

    def final_task_ids(self) -> list[str]:
        """Return the tasks no other task depends on, in the order of definition."""
        return [task_id for task_id in self.tasks if not self.successors[task_id]]

    def descendants(self, task_id: str) -> list[str]:
        """Return every task that depends on `task_id`, directly or not."""
        seen: dict[str, None] = {}
        frontier = list(self.successors[task_id])
        while frontier:
            found = frontier.pop()
            if found not in seen:
                seen[found] = None
                frontier.extend(self.successors[found])
        return list(seen)


def build(spec: WorkflowSpec, parameters: Iterable[str] | None = None) -> Dag:
    """Validate `spec` and return its graph.

    Args:
        spec: the workflow; tasks in any order.
        parameters: the names a run provides; None while the workflow is only being defined, when any name may come.

    Raises:
        InvalidError: reason INVALID_WORKFLOW with the fields at fault, or WORKFLOW_CYCLE naming the cycle.
    """
    known = None if parameters is None else set(parameters) | set(spec.parameters)
    tasks: dict[str, TaskSpec] = {}
    violations: list[FieldViolation] = []
    for index, task in enumerate(spec.tasks):
        if task.task_id in tasks:
            violations.append(FieldViolation(f"tasks[{index}].task_id", f"task id {task.task_id!r} is used twice"))
        tasks[task.task_id] = task
    edges: dict[str, dict[str, None]] = {}
    artifacts = [p.content for p in spec.parameters.values() if isinstance(p.content, Artifact)]
    for index, task in enumerate(spec.tasks):
        edges[task.task_id] = _predecessors(task, f"tasks[{index}]", tasks, known, violations, artifacts)
    if violations:
        raise InvalidError(
            "INVALID_WORKFLOW",
            f"{violations[0].field}: {violations[0].description}",
            metadata={"total_violations": str(len(violations))},
            violations=violations[:MAX_VIOLATIONS],
        )
    return _linked(tasks, edges, tuple(artifacts))


def _predecessors(
    task: TaskSpec,
    path: str,
    tasks: dict[str, TaskSpec],
    parameters: set[str] | None,
    violations: list[FieldViolation],
    artifacts: list[Artifact],
) -> dict[str, None]:
    found: dict[str, None] = {}
    for name, binding in task.inputs.items():
        for leaf in leaves(binding):
            match leaf:
                case OutputRef(source, output) if source not in tasks:
                    violations.append(FieldViolation(f'{path}.inputs["{name}"]', f"there is no task {source!r}"))
                case OutputRef(source, output) if output not in tasks[source].outputs:
                    offered = ", ".join(tasks[source].outputs) or "none"
                    message = f"task {source!r} has no output {output!r}; its outputs: {offered}"
                    violations.append(FieldViolation(f'{path}.inputs["{name}"]', message))
                case OutputRef(source, _):
                    found[source] = None
                case Parameter(parameter) if parameters is not None and parameter not in parameters:
                    message = f"the run has no parameter {parameter!r}"
                    violations.append(FieldViolation(f'{path}.inputs["{name}"]', message))
                case Payload(content=Artifact() as artifact):
                    artifacts.append(artifact)
                case Parameter() | Payload():
                    pass
    for position, source in enumerate(task.after):
        if source in tasks:
            found[source] = None
        else:
            violations.append(FieldViolation(f"{path}.after[{position}]", f"there is no task {source!r}"))
    return found


def _linked(tasks: dict[str, TaskSpec], edges: dict[str, dict[str, None]], artifacts: tuple[Artifact, ...]) -> Dag:
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(tasks)
    graph.add_edges_from((source, target) for target, sources in edges.items() for source in sources)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [source for source, _ in nx.find_cycle(graph)]
        path = " -> ".join([*cycle, cycle[0]])
        raise InvalidError("WORKFLOW_CYCLE", f"the tasks form a cycle: {path}", metadata={"cycle": path[:1024]})
    successors = {task_id: tuple(graph.successors(task_id)) for task_id in tasks}
    predecessors = {task_id: tuple(sources) for task_id, sources in edges.items()}
    return Dag(tasks, successors, predecessors, artifacts)
