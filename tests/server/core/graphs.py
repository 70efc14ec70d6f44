"""Small workflows for the tests of the core."""

from collections.abc import Mapping, Sequence

from lattice_server.core.messages import WorkerHello
from lattice_server.core.model import Binding, Capacity, Function, Isolation, OutputRef, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.runtime import Runtime

SYNC = Function("sha256:sync", is_async=False, definition=None)
VALUE = Payload("application/json", "1")


def task(task_id: str, needs: Sequence[str] = (), **settings: object) -> TaskSpec:
    """Return a task with one output `out`, wired to the outputs of `needs`."""
    inputs: Mapping[str, Binding] = {f"from_{source}": OutputRef(source, "out") for source in needs}
    return TaskSpec(task_id, SYNC, inputs=inputs, outputs=("out",), **settings)  # type: ignore[arg-type]


def workflow(edges: Mapping[str, Sequence[str]], **settings: object) -> WorkflowSpec:
    """Return a workflow from task ids to the ids each needs."""
    return WorkflowSpec(tuple(task(name, needs) for name, needs in edges.items()), **settings)  # type: ignore[arg-type]


def hello(node_id: str, cpu: float = 2.0, session_id: str = "", held: Sequence[str] = ()) -> WorkerHello:
    """Return the greeting of a worker that serves `node_id`."""
    return WorkerHello(
        worker_id=f"worker-of-{node_id}",
        node_id=node_id,
        session_id=session_id,
        held_lease_ids=tuple(held),
        hostname="host",
        node_ip="127.0.0.1",
        capacity=Capacity(cpu, memory_bytes=1 << 30),
        labels={},
        isolations=frozenset({Isolation.NONE}),
        runtime=Runtime("python"),
        pid=1,
    )
