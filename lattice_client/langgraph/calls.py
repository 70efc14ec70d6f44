"""Owns one call of a node: it sends the arguments, answers the node's questions, and returns the node's result.

Rule: the thread that made the call, or its event loop, has the effects of the node, in the context of the call.
"""

import asyncio
import builtins
import itertools
import json
import pickle
import queue
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.pregel._tools import _tool_call_writer

from lattice_client import background
from lattice_client.code.blame import blame_value
from lattice_client.errors import TaskFailedError
from lattice_client.graph.definition import TaskDefinition
from lattice_client.langgraph import codec, references
from lattice_client.langgraph.answers import Answers, StubOf, is_future
from lattice_client.langgraph.invocation import Asked, Ended, Invocation, Started
from lattice_client.langgraph.loop import CANCEL_S
from lattice_client.langgraph.missing import ADVICE, Replacing, is_runtime
from lattice_client.langgraph.remote import PART, PART_BYTES, REST, WHOLE


class WorkerLostError(ConnectionError):
    """The attempt of a node was lost after the node had written or asked something, and another one began to."""


class Call:
    """One call of a node. `is_sandboxed`: the node reaches nothing, and its result is JSON."""

    def __init__(
        self,
        definition: TaskDefinition[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        stub_of: StubOf,
        *,
        is_async: bool,
        is_sandboxed: bool,
    ) -> None:
        self._definition = definition
        self._is_sandboxed = is_sandboxed
        config: Any = var_child_runnable_config.get()
        self._step = ((config or {}).get("metadata") or {}).get("langgraph_step")
        self._references = references.LocalReferences(config)
        for value in (*arguments[0], *arguments[1].values()):
            if is_runtime(value):
                self._references.note_runtime(value)
        self._tool_writer = _tool_call_writer.get()
        if self._tool_writer is not None:
            self._references.note_function(self._tool_writer, "tool_writer")
        self._answers = Answers(self._references, stub_of, is_async)
        self._message = self._encoded(*arguments, config)
        self._attempt = 0
        # Whether the present attempt has written or asked something, other than telling its exception.
        self._has_reached = False
        self._parts: list[bytes] = []
        self._rests: dict[int, bytes] = {}
        self._numbers = itertools.count()
        self._started: Started | None = None

    def _encoded(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> bytes:
        sent = None if config is None else dict(config)
        if sent is not None:
            sent["configurable"] = references.carried(sent.get("configurable") or {})
            if "metadata" in sent:
                sent["metadata"] = dict(sent["metadata"])

        def message(sent: Any, replaced: Callable[[Any], Any]) -> Any:
            own = [sent if value is config and config is not None else replaced(value) for value in args]
            named = {name: sent if value is config else replaced(value) for name, value in kwargs.items()}
            return tuple(own), named, sent, self._tool_writer

        try:
            return codec.dumps(message(sent, lambda value: value), self._references)
        except Exception:
            # A value of the config, or of the context, cannot be pickled: only its use raises.
            replacing = Replacing(self._references)
            sent = None if sent is None else replacing.config(sent)
            found = message(sent, lambda value: replacing.runtime(value) if is_runtime(value) else value)
        try:
            return codec.dumps(found, self._references)
        except Exception as error:
            raise TypeError(self._refusal(found, error)) from error

    def _refusal(self, message: Any, error: Exception) -> str:
        args, kwargs, *_ = message
        where = f"node {self._definition.name!r} cannot run on Lattice: its input"
        value: Any = args[0] if len(args) == 1 else args
        if codec.is_picklable(args, self._references):
            where, value = f"node {self._definition.name!r} cannot run on Lattice: its arguments", kwargs
        return blame_value(where, value, error, lambda part: codec.dumps(part, self._references), ADVICE)

    def _start(self, invocation: Invocation, deliver: Any, *, is_async: bool) -> None:
        name = self._definition.name
        label = name if self._step is None else f"{name}-{self._step}"
        self._started = invocation.start(self._definition, name, label, self._message, deliver, is_async=is_async)

    def _cancel(self) -> None:
        if self._started is not None:
            self._started.cancel()

    def run(self, invocation: Invocation) -> Any:
        """Wait for the result in this thread; return it or raise the node's exception."""
        inbox: queue.SimpleQueue[Asked | Ended] = queue.SimpleQueue()
        self._start(invocation, inbox.put, is_async=False)
        try:
            while not isinstance(item := inbox.get(), Ended):
                self._take(item)
        except BaseException:
            self._cancel()
            raise
        return self._result(item)

    async def run_async(self, invocation: Invocation) -> Any:
        """As `run`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Asked | Ended] = asyncio.Queue()

        def deliver(item: Asked | Ended) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        self._start(invocation, deliver, is_async=True)
        answering: set[asyncio.Task[None]] = set()
        try:
            while not isinstance(item := await inbox.get(), Ended):
                await self._take_async(item, answering)
        except BaseException:
            self._cancel()
            await asyncio.shield(_ended(inbox))
            raise
        finally:
            for task in answering:
                task.cancel()
        return self._result(item)

    def _take(self, asked: Asked) -> None:
        self._enter(asked.attempt)
        try:
            found = self._received(asked)
            if found is None:
                return
            chunks, question = found
            for chunk in chunks:
                self._answers.replay(codec.loads(chunk, self._references))
            answer: Any = self._answers.answer(self._question(question)) if question else None
            if is_future(answer):
                answer.add_done_callback(lambda done: self._reply_future(asked, done))
            elif asyncio.iscoroutine(answer):
                self._reply(asked, "value", asyncio.run(answer))
            else:
                self._reply(asked, "value", answer)
        except Exception as error:
            self._reply(asked, "error", error)

    async def _take_async(self, asked: Asked, answering: "set[asyncio.Task[None]]") -> None:
        self._enter(asked.attempt)
        try:
            found = self._received(asked)
            if found is None:
                return
            chunks, question = found
            for chunk in chunks:
                if (waiting := self._answers.replay(codec.loads(chunk, self._references))) is not None:
                    await waiting
            answer: Any = self._answers.answer(self._question(question)) if question else None
            if is_future(answer):
                answer.add_done_callback(lambda done: self._reply_future(asked, done))
            elif hasattr(answer, "__await__"):
                # Other questions of the node are answered meanwhile.
                replying = self._reply_awaited(asked, answer)
                task = background.start(replying, lambda error: self._reply(asked, "error", error))
                answering.add(task)
                task.add_done_callback(answering.discard)
            else:
                self._reply(asked, "value", answer)
        except Exception as error:
            self._reply(asked, "error", error)

    async def _reply_awaited(self, asked: Asked, answer: Awaitable[Any]) -> None:
        try:
            self._reply(asked, "value", await answer)
        except Exception as error:
            self._reply(asked, "error", error)

    def _reply_future(self, asked: Asked, done: Any) -> None:
        if done.cancelled():
            self._reply(asked, "error", asyncio.CancelledError())
        elif (error := done.exception()) is not None:
            self._reply(asked, "error", error)
        else:
            self._reply(asked, "value", done.result())

    def _received(self, asked: Asked) -> tuple[list[bytes], bytes | None] | None:
        """Return the chunks and the question of a message; None when it was answered or is not complete."""
        if self._is_sandboxed:
            asked.reply(PermissionError("a node in a sandbox reaches nothing of the graph's process"))
            return None
        kind, data = asked.data[:1], asked.data[1:]
        if kind == REST:
            self._send(asked, self._rests.pop(int.from_bytes(data, "big")))
            return None
        self._parts.append(data)
        if kind == PART:
            asked.reply(WHOLE)
            return None
        whole, self._parts = b"".join(self._parts), []
        chunks, question = pickle.loads(whole)
        self._has_reached = self._has_reached or bool(chunks)
        return chunks, question

    def _question(self, encoded: bytes) -> tuple[Any, ...]:
        question: tuple[Any, ...] = codec.loads(encoded, self._references)
        self._has_reached = self._has_reached or question[0] != "end"
        return question

    def _enter(self, attempt: int) -> None:
        """Note the attempt of a message. Raises the exception of an earlier one that has reached something."""
        if self._attempt in {0, attempt}:
            self._attempt = attempt
            return
        if self._has_reached:
            if self._answers.error is not None:
                raise self._answers.error
            text = f"node {self._definition.name!r} had written or asked something before its attempt was lost"
            raise WorkerLostError(f"{text}; a retry policy for ConnectionError runs it again")
        self._attempt, self._parts, self._answers.error = attempt, [], None
        self._rests.clear()

    def _reply(self, asked: Asked, kind: str, value: Any) -> None:
        try:
            data = codec.dumps((kind, value), self._references)
        except Exception as error:
            text = f"the answer to node {self._definition.name!r} cannot be pickled: {error}"
            data = codec.dumps(("error", TypeError(text)), self._references)
        self._send(asked, data)

    def _send(self, asked: Asked, data: bytes) -> None:
        if len(data) <= PART_BYTES:
            asked.reply(WHOLE + data)
            return
        number = next(self._numbers)
        self._rests[number] = data[PART_BYTES:]
        asked.reply(PART + number.to_bytes(8, "big") + data[:PART_BYTES])

    def _result(self, ended: Ended) -> Any:
        if ended.error is not None:
            if self._answers.error is not None:
                raise self._answers.error
            if isinstance(ended.error, TaskFailedError):
                raise _error_of(ended.error, self._is_sandboxed)
            raise ended.error
        if self._is_sandboxed:
            return json.loads(ended.result)
        kind, value, state = codec.loads(ended.result, self._references)
        self._answers.restore(state)
        if kind == "raised":
            raise value
        return value


async def _ended(inbox: "asyncio.Queue[Asked | Ended]") -> None:
    """Wait, for a limited time, for the end of a cancelled call, so that its work is over when the caller continues."""
    try:
        async with asyncio.timeout(CANCEL_S):
            while not isinstance(await inbox.get(), Ended):
                pass
    except TimeoutError:
        pass


def _error_of(error: TaskFailedError, is_sandboxed: bool) -> BaseException:
    """Return the exception of a failed node; from a sandbox only a text with the name of a class arrives."""
    if not is_sandboxed:
        # Without a question that told it, as for arguments that the worker could not load.
        return error.__cause__ if error.kind == "USER_ERROR" and error.__cause__ is not None else error
    module, _, name = error.error_type.rpartition(".")
    places = (sys.modules.get(module),) if module else (builtins, sys.modules["__main__"])
    found = next((getattr(place, name) for place in places if hasattr(place, name)), None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return error
    try:
        made: BaseException = found.__new__(found, error.error_message)
        made.args = (error.error_message,)
    except Exception:  # a class that cannot be made without its arguments
        return error
    made.__cause__ = error
    return made
