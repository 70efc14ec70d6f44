"""Owns a node in the process that runs it: its arguments, its live objects, and its result.

Rule: chunks and questions of a node reach the graph's process in one order, and the result comes after all of them.
"""

import asyncio
import contextvars
import functools
import json
import pickle
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.errors import GraphBubbleUp
from langgraph.pregel._tools import _tool_call_writer

from lattice_client import context
from lattice_client.code.blame import blame_value
from lattice_client.langgraph import codec, proxies, reductions
from lattice_client.langgraph.exceptions import add_traceback
from lattice_client.langgraph.missing import ADVICE, Missing

T = TypeVar("T")
NAME = "langgraph"
# Below the limit that servers have for a question; a longer message is sent in parts.
PART_BYTES = 512 * 1024
WHOLE, PART, REST = b"M", b"P", b"R"


class Session:
    """One attempt of a node, and its way to the graph's process. Any thread of the attempt may use it."""

    def __init__(self) -> None:
        # A question is asked in the context of the attempt, also from threads that do not have it.
        self._context = contextvars.copy_context()
        # Reentrant, because the answer to a chunk may be there before its callback is added, which then runs at once.
        self._lock = threading.RLock()
        self._chunks: list[bytes] = []
        self._is_sending = False
        self._has_emitted = False
        self._failure: BaseException | None = None
        self._proxies: dict[int, Any] = {}
        self._references: dict[int, Any] = {}

    def reference_of(self, item: Any) -> Any:
        """Return the reference of a stand-in."""
        return self._references.get(id(item)) or proxies.captured_reference(item)

    def find(self, reference: Any) -> Any:
        """Return the stand-in of a reference."""
        kind, number, data = reference
        if (found := self._proxies.get(number)) is None:
            found = self._proxies[number] = proxies.proxy(kind, self, data)
            self._references[id(found)] = (kind, number, None)
        return found

    def emit(self, *chunk: Any) -> None:
        """Send a chunk; chunks of the time until the answer to the last message are sent together."""
        data = codec.dumps(chunk, self)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._has_emitted = True
            self._chunks.append(data)
            if not self._is_sending:
                self._send_chunks()

    def _send_chunks(self) -> None:
        self._is_sending = True
        self._send(None).add_done_callback(self._sent)

    def _sent(self, answer: Any) -> None:
        try:
            self._answered(answer.result()[1:])
            failure = None
        except BaseException as error:
            failure = error
        with self._lock:
            self._is_sending = False
            self._failure = self._failure or failure
            if self._chunks and failure is None:
                self._send_chunks()

    def _send(self, question: bytes | None) -> Any:
        """Send the chunks so far and a question, with the lock held."""
        data = pickle.dumps((self._chunks, question), protocol=5)
        self._chunks = []
        while len(data) > PART_BYTES:
            self._ask_future(PART + data[:PART_BYTES])
            data = data[PART_BYTES:]
        return self._ask_future(WHOLE + data)

    def _ask_future(self, data: bytes) -> Any:
        return self._context.copy().run(context.ask_future, NAME, data)

    def _asked(self, question: tuple[Any, ...]) -> Any:
        data = codec.dumps(question, self)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._has_emitted = False
            return self._send(data)

    def ask(self, *question: Any) -> Any:
        """Ask the graph's process and wait. Raises the exception that the answer is."""
        data = self._asked(question).result()
        parts = []
        while data[:1] == PART:
            parts.append(data[9:])
            data = self._ask_future(REST + data[1:9]).result()
        return self._answered(b"".join([*parts, data[1:]]))

    async def ask_async(self, *question: Any) -> Any:
        """As `ask`, without blocking other coroutines."""
        data = await self._asked(question)
        parts = []
        while data[:1] == PART:
            parts.append(data[9:])
            data = await self._ask_future(REST + data[1:9])
        return self._answered(b"".join([*parts, data[1:]]))

    def ask_future(self, *question: Any) -> "Future[Any]":
        """Ask without waiting."""
        found: Future[Any] = CallFuture()
        found.set_running_or_notify_cancel()

        def ask() -> None:
            try:
                found.set_result(self.ask(*question))
            except BaseException as error:
                found.set_exception(error)

        # The answer may be in parts, which are asked for: the thread that brings answers must not wait for them.
        threading.Thread(target=contextvars.copy_context().run, args=(ask,), daemon=True).start()
        return found

    def _answered(self, data: bytes) -> Any:
        kind, value = codec.loads(data, self)
        if kind == "error":
            raise value
        return value

    def arguments(self, message: bytes) -> tuple[Any, Any]:
        """Return the arguments of the call, and make its config that of the present context."""
        proxies.current.set(self)
        args, kwargs, config, tool_writer = codec.loads(message, self)
        if config is not None:
            var_child_runnable_config.set(config)
        if tool_writer is not None:
            _tool_call_writer.set(tool_writer)
        return args, kwargs

    def state(self) -> dict[int, Any]:
        """Return the changed values of stand-ins that hold values, by the number of the object."""
        found: dict[int, Any] = {}
        for number, item in self._proxies.items():
            match self._references[id(item)][0]:
                case "scratchpad":
                    found[number] = list(item.resume)
                case "replay":
                    found[number] = sorted(item._visited_ns)
        return found

    def result(self, kind: str, value: Any) -> bytes:
        """Return the encoded result. Raises TypeError, which names the part of it that cannot be pickled."""
        try:
            return codec.dumps((kind, value, self.state()), self)
        except Exception as error:
            text = blame_value("the result of the node", value, error, lambda part: codec.dumps(part, self), ADVICE)
            raise TypeError(text) from error

    def failed(self, error: BaseException) -> tuple[Any, ...]:
        """Return the question that tells an exception."""
        add_traceback(error)
        return "end", error, self.state()

    @property
    def must_flush(self) -> bool:
        """Whether chunks may not have arrived yet."""
        return self._has_emitted or self._failure is not None


