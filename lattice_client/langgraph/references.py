"""Owns the live objects of one call in the process of the graph. Rule: an object keeps its reference during the call.

A reference is a tuple of its kind, its number and the data that its proxy in the node needs.
"""

import functools
import itertools
import weakref
from collections.abc import Mapping, MutableMapping
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.runtime import RunControl
from langgraph.store.base import BaseStore

PRIVATE = "__pregel_"
# Functions and objects of the graph's loop, in `config["configurable"]`, and the kinds of their proxies.
KINDS = {
    "__pregel_send": "send",
    "__pregel_read": "read",
    "__pregel_read_state": "read",
    "__pregel_call": "call",
    "__pregel_scratchpad": "scratchpad",
    "__pregel_stream": "stream",
    "__pregel_replay_state": "replay",
}
# Values that a node may use as they are, or through proxies that their classes name.
CARRIED = frozenset(
    {
        "__pregel_runtime",
        "__pregel_checkpointer",
        "__pregel_cache",
        "__pregel_task_id",
        "__pregel_durability",
        "__pregel_resuming",
        "__pregel_resume_map",
        "__pregel_strict_resume",
        "__pregel_stream_messages_v2",
        "__pregel_node_error",
        *KINDS,
    }
)
CLASSES: dict[type, str] = {
    BaseStore: "store",
    BaseCheckpointSaver: "saver",
    BaseCache: "cache",
    BaseCallbackHandler: "handler",
    RunControl: "control",
}
HANDLER_ATTRIBUTES = (
    "ignore_llm",
    "ignore_retry",
    "ignore_chain",
    "ignore_agent",
    "ignore_retriever",
    "ignore_chat_model",
    "ignore_custom_event",
    "ignore_stream_event",
)


@functools.lru_cache(maxsize=4096)
def _kind_of(cls: type) -> str:
    return next((kind for base, kind in CLASSES.items() if issubclass(cls, base)), "")


class LocalReferences:
    """The live objects of one call: the objects in its config, and all objects of `CLASSES`."""

    def __init__(self, config: RunnableConfig | None) -> None:
        self.objects: list[Any] = []
        self._references: dict[int, tuple[Any, ...]] = {}
        self._functions: dict[int, str] = {}
        configurable = (config or {}).get("configurable") or {}
        for key, kind in KINDS.items():
            if (value := configurable.get(key)) is not None:
                self._functions[id(value)] = kind
        if (runtime := configurable.get("__pregel_runtime")) is not None:
            self.note_runtime(runtime)

    def note_runtime(self, runtime: Any) -> None:
        """Note the functions of a runtime."""
        self._functions[id(runtime.stream_writer)] = "writer"
        if (heartbeat := getattr(runtime, "heartbeat", None)) is not None:
            self._functions[id(heartbeat)] = "heartbeat"

    def reference_of(self, item: Any) -> Any:
        """Return the reference of a live object; None for an object that is pickled."""
        identity = id(item)
        if (found := self._references.get(identity)) is not None:
            return found
        cls: Any = type(item)
        kind = self._functions.get(identity) or _kind_of(cls)
        if not kind:
            return None
        reference = (kind, len(self.objects), _data_of(kind, item))
        self.objects.append(item)  # which also keeps its identity from being used again
        self._references[identity] = reference
        return reference

    def note_function(self, function: Any, kind: str) -> None:
        """Note a function that is not in the config."""
        self._functions[id(function)] = kind

    def find(self, reference: Any) -> Any:
        """Return the object of a received reference."""
        number = reference[1]
        if number >= 0:
            return self.objects[number]
        return _kept[number] if number in _kept else _captured[number]


# Live objects that the code of nodes captures, by negative numbers; those without weak references are small.
_captured: MutableMapping[int, Any] = weakref.WeakValueDictionary()
_kept: dict[int, Any] = {}
_numbers = itertools.count(1)


def captured(item: Any) -> tuple[str, int, Any] | None:
    """Return the kind, the number and the data of a live object that code captures; None for any other object."""
    cls: Any = type(item)
    if not (kind := _kind_of(cls)):
        return None
    known = [*_captured.items(), *_kept.items()]
    number = next((found for found, other in known if other is item), None)
    if number is None:
        number = -next(_numbers)
        try:
            _captured[number] = item
        except TypeError:
            _kept[number] = item
    return kind, number, _data_of(kind, item)


def _data_of(kind: str, item: Any) -> Any:
    match kind:
        case "store":
            return item.supports_ttl, item.ttl_config
        case "saver":
            return type(item).get_next_version if _is_importable(type(item)) else None
        case "handler":
            attributes = {name: bool(getattr(item, name, False)) for name in HANDLER_ATTRIBUTES}
            own = {name: getattr(item, name) for name in ("subgraphs", "parent_ns") if hasattr(item, name)}
            return bool(item.raise_error), attributes, own, _markers_of(type(item))
        case "control":
            return item.drain_reason
        case "scratchpad":
            return type(item), item.step, item.stop, item.resume, item.get_null_resume(False) is not None
        case "stream":
            return type(item), item.modes
        case "replay":
            return type(item), item.checkpoint_id, sorted(item._visited_ns)
    return None


def _markers_of(cls: type) -> tuple[type, ...]:
    """Return the classes by which LangGraph and LangChain recognise a handler."""
    installed = [base for base in cls.__mro__ if base.__module__.startswith(("langgraph.", "langchain_core.tracers"))]
    if cls in installed and cls.__module__.startswith("langgraph."):
        return (cls,)
    return tuple(base for base in installed if base.__module__ == "langchain_core.tracers._streaming")


def _is_importable(cls: type) -> bool:
    return cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def carried(configurable: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `configurable` that a node gets."""
    return {key: value for key, value in configurable.items() if not key.startswith(PRIVATE) or key in CARRIED}
