"""Owns the stubs, which stand in for functions in the process of a graph and run them on Lattice.

Rule: a stub looks like its function: its name, module, signature, and whether it is a coroutine function.
"""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, var_child_runnable_config

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.definition import TaskDefinition, define
from lattice_client.langgraph import captures, remote
from lattice_client.langgraph.calls import Call
from lattice_client.langgraph.invocation import Invocation, current
from lattice_client.langgraph.loop import CANCEL_S, Loop
from lattice_client.langgraph.reductions import STUB, is_in_attempt
from lattice_client.sync import LatticeClient
from lattice_client.transport import forks

# Each invocation of an entrypoint may define new `@task` functions.
MAX_TASKS = 1024


class TaskPlan(Protocol):
    """Which `@task` functions of an entrypoint run where. `used` are the names that the graph has."""

    @property
    def local(self) -> frozenset[str]:
        """The names of the functions that stay in the process of the graph."""

    @property
    def used(self) -> set[str]:
        """The names that the graph has."""

    def settings(self, name: str) -> dict[str, Any]:
        """Return the options of the task of a name."""


class Runner:
    """Makes stubs, and runs their calls in the open run of the present invocation, or in one of their own."""

    def __init__(self, client: LatticeClient, loop: Loop, *, cancel_on_disconnect: bool | float = False) -> None:
        self._client = client
        self._cancel_on_disconnect = cancel_on_disconnect
        self._loop = loop
        self._stub_of_task = functools.lru_cache(MAX_TASKS)(self._new_task_stub)

    def invocation(self, name: str) -> Invocation:
        """Return the invocation of a graph, whose run is opened by its first call. Raises ForkError."""
        forks.check_process()  # The thread of the loop does not exist in a forked process.
        return Invocation(self._client.aio, self._loop, name, cancel_on_disconnect=self._cancel_on_disconnect)

    def definition(
        self, function: Callable[..., Any], name: str, settings: Mapping[str, Any]
    ) -> TaskDefinition[..., Any]:
        """Return the task of a function with encoded arguments. Raises TaskDefinitionError."""
        if settings.get("isolation", "none") != "none":
            return define(remote.sandboxed(function), name=name, **settings)
        wrap: Any = remote.coroutine if is_coroutine_function(function) else remote.plain
        return define(wrap(function), name=name, **settings)

    def stub(
        self,
        function: Callable[..., Any],
        name: str,
        settings: Mapping[str, Any],
        *,
        is_async: bool | None = None,
        stands_for: Any = None,
    ) -> Any:
        """Return the stub of a function; with `is_async` a coroutine function, also for a plain function.

        Within an attempt it is `stands_for`, by default the function. Raises TaskDefinitionError for a wrong setting.
        """
        original = function if stands_for is None else stands_for
        definition = self.definition(function, name, settings)
        is_sandboxed = settings.get("isolation", "none") != "none"
        is_async = is_coroutine_function(function) if is_async is None else is_async

        def call(args: Any, kwargs: Any, is_async: bool) -> Call:
            given = (args, kwargs)
            return Call(definition, given, self.task_stub, is_async=is_async, is_sandboxed=is_sandboxed)

        stub: Any
        if is_async:

            async def coroutine(*args: Any, **kwargs: Any) -> Any:
                if is_in_attempt():
                    found = original(*args, **kwargs)
                    return await found if inspect.isawaitable(found) else found
                invocation = current.get()
                if invocation is not None:
                    return await call(args, kwargs, True).run_async(invocation)
                invocation = self.invocation(name)
                try:
                    return await call(args, kwargs, True).run_async(invocation)
                finally:
                    await ended_async(invocation)

            stub = coroutine
        else:

            def plain(*args: Any, **kwargs: Any) -> Any:
                if is_in_attempt():
                    return original(*args, **kwargs)
                if (invocation := current.get()) is not None:
                    return call(args, kwargs, False).run(invocation)
                with own(self.invocation(name)) as invocation:
                    return call(args, kwargs, False).run(invocation)

            stub = plain

        _like(stub, function, name, definition)
        setattr(stub, STUB, original)
        return stub

    def task_stub(self, function: Any, plan: TaskPlan | None = None) -> Any:
        """Return the stub of a `@task`'s function, the same for the same function. Raises TaskDefinitionError."""
        is_stub = getattr(function, "__dict__", {}).get(STUB) is not None
        key: Any = plan
        return function if is_stub or not callable(function) else self._stub_of_task(function, key)

    def _new_task_stub(self, function: Any, plan: TaskPlan | None) -> Any:
        name = name_of(function)
        stub = self.stub(function, name, {} if plan is None else plan.settings(name))
        check(stub, f"task {name!r}")
        return stub


