"""The context of a running task: its attempt, adding tasks to its run, asking the caller that holds the run, streaming.
For use inside tasks.

    from lattice_worker import context

    @task
    def plan(question: str) -> int:
        found = [context.spawn(search, {"query": query}) for query in queries(question)]
        context.spawn(answer, {"question": question, "found": [task.output for task in found]})
        return len(found)

Rule: no gRPC here. The encoding is that of the process the task runs in.
"""

import asyncio
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lattice_worker.runner.encoding.artifacts import Encoder
from lattice_worker.runner.encoding.blame import refusal
from lattice_worker.runner.encoding.text import utf8
from lattice_worker.runner.encoding.values import PayloadError, encode_value
from lattice_worker.runner.invocation import awaited, tracing
from lattice_worker.runner.invocation.asking import FORKED, AnswerError, QuestionError, decoded
from lattice_worker.runner.invocation.called import Call, CallError
from lattice_worker.runner.invocation.functions import dump
from lattice_worker.runner.invocation.generators import COMBINE
from lattice_worker.runner.invocation.output import current as running
from lattice_worker.task_context import spawn_arguments
from lattice_worker.task_context.endpoints import Endpoint, Llm
from lattice_worker.task_context.spawn_arguments import SpawnError
from lattice_worker.task_context.spawned import Binder, SpawnedOutput, SpawnedTask
from lattice_worker.task_context.streaming import StreamError, cancelled, emit, emit_async, logger, progress

__all__ = [
    "Answer",
    "AnswerError",
    "Attempt",
    "Call",
    "CallError",
    "Endpoint",
    "Llm",
    "QuestionError",
    "SpawnError",
    "SpawnedOutput",
    "SpawnedTask",
    "StreamError",
    "ask",
    "ask_async",
    "ask_future",
    "call",
    "cancelled",
    "current",
    "emit",
    "emit_async",
    "llm",
    "llm_async",
    "logger",
    "progress",
    "service",
    "service_async",
    "spawn",
    "tracer",
    "wait_for",
    "wait_for_async",
]

MAX_NAME_LENGTH = 128
ENDPOINT, LLM = "lattice/service.endpoint", "lattice/llm.endpoint"


@dataclass(frozen=True, slots=True)
class Attempt:
    """The attempt that is running: `number` counts from 1.

    `deadline` is when its time is up, in seconds since the epoch; None when it has no limit of its own.
    """

    run_id: str
    task_id: str
    number: int
    deadline: float | None = None


def current() -> Attempt:
    """Return the attempt that is running. Raises RuntimeError outside a task, and inside a batch, which is several."""
    output = _output()
    limit_s = output.header.get("timeout", 0)
    run_id, task_id, number = output.header["attempts"][0]
    return Attempt(run_id, task_id, number, output.started_s + limit_s if limit_s else None)


def call(
    task: Callable[..., Any], inputs: Mapping[str, Any] | None = None, name: str | None = None, **misplaced: Any
) -> Call:
    """Add a task to the run, to wait for its value: `await call(...)`, or `call(...).result()`.

    The arguments and the errors are those of `spawn`. While the attempt waits it holds no CPUs. The task is cancelled
    when this task ends before it, and its failure is raised here instead of failing the run.
    """
    output = _own_output()
    if not output.header.get("takes_calls", False):
        raise SpawnError("call: the server is of a version whose tasks cannot call others")
    called = _spawned(task, inputs, name, (), misplaced, is_called=True)
    return Call(output.questions, called.task_id, called.output_names)


