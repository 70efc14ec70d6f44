"""Owns the stand-ins, in the process of a node, for live objects of the graph's process.

Rule: a stand-in is an instance of the class by which LangGraph and LangChain recognise the object.
"""

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, cast

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import var_child_runnable_config
from langgraph._internal._scratchpad import PregelScratchpad
from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.runtime import RunControl
from langgraph.store.base import BaseStore

EVENTS = tuple(name for name in dir(BaseCallbackHandler) if name.startswith("on_"))


class Caller(Protocol):
    """The way to the process of the graph."""

    def emit(self, *chunk: Any) -> None:
        """Send a chunk, to which there is no answer."""

    def ask(self, *question: Any) -> Any:
        """Ask and wait for the answer."""

    async def ask_async(self, *question: Any) -> Any:
        """As `ask`, without blocking other coroutines."""

    def ask_future(self, *question: Any) -> Future[Any]:
        """Ask without waiting."""


class _Standing:
    """The attributes that a stand-in does not have."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        own = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name.startswith("_"):
            raise AttributeError(own)
        bases = ", ".join(base.__name__ for base in type(self).__bases__ if base is not _Standing)
        text = f"in a node that runs on Lattice this object has the methods of {bases} only"
        raise AttributeError(f"{own}: {text}; name the node in local=[...] to run it here")


class StoreProxy(_Standing, BaseStore):
    """A store: all methods of a store are batches of operations."""

    __slots__ = ("_caller", "supports_ttl", "ttl_config")

    def __init__(self, caller: Caller, data: Any) -> None:
        self._caller = caller
        self.supports_ttl, self.ttl_config = data

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        """Execute operations."""
        found: list[Any] = self._caller.ask("method", self, "batch", (list(ops),), {})
        return found

    async def abatch(self, ops: Iterable[Any]) -> list[Any]:
        """As `batch`, for asyncio."""
        found: list[Any] = await self._caller.ask_async("method", self, "abatch", (list(ops),), {})
        return found


def _public(config: Any) -> Any:
    """Return a config without the objects of a graph's loop, which no checkpointer uses."""
    if not isinstance(config, dict) or "configurable" not in config:
        return config
    own = {key: value for key, value in config["configurable"].items() if not key.startswith("__pregel_")}
    return {"configurable": own, **({"metadata": dict(config["metadata"])} if config.get("metadata") else {})}