@contextmanager
def own(invocation: Invocation) -> Iterator[Invocation]:
    """End an invocation after a block."""
    try:
        yield invocation
    finally:
        ending = invocation.end()
        if not invocation.must_not_wait:
            ending.result()


async def ended_async(invocation: Invocation) -> None:
    """End an invocation; a cancelled caller waits for it only for a limited time."""
    ending = asyncio.wrap_future(invocation.end())
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        await asyncio.wait([ending], timeout=CANCEL_S)
        raise


def _like(stub: Any, function: Any, name: str, definition: TaskDefinition[..., Any]) -> None:
    functools.update_wrapper(stub, function)
    if not hasattr(function, "__name__"):
        stub.__name__ = name
        stub.__qualname__ = type(function).__qualname__
        stub.__module__ = type(function).__module__
    stub.definition = definition


def name_of(function: Any) -> str:
    """Return the name of a function, a partial, an object that can be called, a tool or a Runnable."""
    while isinstance(function, functools.partial):
        function = function.func
    found = getattr(function, "name", None) or getattr(function, "__name__", None)
    return found if isinstance(found, str) and found else type(function).__name__


def is_coroutine_function(function: Any) -> bool:
    """Whether calling a function, or an object that can be called, returns a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    call = inspect.getattr_static(type(function), "__call__", None)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


class RunnableStub(Runnable[Any, Any]):
    """Stands in for a Runnable, such as a chat model or a sequence. Its child runs are seen through its callbacks."""

    __lattice_stub__ = True

    def __init__(self, runner: Runner, runnable: Runnable[Any, Any], name: str, settings: Mapping[str, Any]) -> None:
        self.name = runnable.get_name()
        self._runnable = runnable
        setattr(self, STUB, runnable)
        self._invoke = runner.stub(_Invoke(runnable), name, settings)
        is_async = type(runnable).ainvoke is not Runnable.ainvoke
        target: Any = _ainvoke(runnable) if is_async else _Invoke(runnable)
        self._ainvoke = runner.stub(target, name, settings, is_async=True)

    @property
    def stubs(self) -> tuple[Any, Any]:
        """The stubs of the two methods."""
        return self._invoke, self._ainvoke

    def get_input_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the input schema of the Runnable."""
        return self._runnable.get_input_schema(config)

    def get_output_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the output schema of the Runnable."""
        return self._runnable.get_output_schema(config)

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the Runnable on Lattice."""
        config = ensure_config(config)
        token = var_child_runnable_config.set(config)
        try:
            return self._invoke(input, config=config, **kwargs)
        finally:
            var_child_runnable_config.reset(token)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As `invoke`, without blocking the event loop."""
        config = ensure_config(config)
        token = var_child_runnable_config.set(config)
        try:
            return await self._ainvoke(input, config=config, **kwargs)
        finally:
            var_child_runnable_config.reset(token)


class _Invoke:
    """The method `invoke` of a Runnable."""

    def __init__(self, runnable: Runnable[Any, Any]) -> None:
        self._runnable = runnable

    def __call__(self, input: Any, **kwargs: Any) -> Any:
        return self._runnable.invoke(input, **kwargs)


def _ainvoke(runnable: Runnable[Any, Any]) -> Callable[..., Awaitable[Any]]:
    async def ainvoke(input: Any, **kwargs: Any) -> Any:
        return await runnable.ainvoke(input, **kwargs)

    return ainvoke


def check(stub: Any, what: str) -> None:
    """Pickle the code of a stub. Raises TaskDefinitionError, which names `what`, when it cannot run elsewhere."""
    try:
        stub.definition.pack()
    except TaskDefinitionError as error:
        raise TaskDefinitionError(
            f"{what} cannot run on Lattice: {error}; name it in local=[...] to run it here"
        ) from (error.__cause__)
    captures.check(getattr(stub, STUB), what)
