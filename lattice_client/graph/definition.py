"""Owns the definition of a task: its function, inputs, outputs and settings. Rule: a definition is valid."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar, Unpack

from lattice.v1 import resources_pb2, task_pb2

from lattice_client.code.bundle import Choice, Item
from lattice_client.code.freshness import StateOf
from lattice_client.code.function import FunctionCode
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.annotations import hints_of
from lattice_client.graph.names import check_text, function_name, names_of, texts_of
from lattice_client.graph.options import SETTINGS, TaskOptions, changed, resources_of
from lattice_client.graph.returns import returned
from lattice_client.graph.settings import TaskSettings
from lattice_client.graph.signatures import accepted_inputs, check_combine, check_returns, is_async, named_arguments

P = ParamSpec("P")
R = TypeVar("R")
# Methods by which other systems run a function elsewhere, map it over a list, or change its options.
RUNNING = frozenset({"remote", "submit", "delay", "apply_async", "run", "spawn", "call"})
MAPPING, CHANGING = frozenset({"map", "starmap"}), frozenset({"options", "with_options"})


@dataclass(eq=False, repr=False)
class TaskDefinition(Generic[P, R]):
    """A function that can be a task. Calling it runs the plain function in this process.

    Attributes:
        entrypoint: the name of a function that workers have; `function` then only raises.
        may_return_more: whether the function may return outputs that it does not declare.
        may_be_left_out: keys of the returned TypedDict that are not always present.
        combine: makes the output of the list of all chunks.
        given_options: the arguments of `task`, for `with_`.
    """

    function: Callable[P, R]
    name: str
    inputs: tuple[str, ...]
    required: frozenset[str]
    takes_any: bool
    outputs: tuple[str, ...]
    call_style: task_pb2.CallStyle.ValueType
    return_style: task_pb2.ReturnStyle.ValueType
    resources: resources_pb2.Resources
    settings: task_pb2.TaskSpec = field(default_factory=task_pb2.TaskSpec)
    entrypoint: str = ""
    may_return_more: bool = False
    may_be_left_out: tuple[str, ...] = ()
    choice: Choice = field(default_factory=Choice)
    has_fresh_process: bool = False
    combine: Callable[[list[Any]], Any] | None = None
    given_options: Mapping[str, Any] = field(default_factory=dict)
    _code: FunctionCode = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._code = FunctionCode(self._called, self.function_form, self.choice)
        functools.update_wrapper(self, self.function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the plain function."""
        return self.function(*args, **kwargs)

    if not TYPE_CHECKING:  # To type checkers a task would have every attribute.

        def __getattr__(self, name: str) -> NoReturn:
            text = f"a task has no attribute {name!r}"
            if advice := _advice(name, vars(self).get("name", "task")):
                text += f": {advice}"
            raise AttributeError(text, name=name, obj=self)

    def with_(self, **options: Unpack[TaskOptions]) -> "TaskDefinition[P, R]":
        """Return the same task with some options changed.

        Raises TaskDefinitionError when an option is unknown or out of range.
        """
        made: TaskDefinition[P, R] = define(self.function, **changed(self.name, self.given_options, options))
        return replace(
            made, entrypoint=self.entrypoint, inputs=self.inputs, required=self.required, takes_any=self.takes_any
        )

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> "BoundTask":
        """Return the task with its inputs, given as in a call of the function, for `add_task` and `run_task`.

        Type checkers compare them with the function's parameters; they accept an output of another task where any type
        is expected. Raises TaskDefinitionError.
        """
        given = named_arguments(self.function, self.name, args, kwargs)
        if self.call_style == task_pb2.CALL_STYLE_PARAMS and not self.entrypoint:
            given = next(iter(given.values()), {})
            if not isinstance(given, Mapping):
                text = f"receives all its inputs as one dict, not as {type(given).__name__}"
                raise TaskDefinitionError(f"task {self.name!r} {text}")
        self.check_inputs(given)
        return BoundTask(self, given)

    def __repr__(self) -> str:
        inputs = ", ".join([*self.inputs, "**"] if self.takes_any else self.inputs)
        outputs = ", ".join([*self.outputs, "..."] if self.may_return_more else self.outputs)
        return f"<task definition {self.name}({inputs}) -> {outputs or 'nothing'}>"

    def why_missing(self, name: str) -> str:
        """Return why an output of a name, or any for an empty name, is not declared; empty without a reason."""
        if name in self.may_be_left_out or (not name and self.may_be_left_out):
            keys = repr(name) if name else ", ".join(map(repr, self.may_be_left_out))
            text = (
                f"{keys} of the returned TypedDict may be left out, and only a key that is always present can be wired"
            )
            return f"{text}: annotate the keys Required[...], or name them in @task(outputs=[...])"
        if self.may_return_more and not self.may_be_left_out:
            text = "its outputs are not declared: name them in @task(outputs=[...])"
            return f"{text}, or annotate the return value with a TypedDict"
        return "" if name else "it declares none; name its outputs in @task(outputs=[...])"

    def check_inputs(self, given: Mapping[Any, Any]) -> None:
        """Raise TaskDefinitionError unless the function can be called with inputs of these names."""
        for name in given:
            check_text(f"task {self.name!r}: the name of an input", name)
        if self.takes_any and self.call_style == task_pb2.CALL_STYLE_PARAMS and list(given) == ["params"]:
            text = 'receives all its inputs as one dict, `params`: give them by name, {"x": ...}'
            raise TaskDefinitionError(f"task {self.name!r} {text}, or call its parameter something else")
        missing = [name for name in self.inputs if name in self.required and name not in given]
        unknown = [name for name in given if name not in self.inputs] if not self.takes_any else []
        if not missing and not unknown:
            return
        faults = [f"has no {_named(unknown)}"] * bool(unknown) + [f"needs {_named(missing)}"] * bool(missing)
        text = f"task {self.name!r} {' and '.join(faults)}; its inputs: {', '.join(self.inputs) or 'none'}"
        if missing and missing[0] in {"self", "cls"} and missing[0] == self.inputs[0]:
            text += f"; make a bound method the task: add_task(instance.{self.name}, ...), without @task"
        raise TaskDefinitionError(text)

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine function, or an asynchronous generator function."""
        return is_async(self.function)

    @property
    def _concurrency(self) -> task_pb2.Concurrency.ValueType:
        if self.has_fresh_process:
            return task_pb2.CONCURRENCY_FRESH_PROCESS
        return task_pb2.CONCURRENCY_ASYNC if self.is_async else task_pb2.CONCURRENCY_PROCESS

    @property
    def function_form(self) -> task_pb2.Function:
        """The message of the function without its code."""
        python = task_pb2.PythonFunction(
            call_style=self.call_style, return_style=self.return_style, concurrency=self._concurrency
        )
        return task_pb2.Function(entrypoint=self.entrypoint, python=python, display_name=self.name)

    def pack(self, state_of: StateOf | None = None) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
        """Return the function with its present code, and the bundle it needs; see `FunctionCode.pack`."""
        return self._code.pack(state_of)

    @property
    def packed(self) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
        """The function and its bundle as `pack` returned them last."""
        return self._code.packed

    @property
    def returns_value(self) -> bool:
        """Whether the return value is the single output, and not a dict of outputs."""
        return self.return_style == task_pb2.RETURN_STYLE_VALUE

    @functools.cached_property
    def hints(self) -> Mapping[str, Any]:
        """The annotations of the inputs by name, and of the return value under `return`.

        Empty for a function that takes one dict, or is called with the inputs of a batch.
        """
        is_plain = self.call_style == task_pb2.CALL_STYLE_KEYWORDS and not self.settings.HasField("batch")
        return hints_of(self.function) if is_plain else {}

    @property
    def __lattice__(self) -> dict[str, Any]:
        """The definition in the form that `lattice_worker.context.spawn` reads."""
        return {**self._form, "call": self._called}

    @functools.cached_property
    def form(self) -> task_pb2.TaskSpec:
        """The message of a task of this definition without its id, its wiring and its code."""
        spec = task_pb2.TaskSpec(outputs=self.outputs, resources=self.resources)
        spec.MergeFrom(self.settings)
        return spec

    @property
    def _form(self) -> dict[str, Any]:
        return {
            "spec": self.form.SerializeToString(),
            "function": self.function_form.SerializeToString(),
            "outputs": self.outputs,
            "has_code": not self.entrypoint,
            "entrypoint": self.entrypoint,
            "inputs": self.inputs,
            "required": sorted(self.required),
            "takes_any": self.takes_any,
            "combine": self.combine,
        }

    @property
    def _called(self) -> Callable[..., Any]:
        """The function as workers call it: with what combines its chunks, if anything does."""
        if self.combine is None:
            return self.function
        called = functools.partial(self.function)
        called.__lattice_combine__ = self.combine  # type: ignore[attr-defined]
        return called

    def __reduce__(self) -> Any:
        # A worker that loads a task named in another task's code gets the plain function with `__lattice__`. Loading it
        # calls the standard library only, so that the worker need not import this package.
        return (getattr, (SimpleNamespace(task=self.function), "task"), {"__lattice__": self._form})


@dataclass(frozen=True, slots=True)
class BoundTask:
    """A task with its inputs; see `TaskDefinition.bind`."""

    definition: TaskDefinition[..., Any]
    inputs: Mapping[str, Any]


def define(
    function: Callable[P, R],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    resources: Mapping[str, float] | None = None,
    modules: Sequence[Item] = (),
    exclude: Sequence[str] = (),
    fresh_process: bool = False,
    combine: Callable[[list[Any]], Any] | None = None,
    name: str | None = None,
    **more: Any,
) -> TaskDefinition[P, R]:
    """Return the definition that `task` makes."""
    if not callable(function):
        raise TaskDefinitionError(f"a task must be a function, not {type(function).__name__}")
    label: str = name or function_name(function)
    check_text("the name of a task", label)
    check_returns(label, function, is_batched=more.get("batch_size") is not None)
    _check_code_options(label, modules, exclude, fresh_process)
    check_combine(label, combine, is_batched=more.get("batch_size") is not None)
    options = {"inputs": inputs, "outputs": outputs, "modules": modules, "exclude": exclude, "name": name}
    given = {key: more.pop(key) for key in SETTINGS if key in more}
    settings = TaskSettings(**given).to_proto(label)
    if not isinstance(resources or {}, Mapping) or not all(isinstance(key, str) for key in resources or {}):
        raise TaskDefinitionError(f"task {label!r}: resources must be a dict of numbers by name, not {resources!r}")
    resources = {**(resources or {}), **more}
    accepted = accepted_inputs(function, label, inputs)
    found = returned(function, None if outputs is None else names_of(label, "outputs", outputs), accepted.is_params)
    return TaskDefinition(
        function=function,
        name=label,
        inputs=accepted.names,
        required=accepted.required,
        takes_any=accepted.takes_any,
        outputs=found.names,
        call_style=task_pb2.CALL_STYLE_PARAMS if accepted.is_params else task_pb2.CALL_STYLE_KEYWORDS,
        return_style=found.style,
        may_return_more=found.may_be_more,
        may_be_left_out=found.optional,
        resources=resources_of(label, resources, is_async(function)),
        settings=settings,
        choice=Choice(tuple(modules), tuple(exclude)),
        has_fresh_process=fresh_process,
        combine=combine,
        given_options={**given, **options, "resources": resources, "fresh_process": fresh_process, "combine": combine},
    )


def _advice(name: str, task: str) -> str:
    """Return the counterpart of a method of another system, as advice."""
    if name in RUNNING:
        way = (
            f"client.run_task({task}, {{...}}) runs it, and workflow.add_task({task}, {{...}}) makes it part of a graph"
        )
        return f"{way}; within a task, context.call({task}, {{...}})"
    if name in MAPPING:
        return f"workflow.map({task}, other.output) runs it for each item of a list that another task returns"
    return f"{task}.with_(cpu=2, retries=3) is the same task with other options" if name in CHANGING else ""


def _check_code_options(label: str, modules: Any, exclude: object, fresh_process: object) -> None:
    for setting, patterns in (("modules", modules), ("exclude", exclude)):
        if isinstance(patterns, str | bytes) or not isinstance(patterns, Sequence):
            raise TaskDefinitionError(f"task {label!r}: {setting} must be a list, not {patterns!r}")
    texts_of(f"task {label!r}: exclude", "a list of patterns", exclude)
    for item in modules:
        if not isinstance(item, str | os.PathLike | ModuleType):
            text = "must have modules, or names and paths as texts"
            raise TaskDefinitionError(f"task {label!r}: modules {text}, not {item!r}")
    if not isinstance(fresh_process, bool):
        raise TaskDefinitionError(f"task {label!r}: fresh_process must be True or False, not {fresh_process!r}")


def _named(names: Sequence[str]) -> str:
    return f"input{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
