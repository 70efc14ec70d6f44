"""Owns the public class for LangGraph. Rule: LangGraph is imported when a method needs it, as it is an extra."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, Unpack

from lattice_client.graph.settings import disconnect_grace_s
from lattice_client.langgraph.loop import Loop
from lattice_client.sync import LatticeClient
from lattice_client.transport.security import SecurityOptions

if TYPE_CHECKING:
    from lattice_client.langgraph.stubs import Runner


@contextmanager
def _extra() -> Iterator[None]:
    """Raise ModuleNotFoundError with advice for an import that needs the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in {"langgraph", "langchain_core"}:
            raise
        text = f'LangGraphClient needs more packages: pip install "lattice-control-plane[langgraph]" ({error})'
        raise ModuleNotFoundError(text, name=error.name) from None


class LangGraphClient:
    """Runs nodes, tools and tasks of LangGraph graphs on a server.

    `task` wraps one function; `compile` takes a whole graph. Results are those of plain LangGraph; docs/langgraph.md
    lists the differences. It connects as `LatticeClient` does. An invocation is cancelled when this client is
    disconnected for 30 s, or with `cancel_on_disconnect` for one second, or that many.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        cancel_on_disconnect: bool | float = False,
        **security: Unpack[SecurityOptions],
    ) -> None:
        disconnect_grace_s(cancel_on_disconnect)
        self._client = LatticeClient(target, **security)
        self._loop = Loop()
        self._cancel_on_disconnect = cancel_on_disconnect

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
        self._loop.stop()

    @functools.cached_property
    def _runner(self) -> "Runner":
        with _extra():
            from lattice_client.langgraph.stubs import Runner

        return Runner(self._client, self._loop, cancel_on_disconnect=self._cancel_on_disconnect)

    def task(self, function: Any = None, /, **settings: Any) -> Any:
        """Wrap a function, so that a call runs on the server and has the function's result or exception.

        Use it bare, with `resources={...}`, or with options of `@task`, such as `cpu=2`. A coroutine function stays
        one. Also partial functions, objects that can be called, tools, Runnables and compiled graphs can be wrapped;
        of a graph, the nodes run on the server.
        """
        if function is None:
            return lambda decorated: self.task(decorated, **settings)
        with _extra():
            from lattice_client.langgraph.wrapping import wrapped

        return wrapped(self._runner, function, settings)

    def compile(
        self,
        graph: Any,
        *,
        resources: Mapping[str, Mapping[str, Any]] | None = None,
        default: Mapping[str, Any] | None = None,
        isolation: str | Mapping[str, str] = "",
        local: Sequence[str] = (),
        **arguments: Any,
    ) -> Any:
        """Return a compiled graph whose nodes run on the server, each invocation as one run.

        Args:
            graph: a `StateGraph`, a compiled graph, an agent or an entrypoint.
            resources: options of `@task` by the name of a node, of a tool as `"tools.search"`, or of a node in a
                subgraph as `"subgraph.node"`; such as `{"embed": {"gpu": 1}}`.
            default: options of the other nodes.
            isolation: the level of all nodes, or levels by name.
            local: the names of nodes and tools that stay in this process.
            arguments: those of `StateGraph.compile`, such as `checkpointer` and `store`.

        Raises:
            TaskDefinitionError: a name does not exist, an option is wrong, or the code of a node cannot be sent.
        """
        with _extra():
            from lattice_client.langgraph.compiling import Plan, compiled

        return compiled(self._runner, graph, Plan.of(resources, default, isolation, local), arguments)


Decorated = Callable[..., Any]
