"""Owns what replaces values of a config, or of a context, that cannot be sent to a node.

Rule: only the use of such a value raises. A node that does not use it runs as in plain LangGraph.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import BaseCallbackManager

from lattice_client.langgraph import codec, references
from lattice_client.langgraph.codec import References

ADVICE = "name the node in local=[...] to run it here"


class Missing:
    """Replaces a value that could not be sent to a node. It raises when it is used."""

    def __init__(self, name: str, reason: str) -> None:
        self.__dict__.update(_name=name, _reason=reason)

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{self._name} was not sent to the node that runs on Lattice: {self._reason}; {ADVICE}")

    __call__ = __getitem__ = __iter__ = __len__ = __bool__ = __enter__ = __aenter__ = _raise
    # Python looks for them before it enters.
    __exit__ = __aexit__ = _raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._raise()

    def __reduce__(self) -> Any:
        return Missing, (self._name, self._reason)


def is_runtime(value: Any) -> bool:
    """Whether a value is the `Runtime` of a node or the `ToolRuntime` of a tool."""
    return hasattr(value, "stream_writer") and hasattr(value, "execution_info")


class Replacing:
    """Replaces the values of one call that cannot be encoded."""

    def __init__(self, live: References) -> None:
        self._live = live

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config whose values can be encoded."""
        found = dict(config)
        configurable = dict(references.carried(found.get("configurable") or {}))
        for name, value in configurable.items():
            if is_runtime(value):
                configurable[name] = self.runtime(value)
        found["configurable"] = self._entries(configurable, "config['configurable']")
        found["metadata"] = self._entries(found.get("metadata") or {}, "config['metadata']")
        if isinstance(manager := found.get("callbacks"), BaseCallbackManager):
            found["callbacks"] = self._manager(manager)
        return found

    def runtime(self, runtime: Any) -> Any:
        """Return a runtime whose context, and whose config if it has one, can be encoded."""
        changes = {"context": self._context(runtime.context)}
        if hasattr(runtime, "config"):
            changes["config"] = self.config(runtime.config)
        return dataclasses.replace(runtime, **changes)

    def _manager(self, manager: BaseCallbackManager) -> BaseCallbackManager:
        # It passes the metadata of the config on to the runs of the node.
        found = copy.copy(manager)
        for name in ("metadata", "inheritable_metadata"):
            setattr(found, name, self._entries(getattr(manager, name) or {}, "config['metadata']"))
        return found

    def _context(self, context: Any) -> Any:
        if (reason := self._reason(context)) is None:
            return context
        if isinstance(context, Mapping):
            return self._entries(context, "context")
        attributes = getattr(context, "__dict__", {})
        found = copy.copy(context)
        if getattr(found, "__dict__", attributes) is not attributes:
            found.__dict__.update(self._entries(attributes, "context"))
        return found if self._reason(found) is None else Missing("the context", reason)

    def _entries(self, values: Mapping[str, Any], name: str) -> dict[str, Any]:
        reasons = {key: self._reason(value) for key, value in values.items()}
        return {
            key: value if (reason := reasons[key]) is None else Missing(f"{name}[{key!r}]", reason)
            for key, value in values.items()
        }

    def _reason(self, value: Any) -> str | None:
        try:
            codec.dumps(value, self._live)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None
