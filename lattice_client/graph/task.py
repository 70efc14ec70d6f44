"""Owns the decorator `@task`. Rule: every mistake in a definition raises when the decorator runs."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, Unpack, overload

from lattice_client.graph.definition import TaskDefinition, define
from lattice_client.graph.options import DefinitionOptions

P = ParamSpec("P")
R = TypeVar("R")


@overload
def task(function: Callable[P, R], /) -> TaskDefinition[P, R]: ...
@overload
def task(**options: Unpack[DefinitionOptions]) -> Callable[[Callable[P, R]], TaskDefinition[P, R]]: ...
def task(function: Callable[P, R] | None = None, /, **options: Any) -> Any:
    """Make a function a task; use it bare, `@task`, or with options, `@task(retries=2)`.

    Args:
        function: the function, when used bare.
        options: see `TaskSettings`, plus:
            `inputs` and `outputs`: names; with `inputs` the function takes one `params` dict and returns a dict.
            `resources`: a dict of `cpu`, `gpu`, `cpu_mem` and `gpu_mem` (MiB); each can be an option of its own.
            `modules`: modules by name, and files and folders by path relative to the script's folder, that are sent
                with the function besides the modules it imports.
            `exclude`: patterns of modules (`pack.tests`) and files (`*.csv`) that are not sent.
            `fresh_process`: run each attempt in a new process, also an attempt of a coroutine function.
            `combine`: of a generator function: makes its output of the list of the values that it yielded; without
                it the output is the list, or the value that the generator returns.
            `name`: the display name.

    Raises:
        TaskDefinitionError: an option is unknown or out of range.
    """
    if function is not None:
        return define(function)
    return lambda decorated: define(decorated, **options)