class CallFuture(Future[Any]):
    """The future of a `@task`, which can also be awaited."""

    def __await__(self) -> Any:
        return asyncio.wrap_future(self).__await__()


def _named(node: T, function: Any) -> T:
    """Give a function the module of the one it runs, whose files are then sent: values are often of its classes."""
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    if isinstance(module, str):
        node.__module__ = module
    return node


def plain(function: Callable[..., Any]) -> Callable[[bytes], bytes]:
    """Return the function of a task that runs a plain function with encoded arguments."""

    def node(message):  # type: ignore[no-untyped-def]  # without annotations, its input is any value
        return run(function, message)

    return _named(node, function)


def coroutine(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[[bytes], Coroutine[Any, Any, bytes]]:
    """Return the coroutine function of a task that runs one with encoded arguments."""

    async def node(message):  # type: ignore[no-untyped-def]
        return await run_async(function, message)

    return _named(node, function)


def sandboxed(function: Callable[..., Any]) -> Callable[[bytes], bytes]:
    """Return the function of a task in a sandbox. It reaches nothing of the graph's process and returns JSON."""

    def node(message):  # type: ignore[no-untyped-def]
        return run_sandboxed(function, message)

    return _named(node, function)


def run(function: Callable[..., Any], message: bytes) -> bytes:
    """Run a plain function; return its encoded result. An exception is told to the graph's process and raised."""
    reductions.install()
    session = Session()
    args, kwargs = session.arguments(message)
    try:
        value = function(*args, **kwargs)
        if session.must_flush:
            session.ask("flush")
    except (GraphBubbleUp, asyncio.CancelledError) as error:
        if session.must_flush:
            session.ask("flush")
        return session.result("raised", error)
    except BaseException as error:
        session.ask(*session.failed(error))
        raise
    return session.result("value", value)


async def run_async(function: Callable[..., Coroutine[Any, Any, Any]], message: bytes) -> bytes:
    """Run a coroutine function; as `run`."""
    reductions.install()
    session = Session()
    args, kwargs = session.arguments(message)
    task = asyncio.current_task()
    try:
        value = await function(*args, **kwargs)
        if session.must_flush:
            await session.ask_async("flush")
    except (GraphBubbleUp, asyncio.CancelledError) as error:
        if task is not None and task.cancelling():
            raise
        if session.must_flush:
            await session.ask_async("flush")
        return session.result("raised", error)
    except BaseException as error:
        await session.ask_async(*session.failed(error))
        raise
    return session.result("value", value)


class _Unreachable:
    """The references of a call in a sandbox: using the object of a reference raises."""

    def reference_of(self, item: Any) -> Any:
        return None

    def find(self, reference: Any) -> Any:
        return Missing(f"the {reference[0]} of the graph", "a sandbox reaches nothing of the graph's process")


def run_sandboxed(function: Callable[..., Any], message: bytes) -> bytes:
    """Run a function in a sandbox; return the JSON of its value, which the graph's process need not unpickle."""
    reductions.install()
    args, kwargs, config, _ = codec.loads(message, _Unreachable())
    if config is not None:
        var_child_runnable_config.set(config)
    value = function(*args, **kwargs)
    if asyncio.iscoroutine(value):
        value = asyncio.run(value)
    try:
        text = json.dumps(value)
        is_exact = bool(json.loads(text) == value)
    except (TypeError, ValueError):
        is_exact = False
    if not is_exact:
        text = "a node in a sandbox must return texts, numbers, lists and dicts with texts as keys"
        raise TypeError(f"{text}; it returned a {type(value).__name__} that JSON does not represent exactly")
    return text.encode()
