"""The context of a running task: its attempt, adding tasks to its run, asking the caller of an open run, streaming.

For use inside tasks:

    from lattice_client import context

    @task
    def plan(question: str) -> int:
        found = [context.spawn(search, {"query": query}) for query in queries(question)]
        context.spawn(answer, {"question": question, "found": [task.output for task in found]})
        return len(found)

Rule: the implementation is a module of the process that runs the task.
"""

import logging
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
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

    @property
    def deadline(self) -> float | None:
        """The time at which its `timeout` ends it, in seconds since 1970; None without a timeout."""


class SpawnedTask(Protocol):
    """A task that this task added to the run."""

    @property
    def task_id(self) -> str:
        """Its id."""

    @property
    def outputs(self) -> Mapping[str, Any]:
        """Its outputs by name, to wire into inputs of other spawned tasks."""

    @property
    def output(self) -> Any:
        """Its only output. Raises ValueError when it has several."""


def current() -> Attempt:
    """Return the running attempt. Raises RuntimeError outside a task, and in a batched call of several attempts."""
    found: Attempt = _implementation().current()
    return found


class Call(Protocol):
    """A task that this task called."""

    @property
    def task_id(self) -> str:
        """Its id."""

    def result(self) -> Any:
        """Wait for its only output, or its outputs by name. Raises context.CallError."""

    def __await__(self) -> Generator[Any, None, Any]:
        """As `result`, without blocking other coroutines."""


def call(
    task: Callable[..., Any], inputs: Mapping[str, Any] | None = None, name: str | None = None, **misplaced: Any
) -> Call:
    """Call a task: it starts at once, and `await call(...)`, or `call(...).result()`, waits for its value.

    Several calls run side by side: make them first, then wait. While this task waits, its CPUs are free for others; its
    GPUs and memory are not. Arguments as of `spawn`.

    Raises:
        RuntimeError: called outside a task.
        TypeError: an argument is wrong; no task was added.
        context.CallError: by `await` and `result`: the task failed. It has the attributes `task_id`, `kind` and `type`;
            kind NESTED_RESOURCES says that the task could never start beside what waiting tasks hold.
    """
    found: Call = _implementation().call(task, inputs, name, **misplaced)
    return found


def spawn(
    task: Callable[..., Any],
    inputs: Mapping[str, Any] | None = None,
    name: str | None = None,
    after: Sequence[SpawnedTask] = (),
    **misplaced: Any,
) -> SpawnedTask:
    """Add a task to the run; it starts as soon as its inputs exist, also while this task runs.

    Args:
        task: a `@task`, an `entrypoint` or a plain function; its settings (resources, retries, ...) hold.
        inputs: values by name, with outputs of other spawned tasks anywhere inside them.
        name: the last part of the task's id; by default the function's name, with a number when this task has spawned
            a task of that name. A retry of this task that spawns the same names in the same order refers to the tasks
            of the earlier attempt, which are not added again.
        after: tasks that must succeed first, besides the tasks whose outputs it takes.

    Raises:
        RuntimeError: called outside a task.
        TypeError: an argument is wrong; no task was added.
    """
    found: SpawnedTask = _implementation().spawn(task, inputs, name, after, **misplaced)
    return found


