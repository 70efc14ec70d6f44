"""What a running task may know and do: which attempt it is, adding tasks to its run, asking the caller that holds the
run. For use inside tasks.

    from lattice_worker import context

    @task
    def plan(question: str) -> int:
        found = [context.spawn(search, {"query": query}) for query in queries(question)]
        context.spawn(answer, {"question": question, "found": [task.output for task in found]})
        return len(found)

Rule: no gRPC here. The encoding is that of the process the task runs in.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, count
from types import FunctionType, MethodType
from typing import Any, NoReturn

from lattice_worker.runner.artifacts import Encoder
from lattice_worker.runner.asking import AnswerError, QuestionError, decoded
from lattice_worker.runner.blame import refusal
from lattice_worker.runner.functions import dump
from lattice_worker.runner.output import current as running
from lattice_worker.runner.text import utf8
from lattice_worker.runner.values import PayloadError, encode_value
from lattice_worker.spawned import Binder, SpawnedOutput

__all__ = [
    "AnswerError",
    "Attempt",
    "QuestionError",
    "SpawnError",
    "SpawnedOutput",
    "SpawnedTask",
    "ask",
    "ask_async",
    "current",
    "spawn",
]

MAX_NAME_LENGTH = 128
PLAIN: Mapping[str, Any] = {"spec": b"", "function": b"", "outputs": ("result",), "has_code": True}
# A task may spawn in several threads.
_taking = threading.Lock()


class SpawnError(TypeError):
    """An argument of `spawn` is wrong; nothing was added."""


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

    def __str__(self) -> str:
        raise PayloadError(f"{self!r} has no text: give one of its outputs to a task, and make the text there")

    def __format__(self, spec: str) -> str:
        return str(self)

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
    **misplaced: Any,
) -> SpawnedTask:
    """Add a task to the run; it starts as soon as its inputs are there, this task need not end first.

    Args:
        task: a `@task`, an `entrypoint` or a plain function; what it needs (resources, retries, ...) is kept.
        inputs: by name; outputs of other spawned tasks may stand anywhere inside them.
        name: names it below this task; by default the function's name, numbered when this task has spawned one of that
            id. A later attempt of this task that spawns the same names in the same order means the same tasks, which
            are then not added again.
        after: tasks that must succeed first, besides those whose outputs it takes.

    Raises:
        RuntimeError: there is no task running here.
        SpawnError: an argument is wrong.
        PayloadError: an input or the function cannot be pickled.

    What only the server can see, such as too many tasks, fails the task that spawned.
    """
    output = _output()
    form = _form(task)
    label = _label(task, name)
    where = f"spawn of {label!r}"
    given = _given(where, task, form, inputs, misplaced)
    others = _others(where, after)
    taken = output.header.setdefault("spawned", set())
    encoder = Encoder(output.header)
    is_for_python = form["has_code"] or ":" in form.get("entrypoint", "")
    try:
        tree = {
            key: Binder(f"{where}: input {key!r}", encoder, taken, is_for_python).bind(value)
            for key, value in given.items()
        }
        code = dump(form.get("call", task)) if form["has_code"] else b""
    except BaseException:
        encoder.take_back()
        raise
    task_id = _take_id(f"{current().task_id}/{label}", taken)
    blobs = [*encoder.blobs, form["spec"], form["function"], code]
    first = len(encoder.blobs)
    frame = {
        "task_id": task_id,
        "name": label,
        "after": [other.task_id for other in others],
        "inputs": tree,
        "spec": first,
        "function": first + 1,
        "code": first + 2,
    }
    output.spawn(frame, blobs, encoder.made)
    return SpawnedTask(task_id, tuple(form["outputs"]))


def ask(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """Ask the caller that holds the run, wait, and return its answer. Any thread of the task may ask.

    In a coroutine use `ask_async`: this holds up all coroutines of the process until the answer is there.

    Args:
        name: what is asked, as the caller knows it.
        payload: what is asked about; a value that can be pickled.
        item: in a batched function the position of the member that asks; nowhere else.

    Raises:
        AnswerError: the caller answered that something went wrong.
        QuestionError: no caller answers: the run is not open, its caller is gone, or too much is asked at once.
        PayloadError: the payload cannot be pickled, or is too large.
        RuntimeError: there is no task running here.
    """
    return decoded(_asked(name, payload, item).result())


async def ask_async(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """As `ask`, while other coroutines go on."""
    return decoded(await asyncio.wrap_future(_asked(name, payload, item)))


def _asked(name: object, payload: Any, item: object) -> "Future[Any]":
    output = running.get()
    if output is None or output.questions.is_inherited:
        raise RuntimeError("there is no task running here; this works inside tasks, and not in processes they fork")
    header = output.header
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise QuestionError(f"the name of a question must be a text of 1 to {MAX_NAME_LENGTH} characters, not {name!r}")
    size = len(header["attempts"])
    if header["batched"] and (type(item) is not int or not 0 <= item < size):
        text = f"a batch is several tasks at once: give item=, the position of the one that asks, from 0 to {size - 1}"
        raise QuestionError(f"{text}, not {item!r}")
    if not header["batched"] and item is not None:
        raise QuestionError("item is for batched functions; this task is alone")
    where = f"question {name!r}"
    try:
        media_type, parts = encode_value(payload)
    except Exception as error:
        raise PayloadError(refusal(where, payload, error)) from error
    data = b"".join(parts)
    limit = header["question_limit"]
    if limit and len(data) > limit:
        text = f"{where} takes {len(data)} bytes; questions travel inline and may have {limit}"
        raise PayloadError(f"{text}: give what is larger to the caller as an output")
    reference = {"type": media_type, "blob": 0}
    position = item if isinstance(item, int) else 0
    return output.questions.ask(position, utf8(name), reference, [data])


def _take_id(task_id: str, taken: set[str]) -> str:
    """Return the first of `task_id`, `task_id-2`, `task_id-3` and so on that is not taken, and take it."""
    with _taking:
        found = next(i for i in chain([task_id], (f"{task_id}-{n}" for n in count(2))) if i not in taken)
        taken.add(found)
    return found


def _form(task: Any) -> Mapping[str, Any]:
    """Return what is known of a task besides its code. Raises SpawnError."""
    if not callable(task):
        text = "it needs a function, a @task or an entrypoint(...), not"
        raise SpawnError(f"spawn: {text} {'the text ' * isinstance(task, str)}{task!r}")
    form: Mapping[str, Any] | None = getattr(task, "__lattice__", None)
    if form is not None:
        return form
    if inspect.isgeneratorfunction(task) or inspect.isasyncgenfunction(task):
        raise SpawnError(f"spawn: {task!r} is a generator function: have it return a list")
    return PLAIN


def _label(task: Any, name: object) -> str:
    if name is not None and not isinstance(name, str):
        raise SpawnError(f"spawn: name must be a text, not {name!r}")
    return utf8(name or str(getattr(task, "__name__", "task")))


def _given(where: str, task: Any, form: Mapping[str, Any], inputs: object, misplaced: object) -> dict[str, Any]:
    """Return the inputs by name, as they can be sent. Raises SpawnError unless the function takes those."""
    if misplaced or not isinstance(inputs, Mapping | None):
        found = f"the argument {next(iter(misplaced))!r}" if isinstance(misplaced, dict) and misplaced else repr(inputs)
        raise SpawnError(f'{where}: the inputs are one dict by name, spawn(task, {{"x": ...}}), not {found}')
    given = dict(inputs or {})
    for key in given:
        if not isinstance(key, str):
            raise SpawnError(f"{where}: the name of an input must be a text, not {key!r}")
    names, required, takes_any = _signature(task, form)
    missing = [key for key in required if key not in given]
    unknown = [] if takes_any else [key for key in given if key not in names]
    faults = [f"has no input {', '.join(map(repr, unknown))}"] * bool(unknown)
    faults += [f"needs input {', '.join(map(repr, missing))}"] * bool(missing)
    if faults:
        raise SpawnError(f"{where}: the task {' and '.join(faults)}; its inputs: {', '.join(names) or 'none'}")
    return {utf8(key): value for key, value in given.items()}


def _signature(task: Any, form: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str], bool]:
    """Return the names of a task's inputs, those that it needs, and whether it takes any others."""
    if "inputs" in form:
        return form["inputs"], form["required"], form["takes_any"]
    if not isinstance(task, FunctionType | MethodType):
        return (), (), True  # what is not written in Python may have no signature; the call itself shows it
    found = inspect.signature(task).parameters
    if list(found) == ["params"]:
        return (), (), True
    named = {p.name: p for p in found.values() if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
    required = [name for name, p in named.items() if p.default is p.empty]
    return tuple(named), required, any(p.kind is p.VAR_KEYWORD for p in found.values())


def _others(where: str, after: Any) -> list[SpawnedTask]:
    if isinstance(after, SpawnedTask | SpawnedOutput | str) or not isinstance(after, Sequence):
        raise SpawnError(f"{where}: after must be a list of spawned tasks, after=[task], not {after!r}")
    for other in after:
        if isinstance(other, SpawnedOutput):
            raise SpawnError(f"{where}: after takes tasks, not their outputs: give the task of {other!r} itself")
        if not isinstance(other, SpawnedTask):
            raise SpawnError(f"{where}: after must hold tasks that spawn returned, not {other!r}")
    return list(after)


def _output() -> Any:
    output = running.get()
    if output is None:
        raise RuntimeError("there is no task running here; this works inside tasks only")
    if output.header["batched"]:
        raise RuntimeError("a batch is several tasks at once; ask outside of one")
    return output