def spawn(
    task: Callable[..., Any],
    inputs: Mapping[str, Any] | None = None,
    name: str | None = None,
    after: Sequence[SpawnedTask] = (),
    **misplaced: Any,
) -> SpawnedTask:
    """Add a task to the run; it starts as soon as its inputs are there, this task need not end first.

    Args:
        task: a `@task`, an `entrypoint` or a plain function; its resources, retries and other settings apply.
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
    return _spawned(task, inputs, name, after, misplaced)


def _spawned(
    task: Callable[..., Any],
    inputs: Mapping[str, Any] | None,
    name: str | None,
    after: Sequence[SpawnedTask],
    misplaced: dict[str, Any],
    *,
    is_called: bool = False,
) -> SpawnedTask:
    output = _own_output()
    form, label = spawn_arguments.form_of(task), spawn_arguments.label_of(task, name)
    where = f"spawn of {label!r}"
    given = spawn_arguments.inputs_of(where, task, form, inputs, misplaced)
    predecessors = spawn_arguments.predecessors_of(where, after)
    taken = output.header.setdefault("spawned", {})
    encoder = Encoder(output.header)
    is_for_python = form["has_code"] or ":" in form.get("entrypoint", "")
    try:
        tree = {
            key: Binder(f"{where}: input {key!r}", encoder, taken, is_for_python).bind(value)
            for key, value in given.items()
        }
        code = dump(_called(form, task)) if form["has_code"] else b""
    except BaseException:
        encoder.take_back()
        raise
    task_id = spawn_arguments.take_id(current().task_id, label, taken)
    first = len(encoder.blobs)
    frame = {
        "task_id": task_id,
        "name": label,
        "after": [found.task_id for found in predecessors],
        "inputs": tree,
        "spec": first,
        "function": first + 1,
        "code": first + 2,
        "called": is_called,
    }
    output.spawn(frame, [*encoder.blobs, form["spec"], form["function"], code], encoder.made)
    return SpawnedTask(task_id, tuple(form["outputs"]))


def ask(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """Ask the caller that holds the run, wait, and return its answer. Any thread of the task may ask.

    In a coroutine use `ask_async`: this holds up all coroutines of the process until the answer is there.

    Args:
        name: names the question; the caller answers by it.
        payload: the argument of the question; a value that can be pickled.
        item: in a batched function the position of the member that asks; nowhere else.

    Raises:
        AnswerError: the caller answered that something went wrong.
        QuestionError: no caller answers: the run is not open, its caller is gone, or too much is asked at once.
        PayloadError: the payload cannot be pickled, or is too large.
        RuntimeError: there is no task running here.
    """
    return decoded(_asked(name, payload, item).result())


async def ask_async(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """As `ask`, without blocking other coroutines."""
    return decoded(await asyncio.wrap_future(_asked(name, payload, item)))


def wait_for(name: str, timeout: float | None = None) -> Any:
    """Wait for a signal, which `run.signal(name, value)` sends, and return its value. See `lattice_client.context`.

    Raises:
        TimeoutError: the signal was not sent within `timeout` seconds.
        QuestionError: the name or the timeout is wrong, or the server takes no signals.
        RuntimeError: there is no task running here, or it is a batch.
    """
    return awaited.wait(_output(), name, timeout)


async def wait_for_async(name: str, timeout: float | None = None) -> Any:
    """As `wait_for`, without blocking other coroutines."""
    return await awaited.wait_async(_output(), name, timeout)


def tracer() -> Any:
    """Return a tracer of OpenTelemetry. Its spans are part of the trace of the run, when that is traced.

    Raises RuntimeError without OpenTelemetry, and when there is no task running here.
    """
    output = running.get()
    if output is None:
        raise RuntimeError("there is no task running here; this works inside tasks only")
    try:
        return tracing.tracer(output.header)
    except ImportError:
        advice = 'pip install "lattice-control-plane[telemetry]"'
        raise RuntimeError(f"the worker of this node has no OpenTelemetry: {advice}") from None


class Answer:
    """The answer of a question that `ask_future` has asked."""

    def __init__(self, asked: "Future[Any]") -> None:
        self._asked = asked

    def result(self) -> Any:
        """Wait for the answer and return it. Raises as `ask`."""
        return decoded(self._asked.result())

    def __await__(self) -> Generator[Any, None, Any]:
        return decoded((yield from asyncio.wrap_future(self._asked).__await__()))

    def add_done_callback(self, callback: Callable[["Answer"], object]) -> None:
        """Call a function once the answer is there, in a thread that no code of the task may block for long."""
        self._asked.add_done_callback(lambda _: callback(self))


def ask_future(name: str, payload: Any = None, *, item: int | None = None) -> Answer:
    """As `ask`, without waiting. Questions that one thread asks reach the caller in the order in which they are asked.

    A question whose answer is not waited for may be lost when the task ends.
    """
    return Answer(_asked(name, payload, item))


def service(name: str, *, item: int | None = None) -> Endpoint:
    """Return the address of an instance of a service, which is started if there is none; wait until it is ready.

    Of the instances that this node reaches, the call returns the one with the fewest requests. The service does not
    become idle while the attempt runs. In a coroutine use `service_async`.

    Raises:
        AnswerError: there is no such service, it cannot start, or this node does not reach it.
        QuestionError: the server knows no services.
        RuntimeError: there is no task running here.
    """
    return Endpoint(**ask(ENDPOINT, {"name": name}, item=item))


async def service_async(name: str, *, item: int | None = None) -> Endpoint:
    """As `service`, without blocking other coroutines."""
    return Endpoint(**await ask_async(ENDPOINT, {"name": name}, item=item))


def llm(name: str, *, item: int | None = None) -> Llm:
    """Return how a language model is reached, once an instance is ready; one is started if there is none.

    The key ends with the attempt. In a coroutine use `llm_async`. Raises as `service`.
    """
    return Llm(**ask(LLM, {"name": name}, item=item))


async def llm_async(name: str, *, item: int | None = None) -> Llm:
    """As `llm`, without blocking other coroutines."""
    return Llm(**await ask_async(LLM, {"name": name}, item=item))


def _asked(name: object, payload: Any, item: object) -> "Future[Any]":
    output = running.get()
    if output is None:
        raise RuntimeError(FORKED)
    output.questions.check_owner()
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
        media_type, parts = encode_value(payload, as_data=header.get("as_data", False))
    except Exception as error:
        raise PayloadError(refusal(where, payload, error)) from error
    data = b"".join(parts)
    limit = header["question_limit"]
    if limit and len(data) > limit:
        text = f"{where} takes {len(data)} bytes; questions travel inline and may have {limit}"
        raise PayloadError(f"{text}: give a larger value to the caller as an output")
    reference = {"type": media_type, "blob": 0}
    position = item if isinstance(item, int) else 0
    return output.questions.ask(position, utf8(name), reference, [data])


def _called(form: Mapping[str, Any], task: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a task as workers call it."""
    combine = form.get("combine")
    if combine is None or "call" in form:
        called: Callable[..., Any] = form.get("call", task)
        return called
    found = functools.partial(task)
    setattr(found, COMBINE, combine)
    return found


def _output() -> Any:
    output = running.get()
    if output is None:
        raise RuntimeError("there is no task running here; this works inside tasks only")
    if output.header["batched"]:
        raise RuntimeError("a batch is several tasks at once; ask outside of one")
    return output


def _own_output() -> Any:
    """As `_output`, but raise RuntimeError in a process that the task has forked: nothing that it sends arrives."""
    output = _output()
    output.questions.check_owner()
    return output
