"""Owns the options of `@task`. Rule: each is listed here once, with its type.

`TaskSettings` and `task` describe their meaning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypedDict

from lattice.v1 import resources_pb2

from lattice_client.code.bundle import Item
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.environment import Env
from lattice_client.graph.settings import TaskSettings

MIB = 1024 * 1024
# The largest amount of a resource in its unit; in bytes it fits the contract.
MAX_AMOUNT = 2**40
RESOURCES = ("cpu", "gpu", "cpu_mem", "gpu_mem")
SETTINGS = tuple(found.name for found in fields(TaskSettings))


class TaskOptions(TypedDict, total=False):
    """The options of `TaskDefinition.with_`: all but the names of inputs and outputs."""

    resources: Mapping[str, float] | None
    cpu: float | None
    gpu: float | None
    cpu_mem: float | None
    gpu_mem: float | None
    batch_size: int | None
    batch_timeout: float | None
    batch_within: str
    retries: int
    retry_on: type[BaseException] | str | Sequence[type[BaseException] | str]
    retry_backoff: float | None
    max_worker_losses: int | None
    timeout: float | None
    total_timeout: float | None
    max_parallel: int | None
    concurrency_key: str
    priority: int
    node_selector: Mapping[str, str] | None
    isolation: str
    network: Sequence[str]
    env: Env | None
    needs_llm: str | Sequence[str]
    modules: Sequence[Item]
    exclude: Sequence[str]
    fresh_process: bool
    combine: Callable[[list[Any]], Any] | None
    name: str | None


class DefinitionOptions(TaskOptions, total=False):
    """All options of `task`."""

    inputs: Sequence[str] | None
    outputs: Sequence[str] | None


def resources_of(label: str, options: Mapping[str, Any], is_async: bool) -> resources_pb2.Resources:
    """Return the resources of a task. Raises TaskDefinitionError for a wrong amount and for an unknown option."""
    found = resources_pb2.Resources(cpu=0.0 if is_async else 1.0)
    for name, value in options.items():
        if name not in RESOURCES:
            raise TaskDefinitionError(f"task {label!r}: {_unknown(name, DefinitionOptions.__annotations__)}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_AMOUNT:
            raise TaskDefinitionError(f"task {label!r}: {name} must be a number from 0, not {value!r}")
        match name:
            case "cpu":
                found.cpu = value
            case "gpu":
                found.gpu = value
            case "cpu_mem":
                found.memory_bytes = int(value * MIB)
            case _:
                found.gpu_memory_bytes = int(value * MIB)
    return found


def changed(label: str, options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with changes; a resource that is not named stays. Raises TaskDefinitionError."""
    for name in changes:
        if name not in TaskOptions.__annotations__:
            raise TaskDefinitionError(f"task {label!r}: {_unknown(name, TaskOptions.__annotations__)}")
    resources = {**(options.get("resources") or {}), **(changes.get("resources") or {})}
    direct = {name: changes[name] for name in RESOURCES if name in changes}
    rest = {name: value for name, value in changes.items() if name not in direct}
    return {**options, **rest, "resources": {**resources, **direct}}


def _unknown(name: str, options: Mapping[str, Any]) -> str:
    """Return that there is no such option, the most similar name if there is one, and all names."""
    similar = get_close_matches(name, options, n=1)
    meant = f"; did you mean {similar[0]!r}?" if similar else ";"
    others = ", ".join(option for option in options if option not in RESOURCES)
    return f"there is no option {name!r}{meant} resources: {', '.join(RESOURCES)}; other options: {others}"
