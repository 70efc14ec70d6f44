"""Owns the `@task` functions that an entrypoint calls. Rule: the entrypoint stays here, and each task is a stub."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from langchain_core.runnables.config import var_child_runnable_config
from langgraph._internal._runnable import RunnableCallable
from langgraph.func import _TaskFunction

from lattice_client.langgraph.reductions import STUB
from lattice_client.langgraph.stubs import Runner, TaskPlan, name_of

CALL = "__pregel_call"


def with_task_stubs(node: Any, runner: Runner, plan: TaskPlan) -> Any:
    """Return the node of an entrypoint whose tasks run on Lattice."""
    bound = node.bound
    if not isinstance(bound, RunnableCallable):
        return node
    plan.used.update(_task_names(bound.func or bound.afunc))
    found = copy.copy(bound)
    found.func = _calling(bound.func, runner, plan)
    found.afunc = _calling(bound.afunc, runner, plan)
    return node.copy({"bound": found})


def _task_names(function: Any) -> set[str]:
    """Return the names of the `@task` functions to which the code of an entrypoint refers, also through modules."""
    function = inspect.unwrap(getattr(function, "func", function))
    if not isinstance(function, FunctionType):
        return set()
    names = set(names_of(function.__code__))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    held = [cell.cell_contents for name, cell in cells.items() if name in names and _is_assigned(cell)]
    held += [function.__globals__[name] for name in names if name in function.__globals__]
    held += [vars(module).get(name) for module in held if isinstance(module, ModuleType) for name in names]
    return {name_of(found.func) for found in held if isinstance(found, _TaskFunction)}


def names_of(code: CodeType) -> Iterator[str]:
    """Yield the names that a function's code and its inner functions use."""
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)


def _is_assigned(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _calling(function: Any, runner: Runner, plan: TaskPlan) -> Any:
    """Return a function whose tasks are stubs. In the code of a node, it is the function itself."""
    if function is None:
        return None
    found: Any = _calling_tasks(function, runner, plan)
    setattr(found, STUB, function)
    return found


def _calling_tasks(function: Any, runner: Runner, plan: TaskPlan) -> Any:
    if inspect.iscoroutinefunction(function):

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            with _stubbed(runner, plan):
                return await function(*args, **kwargs)

        return coroutine

    def plain(*args: Any, **kwargs: Any) -> Any:
        with _stubbed(runner, plan):
            return function(*args, **kwargs)

    return plain


@contextmanager
def _stubbed(runner: Runner, plan: TaskPlan) -> Iterator[None]:
    """Have tasks that are called in a block be stubs."""
    config: Any = var_child_runnable_config.get() or {}
    configurable = config.get("configurable") or {}
    call: Callable[..., Any] | None = configurable.get(CALL)
    if call is None:
        yield
        return

    def calling(function: Any, given: Any, **options: Any) -> Any:
        is_local = name_of(function) in plan.local
        return call(function if is_local else runner.task_stub(function, plan), given, **options)

    token = var_child_runnable_config.set({**config, "configurable": {**configurable, CALL: calling}})  # type: ignore
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)