def _asking(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._caller.ask("method", self, name, tuple(map(_public, args)), kwargs)

    return method


def _asking_async(name: str) -> Callable[..., Any]:
    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await self._caller.ask_async("method", self, name, tuple(map(_public, args)), kwargs)

    return method


class SaverProxy(_Standing, BaseCheckpointSaver[Any]):
    """A checkpointer, for graphs that a node runs itself."""

    def __init__(self, caller: Caller, next_version: Any) -> None:
        super().__init__()
        self._caller = caller
        self._next_version = next_version

    def get_next_version(self, current: Any, channel: None) -> Any:
        """Return the next version of a channel; it depends on no state of a checkpointer."""
        if self._next_version is not None:
            return self._next_version(self, current, channel)
        return self._caller.ask("method", self, "get_next_version", (current, channel), {})

    def list(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yield checkpoints."""
        yield from self._caller.ask("method", self, "list", tuple(map(_public, args)), kwargs)

    async def alist(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """As `list`, for asyncio."""
        for found in await self._caller.ask_async("method", self, "alist", tuple(map(_public, args)), kwargs):
            yield found

    def with_allowlist(self, extra_allowlist: Any) -> Any:
        """Return this stand-in: the checkpointer's own process encodes and decodes."""
        return self


for _name in ("get_tuple", "put", "put_writes", "delete_thread", "copy_thread", "prune", "delete_for_runs"):
    setattr(SaverProxy, _name, _asking(_name))
    setattr(SaverProxy, f"a{_name}", _asking_async(f"a{_name}"))
setattr(SaverProxy, "__abstractmethods__", frozenset())  # noqa: B010  # mypy does not know the attribute


class CacheProxy(_Standing, BaseCache[Any]):
    """A cache, for graphs that a node runs itself."""

    def __init__(self, caller: Caller, _data: Any) -> None:
        super().__init__()
        self._caller = caller


for _name in ("get", "set", "clear"):
    setattr(CacheProxy, _name, _asking(_name))
    setattr(CacheProxy, f"a{_name}", _asking_async(f"a{_name}"))
setattr(CacheProxy, "__abstractmethods__", frozenset())  # noqa: B010


class ControlProxy(RunControl):
    """The request to drain the graph's run, which is looked up at each use until there is one."""

    __slots__ = ("_caller",)

    def __init__(self, caller: Caller, reason: str | None) -> None:
        super().__init__()
        self._caller = caller
        self._drain_reason = reason

    def request_drain(self, reason: str = "shutdown") -> None:
        """Request a drain."""
        self._drain_reason = reason
        self._caller.emit("drain", self, reason)

    @property
    def drain_requested(self) -> bool:
        """Whether a drain was requested."""
        return self.drain_reason is not None

    @property
    def drain_reason(self) -> str | None:
        """The reason of the request."""
        if self._drain_reason is None:
            self._drain_reason = self._caller.ask("drain_reason", self)
        return self._drain_reason


def handler(caller: Caller, data: Any) -> BaseCallbackHandler:
    """Return the stand-in of one callback handler, which sends each event to exactly that handler."""
    raise_error, attributes, own, markers = data
    made: BaseCallbackHandler = _handler_class(markers, tuple(sorted(attributes.items())), raise_error)()
    vars(made).update(own, _caller=caller, stream=None, metadata={}, seen=set())
    return made


@functools.lru_cache(maxsize=256)
def _handler_class(markers: tuple[type, ...], attributes: tuple[tuple[str, bool], ...], raise_error: bool) -> Any:
    own = any(issubclass(marker, BaseCallbackHandler) for marker in markers)
    bases = markers if own else (BaseCallbackHandler, *markers)
    members: dict[str, Any] = {**dict(attributes), "raise_error": raise_error, "run_inline": True}
    members |= {name: _forwarding(name, raise_error) for name in EVENTS}
    members |= {"__init__": lambda self: None, "_emit": _emit}
    members |= {"tap_output_iter": _untapped, "tap_output_aiter": _untapped}
    return type("HandlerProxy", bases, members)


def _forwarding(name: str, raise_error: bool) -> Callable[..., None]:
    def event(self: Any, *args: Any, **kwargs: Any) -> None:
        if raise_error:
            self._caller.ask("event", self, name, args, kwargs)
        else:
            self._caller.emit("event", self, name, args, kwargs)

    return event


def _emit(self: Any, meta: Any, message: Any, *, dedupe: bool = False) -> None:
    self._caller.emit("emit", self, meta, message, dedupe)


def _untapped(self: Any, run_id: Any, output: Any) -> Any:
    return output


def scratchpad(caller: Caller, data: Any) -> Any:
    """Return the stand-in of a task's scratchpad. Its answers of interrupts are sent back at the end."""
    kind, step, stop, resume, has_null_resume = data
    counters = PregelScratchpad.__dataclass_fields__.keys() & {"call_counter", "interrupt_counter", "subgraph_counter"}

    def null_resume(consume: bool = False) -> Any:
        return caller.ask("null_resume", made, consume) if has_null_resume else None

    made = kind(
        step=step, stop=stop, resume=resume, get_null_resume=null_resume, **{name: _Counter() for name in counters}
    )
    return made


class _Counter:
    def __init__(self) -> None:
        self._next = 0

    def __call__(self) -> int:
        found, self._next = self._next, self._next + 1
        return found


def replay(caller: Caller, data: Any) -> Any:
    """Return the stand-in of the state of a replay. Its visited namespaces are sent back at the end."""
    kind, checkpoint_id, visited = data
    made = kind(checkpoint_id)
    made._visited_ns.update(visited)
    return made


def function_of(kind: str, caller: Caller) -> Any:
    """Return the stand-in of a function of the graph's loop."""

    def send(writes: Sequence[Any]) -> None:
        caller.emit("send", send, list(writes))

    def writer(value: Any) -> None:
        caller.emit("custom", writer, value, _namespace())

    def heartbeat() -> None:
        caller.emit("heartbeat", heartbeat)

    def read(*args: Any, **kwargs: Any) -> Any:
        return caller.ask("read", read, args, kwargs)

    def call(func: Any, input: Any, **options: Any) -> Any:
        asked = caller.ask_future("call", call, func, input, options)
        return asyncio.wrap_future(asked) if _is_in_coroutine() else asked

    def tool_writer(delta: Any) -> None:
        caller.emit("tool", tool_writer, delta)

    functions = (send, writer, heartbeat, read, call, tool_writer)
    return {function.__name__: function for function in functions}[kind]


def stream(caller: Caller, data: Any) -> Any:
    """Return the stand-in of the stream of the graph's run."""
    kind, modes = data
    made: Any = kind(lambda chunk: caller.emit("stream", made, chunk), modes)
    return made


def _namespace() -> str:
    config: Any = var_child_runnable_config.get() or {}
    return str((config.get("configurable") or {}).get("checkpoint_ns", ""))


def _is_in_coroutine() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


MAKERS: dict[str, Callable[[Caller, Any], Any]] = {
    "store": StoreProxy,
    "saver": SaverProxy,
    "cache": CacheProxy,
    "control": ControlProxy,
    "handler": handler,
    "scratchpad": scratchpad,
    "replay": replay,
    "stream": stream,
}


# The attempt whose code runs.
current: "contextvars.ContextVar[Caller]" = contextvars.ContextVar("lattice_langgraph_session")


class _Current:
    """The way to the graph's process for objects in the code of a node, which many attempts share."""

    def __getattr__(self, name: str) -> Any:
        return getattr(current.get(), name)


# By identity: each stand-in for an object that a node's code captures, and its reference.
_captured: dict[int, tuple[Any, Any]] = {}


def captured(kind: str, number: int, data: Any) -> Any:
    """Return the stand-in of a live object that the code of a node captures; its number is negative."""
    made = proxy(kind, cast(Caller, _Current()), data)
    _captured[id(made)] = made, (kind, number, None)
    return made


def captured_reference(item: Any) -> Any:
    """Return the reference of such a stand-in; None for another object."""
    found = _captured.get(id(item))
    return found and found[1]


def proxy(kind: str, caller: Caller, data: Any) -> Any:
    """Return the stand-in of a live object."""
    make = MAKERS.get(kind)
    return function_of(kind, caller) if make is None else make(caller, data)
