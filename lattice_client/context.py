"""The context of a running task: its attempt, adding tasks to its run, asking the caller that holds the run. For use
inside tasks.

    from lattice_client import context

    @task
    def plan(question: str) -> int:
        found = [context.spawn(search, {"query": query}) for query in queries(question)]
        context.spawn(answer, {"question": question, "found": [task.output for task in found]})
        return len(found)

Rule: nothing is done here. The process that runs the task has a module that does it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

IMPLEMENTATION = "lattice_worker.context"


class Attempt(Protocol):
    """The attempt that is running."""

    @property
    def run_id(self) -> str:
        """The id of its run."""

    @property
    def task_id(self) -> str:
        """The id of its task."""

    @property
    def number(self) -> int:
        """The number of the attempt, from 1."""


class SpawnedTask(Protocol):
    """A task that was added to the run."""

    @property
    def task_id(self) -> str:
        """Its id."""

    @property
    def outputs(self) -> Mapping[str, Any]:
        """Its outputs by name, to be wired into inputs of other spawned tasks."""

    @property
    def output(self) -> Any:
        """Its only output. Raises ValueError when it has several."""


def current() -> Attempt:
    """Return the attempt that is running. Raises RuntimeError outside a task, and inside a batch, which is several."""
    found: Attempt = _implementation().current()
    return found


def spawn(
    task: Callable[..., Any],
    inputs: Mapping[str, Any] | None = None,
    name: str | None = None,
    after: Sequence[SpawnedTask] = (),
    **misplaced: Any,
) -> SpawnedTask:
    """Add a task to the run; it starts as soon as its inputs are there, this task need not end first.

    Args:
        task: a `@task`, an `entrypoint` or a plain function; its settings (resources, retries, ...) hold.
        inputs: by name; outputs of other spawned tasks may stand anywhere inside them.
        name: names it below this task; by default the function's name, numbered when this task has spawned one of that
            id. A later attempt of this task that spawns the same names in the same order means the same tasks, which
            are then not added again.
        after: tasks that must succeed first, besides those whose outputs it takes.

    Raises:
        RuntimeError: there is no task running here.
        TypeError: an argument is wrong; nothing was added.
    """
    found: SpawnedTask = _implementation().spawn(task, inputs, name, after, **misplaced)
    return found


def ask(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """Ask the caller that holds the run open, wait, and return its answer. Any thread of the task may ask.

    In a coroutine use `ask_async`: this holds up all coroutines of the process until the answer is there.

    Args:
        name: what is asked, as the caller knows it.
        payload: what is asked about; a value that can be pickled.
        item: in a batched function the position of the member that asks; nowhere else.

    Raises:
        context.AnswerError: the caller answered that something went wrong. It is a QuestionError.
        context.QuestionError: no caller answers: the run is not open, its caller is gone, or too much is asked at once.
        RuntimeError: there is no task running here.
    """
    return _implementation().ask(name, payload, item=item)


async def ask_async(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """As `ask`, while other coroutines go on."""
    return await _implementation().ask_async(name, payload, item=item)


def __getattr__(name: str) -> Any:
    # The classes of errors are those of the process that runs the task.
    if name in {"AnswerError", "QuestionError"} and (found := sys.modules.get(IMPLEMENTATION)) is not None:
        return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _implementation() -> Any:
    found = sys.modules.get(IMPLEMENTATION)
    if found is None:
        raise RuntimeError("there is no task running here; this works inside tasks only")
    return found