def ask(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """Ask the caller of the open run, wait, and return its answer. Any thread of the task may ask.

    In a coroutine use `ask_async`: this function blocks all coroutines of the process until the answer arrives.

    Args:
        name: the name of the question, by which the caller recognises it. Names that begin with `lattice/` are for
            questions to the server.
        payload: a value for the caller, which must be picklable.
        item: in a batched call, the index of the asking item; otherwise None.

    Raises:
        context.AnswerError: the caller answered with an error. It is a QuestionError.
        context.QuestionError: no caller answers: the run is not open, its caller is disconnected, or the task has too
            many unanswered questions.
        RuntimeError: called outside a task.
    """
    return _implementation().ask(name, payload, item=item)


async def ask_async(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """As `ask`, without blocking other coroutines."""
    return await _implementation().ask_async(name, payload, item=item)


def wait_for(name: str, timeout: float | None = None) -> Any:
    """Wait for a signal, and return its value: `run.signal(name, value)` and `lattice runs signal` send it.

    While the task waits, its CPUs are free for others; its GPUs and memory are not. A signal that was sent before is
    kept. Several values of one name are a list: the first wait of an attempt returns the first, the next one the
    second. Each task gets all of them, and so does a repeated attempt. In a coroutine use `wait_for_async`.

    Args:
        name: the name of the signal, of 1 to 128 characters.
        timeout: how many seconds to wait; None for as long as it takes.

    Raises:
        TimeoutError: the time is up. The next wait gets the value that this one would have got.
        context.QuestionError: an argument is wrong.
        RuntimeError: called outside a task, or in a batched call.
    """
    return _implementation().wait_for(name, timeout)


async def wait_for_async(name: str, timeout: float | None = None) -> Any:
    """As `wait_for`, without blocking other coroutines."""
    return await _implementation().wait_for_async(name, timeout)


def tracer() -> Any:
    """Return a tracer of OpenTelemetry, whose spans are part of the trace of the run.

        with context.tracer().start_as_current_span("search") as span:
            span.set_attribute("documents", len(found))

    Without a trace, because the server exports none or the caller's is not sampled, its spans are not recorded.

    Raises:
        RuntimeError: called outside a task, or the node has no OpenTelemetry.
    """
    return _implementation().tracer()


def ask_future(name: str, payload: Any = None, *, item: int | None = None) -> Any:
    """As `ask`, without waiting: return an object with `result()` and `add_done_callback`, which can be awaited.

    Questions that one thread asks reach the caller in the order in which they are asked. A question whose answer is not
    waited for may be lost when the task ends.
    """
    return _implementation().ask_future(name, payload, item=item)


class Endpoint(Protocol):
    """An instance of a service."""

    @property
    def endpoint(self) -> str:
        """Its address, `host:port`."""

    @property
    def host(self) -> str:
        """Its address without the port."""

    @property
    def port(self) -> int:
        """Its port."""

    @property
    def url(self) -> str:
        """Its address as the beginning of a URL, `http://host:port`."""

    @property
    def instance_id(self) -> str:
        """Its name."""


def service(name: str, *, item: int | None = None) -> Endpoint:
    """Wait until a service is ready, and return the address of the instance with the fewest requests.

    A service without instances starts one. It does not become idle while the attempt runs. In a coroutine use
    `service_async`.

    Args:
        name: the name of the service.
        item: in a batched call, the index of the asking item; otherwise None.

    Raises:
        context.AnswerError: there is no such service, its instances cannot start, or this node does not reach it.
        RuntimeError: called outside a task.
    """
    found: Endpoint = _implementation().service(name, item=item)
    return found


async def service_async(name: str, *, item: int | None = None) -> Endpoint:
    """As `service`, without blocking other coroutines."""
    found: Endpoint = await _implementation().service_async(name, item=item)
    return found


class Llm(Protocol):
    """A language model as clients of OpenAI's API reach it."""

    @property
    def base_url(self) -> str:
        """The URL of the gateway of this node, with `/v1`."""

    @property
    def api_key(self) -> str:
        """A key that ends with the attempt."""

    @property
    def model(self) -> str:
        """The name of the model, for requests."""

    def env(self) -> dict[str, str]:
        """Return environment variables for other programs and libraries: `OPENAI_BASE_URL`, `OPENAI_API_KEY`, ..."""

    def openai(self, **settings: Any) -> Any:
        """Return an `openai.OpenAI` for it."""

    def async_openai(self, **settings: Any) -> Any:
        """Return an `openai.AsyncOpenAI` for it."""


def llm(name: str, *, item: int | None = None) -> Llm:
    """Wait until a language model is ready, and return how it is reached. In a coroutine use `llm_async`.

    Raises as `service`.
    """
    found: Llm = _implementation().llm(name, item=item)
    return found


async def llm_async(name: str, *, item: int | None = None) -> Llm:
    """As `llm`, without blocking other coroutines."""
    found: Llm = await _implementation().llm_async(name, item=item)
    return found


def emit(chunk: Any, *, item: int | None = None) -> None:
    """Stream a chunk of the task's output, for `run.stream` and `run.chunks`. Any thread of the task may stream.

    It waits while the server has not received the chunks before. In a coroutine use `emit_async`: this function blocks
    all coroutines of the process meanwhile.

    Args:
        chunk: a picklable value, of at most 256 KiB by default.
        item: in a batched call, the index of the streaming item; otherwise None.

    Raises:
        context.StreamError: the server accepts no chunks, or `item` is wrong.
        RuntimeError: called outside a task.
    """
    _implementation().emit(chunk, item=item)


async def emit_async(chunk: Any, *, item: int | None = None) -> None:
    """As `emit`, without blocking other coroutines."""
    await _implementation().emit_async(chunk, item=item)


def progress(done: float, total: float | None = None, *, item: int | None = None) -> None:
    """Report how far the task is, in a unit of its own, for `run.progress` and `lattice runs show`.

    It never waits. Of calls in quick succession some are not sent; a call with `done == total` always is.

    Raises:
        context.StreamError: an argument is wrong.
        RuntimeError: called outside a task.
    """
    _implementation().progress(done, total, item=item)


def cancelled() -> bool:
    """Whether the attempt was cancelled or is over, for threads that a coroutine started.

    A coroutine itself gets CancelledError. The process of any other function is killed when it is cancelled. Raises
    RuntimeError outside a task.
    """
    found: bool = _implementation().cancelled()
    return found


def logger() -> logging.Logger:
    """Return a logger, of level INFO, whose records are lines of the task's output.

    Raises RuntimeError outside a task.
    """
    found: logging.Logger = _implementation().logger()
    return found


def __getattr__(name: str) -> Any:
    # The exception classes are defined by the process that runs the task.
    if (
        name in {"AnswerError", "CallError", "QuestionError", "StreamError"}
        and (found := sys.modules.get(IMPLEMENTATION)) is not None
    ):
        return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _implementation() -> Any:
    found = sys.modules.get(IMPLEMENTATION)
    if found is None:
        raise RuntimeError("there is no task running here; this works inside tasks only")
    return found
