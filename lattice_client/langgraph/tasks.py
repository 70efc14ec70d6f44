"""Owns the `@task` functions that an entrypoint calls. Rule: the entrypoint stays here, and each task is a stub."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.runnables.config import var_child_runnable_config
from langgraph._internal._runnable import RunnableCallable

from lattice_client.langgraph.reductions import STUB
from lattice_client.langgraph.stubs import Runner

CALL = "__pregel_call"


def with_task_stubs(node: Any, runner: Runner) -> Any:
    """Return the node of an entrypoint whose tasks run on Lattice."""
    bound = node.bound
    if not isinstance(bound, RunnableCallable):
        return node
    found = copy.copy(bound)
    found.func = _calling(bound.func, runner)
    found.afunc = _calling(bound.afunc, runner)
    return node.copy({"bound": found})


def _calling(function: Any, runner: Runner) -> Any:
    """Return a function whose tasks are stubs. In the code of a node, it is the function itself."""
    if function is None:
        return None
    found: Any = _calling_tasks(function, runner)
    setattr(found, STUB, function)
    return found


def _calling_tasks(function: Any, runner: Runner) -> Any:
    if inspect.iscoroutinefunction(function):

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            with _stubbed(runner):
                return await function(*args, **kwargs)

        return coroutine

    def plain(*args: Any, **kwargs: Any) -> Any:
        with _stubbed(runner):
            return function(*args, **kwargs)

    return plain


@contextmanager
def _stubbed(runner: Runner) -> Iterator[None]:
    """Have tasks that are called in a block be stubs."""
    config: Any = var_child_runnable_config.get() or {}
    configurable = config.get("configurable") or {}
    call: Callable[..., Any] | None = configurable.get(CALL)
    if call is None:
        yield
        return

    def calling(function: Any, given: Any, **options: Any) -> Any:
        return call(runner.task_stub(function), given, **options)

    token = var_child_runnable_config.set({**config, "configurable": {**configurable, CALL: calling}})  # type: ignore
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)
