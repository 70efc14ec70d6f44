"""Owns the chunks and questions of a node, in the process of the graph.

Rule: they have their effect on the objects that the call of the node was given, in the context of that call.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.runnables.config import var_child_runnable_config

from lattice_client.langgraph.references import LocalReferences

StubOf = Callable[[Any], Any]


class Answers:
    """The effects of the chunks and questions of one call. `stub_of` returns the stub of a `@task`'s function."""

    def __init__(self, references: LocalReferences, stub_of: StubOf, is_async: bool) -> None:
        self._references = references
        self._stub_of = stub_of
        self._is_async = is_async
        self.error: BaseException | None = None

    def replay(self, chunk: tuple[Any, ...]) -> Awaitable[None] | None:
        """Have the effect of a chunk."""
        match chunk:
            case ("send", send, writes):
                send(writes)
            case ("custom", write, value, namespace):
                _in_namespace(namespace, write, value)
            case ("event", handler, name, args, kwargs):
                return self._event(handler, name, args, kwargs)
            case ("emit", handler, meta, message, dedupe):
                handler._emit(meta, message, dedupe=dedupe)
            case ("stream", stream, payload):
                stream(payload)
            case ("tool", write, delta):
                write(delta)
            case ("heartbeat", beat):
                beat()
            case ("drain", control, reason):
                control.request_drain(reason)
            case _:
                raise ValueError(f"a node sent a chunk of an unknown kind: {chunk[0]!r}")
        return None

    def _event(self, handler: Any, name: str, args: Any, kwargs: Any) -> Awaitable[None] | None:
        if self._is_async:
            return ahandle_event([handler], name, None, *args, **kwargs)
        handle_event([handler], name, None, *args, **kwargs)
        return None

    def answer(self, question: tuple[Any, ...]) -> Any:
        """Return the answer of a question, or an awaitable of it, or a future."""
        match question:
            case ("flush",):
                return None
            case ("end", error, state):
                self.error = error
                return self.restore(state)
            case ("method", item, name, args, kwargs):
                return self._method(item, name, args, kwargs)
            case ("read", read, args, kwargs):
                return read(*args, **kwargs)
            case ("null_resume", scratchpad, consume):
                return scratchpad.get_null_resume(consume)
            case ("drain_reason", control):
                return control.drain_reason
            case ("event", handler, name, args, kwargs):
                return self._event(handler, name, args, kwargs)
            case ("call", call, function, given, options):
                return call(self._stub_of(function), given, **options)
            case _:
                raise ValueError(f"a node asked a question of an unknown kind: {question[0]!r}")

    def _method(self, item: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "alist":
            return _collected(item.alist(*args, **kwargs))
        method = getattr(item, name)
        if asyncio.iscoroutinefunction(method) or name.startswith("a"):
            return method(*args, **kwargs)
        if self._is_async:
            # It may block until the event loop answers it, as the methods of a store for asyncio do.
            context = contextvars.copy_context()
            return asyncio.to_thread(context.run, _listed, method, args, kwargs)
        return _listed(method, args, kwargs)

    def restore(self, state: dict[int, Any]) -> None:
        """Apply the changes that a call made to values of the graph's process."""
        for number, changed in state.items():
            item = self._references.objects[number]
            if hasattr(item, "_visited_ns"):
                item._visited_ns.update(changed)
            else:
                item.resume[:] = changed


def _listed(method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    found = method(*args, **kwargs)
    return list(found) if hasattr(found, "__next__") else found


async def _collected(found: Any) -> list[Any]:
    return [item async for item in found]


def _in_namespace(namespace: str, write: Callable[[Any], None], value: Any) -> None:
    """Call a stream writer where its config has the namespace in which the node called it."""
    config: Any = var_child_runnable_config.get() or {}
    configurable = config.get("configurable") or {}
    if configurable.get("checkpoint_ns", "") == namespace:
        write(value)
        return
    token = var_child_runnable_config.set(
        {**config, "configurable": {**configurable, "checkpoint_ns": namespace}}  # type: ignore[arg-type]
    )
    try:
        write(value)
    finally:
        var_child_runnable_config.reset(token)


def is_future(value: Any) -> bool:
    """Whether an answer comes later, by callback."""
    return isinstance(value, Future | asyncio.Future)
