"""What a running task may know and do: which attempt it is, and adding tasks to its run. For use inside tasks.

    from lattice_worker import context

    @task
    def plan(question: str) -> int:
        found = [context.spawn(search, {"query": query}) for query in queries(question)]
        context.spawn(answer, {"question": question, "found": [task.output for task in found]})
        return len(found)

Rule: no gRPC here. The encoding is that of the process the task runs in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lattice_worker.runner.artifacts import Encoder
from lattice_worker.runner.functions import dump
from lattice_worker.runner.output import current as running
from lattice_worker.runner.text import utf8
from lattice_worker.runner.values import PayloadError
from lattice_worker.spawned import SpawnedOutput, binding_of

__all__ = ["Attempt", "SpawnedOutput", "SpawnedTask", "current", "spawn"]

PLAIN: Mapping[str, Any] = {"spec": b"", "function": b"", "outputs": ("result",), "has_code": True}


@dataclass(frozen=True, slots=True)
class Attempt:
    """The attempt that is running: `number` counts from 1."""

    run_id: str
    task_id: str
    number: int


@dataclass(frozen=True, slots=True)
class SpawnedTask:
    """A task that was added to the run."""

    task_id: str
    output_names: tuple[str, ...]

    @property
    def outputs(self) -> dict[str, SpawnedOutput]:
        """The task's outputs by name."""
        return {name: SpawnedOutput(self.task_id, name) for name in self.output_names}

    @property
    def output(self) -> SpawnedOutput:
        """The task's only output. Raises ValueError when it has several."""
        if len(self.output_names) != 1:
            raise ValueError(f"task {self.task_id!r} has {len(self.output_names)} outputs; name one")
        return SpawnedOutput(self.task_id, self.output_names[0])

    def __reduce__(self) -> NoReturn:
        raise PayloadError(f"{self.task_id!r} is a task; give one of its outputs: task.output")


def current() -> Attempt:
    """Return the attempt that is running. Raises RuntimeError outside a task, and inside a batch, which is several."""
    return Attempt(*_output().header["attempts"][0])


def spawn(
    task: Callable[..., Any],
    inputs: Mapping[str, Any] | None = None,
    name: str | None = None,
    after: Sequence[SpawnedTask] = (),
) -> SpawnedTask:
    """Add a task to the run; it starts as soon as its inputs are there, this task need not end first.

    Args:
        task: a `@task`, an `entrypoint` or a plain function; what it needs (resources, retries, ...) is kept.
        inputs: by name; outputs of other spawned tasks may stand anywhere inside them.
        name: names it below this task; by default the function's name, numbered when it is not the first. A later
            attempt of this task that spawns the same name means the same task, which is then not added again.
        after: tasks that must succeed first, besides those whose outputs it takes.

    Raises:
        RuntimeError: there is no task running here.
        PayloadError: an input or the function cannot be pickled.

    What only the server can see, such as too many tasks, fails the task that spawned.
    """
    output = _output()
    attempt = current()
    names = output.header.setdefault("spawned", {})
    label = utf8(name or str(getattr(task, "__name__", "task")))
    number = names[label] = names.get(label, 0) + 1
    task_id = f"{attempt.task_id}/{label}" if number == 1 else f"{attempt.task_id}/{label}-{number}"
    form = getattr(task, "__lattice__", None) or PLAIN
    encoder = Encoder(output.header)
    try:
        tree = {utf8(key): binding_of(value, encoder) for key, value in (inputs or {}).items()}
        code = dump(form.get("call", task)) if form["has_code"] else b""
    except BaseException:
        encoder.take_back()
        raise
    blobs = [*encoder.blobs, form["spec"], form["function"], code]
    first = len(encoder.blobs)
    frame = {
        "task_id": task_id,
        "name": label,
        "after": [other.task_id for other in after],
        "inputs": tree,
        "spec": first,
        "function": first + 1,
        "code": first + 2,
    }
    output.spawn(frame, blobs, encoder.made)
    return SpawnedTask(task_id, tuple(form["outputs"]))


def _output() -> Any:
    output = running.get()
    if output is None:
        raise RuntimeError("there is no task running here; this works inside tasks only")
    if output.header["batched"]:
        raise RuntimeError("a batch is several tasks at once; ask outside of one")
    return output
