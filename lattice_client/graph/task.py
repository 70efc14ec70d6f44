"""Owns `@task`: what a function takes, gives and needs. Rule: what can be found wrong is found at the decoration."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec, TypeVar, Unpack, overload

from lattice.v1 import resources_pb2, task_pb2

from lattice_client.code.bundle import Choice, Item, files_in
from lattice_client.code.freshness import Look, Snapshot
from lattice_client.code.function import pack
from lattice_client.convert import payloads
from lattice_client.convert.digests import digest_of
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.annotations import hints_of
from lattice_client.graph.options import SETTINGS, DefinitionOptions, TaskOptions, changed, resources_of
from lattice_client.graph.returns import returned
from lattice_client.graph.settings import TaskSettings
from lattice_client.graph.signatures import check_keywords, check_params, check_returns, named_arguments, parameters_of

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False, repr=False)
class TaskDefinition(Generic[P, R]):
    """A function that can be a task. Calling it runs the plain function, here.

    With an `entrypoint` it is one that workers have, and `function` only stands for it. `may_be_left_out` are keys that
    what it returns has not always.
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
    options: Mapping[str, Any] = field(default_factory=dict)
    _packed: tuple[Snapshot, task_pb2.Function, task_pb2.CodeBundle | None] | None = field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the plain function."""
        return self.function(*args, **kwargs)

    def with_(self, **options: Unpack[TaskOptions]) -> "TaskDefinition[P, R]":
        """Return the same task with other options; those that are not named stay as they are.

        Raises TaskDefinitionError when an option is unknown or out of range.
        """
        made: TaskDefinition[P, R] = define(self.function, **changed(self.name, self.options, options))
        return replace(
            made, entrypoint=self.entrypoint, inputs=self.inputs, required=self.required, takes_any=self.takes_any
        )

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> "BoundTask":
        """Return the task with its inputs, for `add_task` and `run_task`: they are given as in a call of the function.

        Type checkers compare them with the function's parameters; what stands for a value, such as an output of another
        task, is of every type to them. Raises TaskDefinitionError.
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

    def why_unpromised(self, name: str) -> str:
        """Return why an output, or any when `name` is empty, is not promised; empty when that says nothing."""
        if name in self.may_be_left_out or (not name and self.may_be_left_out):
            keys = repr(name) if name else ", ".join(map(repr, self.may_be_left_out))
            text = f"{keys} of the TypedDict it returns may be left out, and only what is always returned can be wired"
            return f"{text}: annotate the keys Required[...], or name them in @task(outputs=[...])"
        if self.may_return_more and not self.may_be_left_out:
            text = "what it returns is not declared: name it in @task(outputs=[...])"
            return f"{text}, or annotate what the function returns with a TypedDict"
        return "" if name else "it declares none; name what it returns in @task(outputs=[...])"

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
            text += f"; a method becomes a task when it is bound: add_task(thing.{self.name}, ...), without @task"
        raise TaskDefinitionError(text)

    @property
    def is_async(self) -> bool:
        """Whether it is a coroutine function."""
        return inspect.iscoroutinefunction(self.function)

    @property
    def _concurrency(self) -> task_pb2.Concurrency.ValueType:
        if self.has_fresh_process:
            return task_pb2.CONCURRENCY_FRESH_PROCESS
        return task_pb2.CONCURRENCY_ASYNC if self.is_async else task_pb2.CONCURRENCY_PROCESS

    @property
    def function_form(self) -> task_pb2.Function:
        """All about the function but its code; where workers have that, its name."""
        python = task_pb2.PythonFunction(
            call_style=self.call_style, return_style=self.return_style, concurrency=self._concurrency
        )
        return task_pb2.Function(entrypoint=self.entrypoint, python=python, display_name=self.name)

    def pack(self, look: Look | None = None) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
        """Return the function as it travels now, and the bundle it needs; `look` as in `freshness`.

        It is pickled unless it is as it was the last time. Raises TaskDefinitionError.
        """
        if self._packed is None or not self._packed[0].is_current(look):
            # Before the pickling, so that a change during it is seen.
            snapshot = Snapshot(self.function)
            function, bundle = self._pack()
            self._packed = snapshot.with_files(files_in(bundle)), function, bundle
        return self.packed

    @property
    def packed(self) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
        """The function as it was pickled last, and the bundle it needs."""
        assert self._packed is not None, "what sends a function packs it before"
        return self._packed[1:]

    def _pack(self) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
        function, bundle = self.function_form, None
        if not self.entrypoint:
            function.python.pickle, bundle = pack(self.function, self.name, self.choice)
            function.bundle_digest = bundle.digest if bundle else ""
            if (runtime := payloads.runtime_of(function.python.pickle)) is not None:
                function.runtime.CopyFrom(runtime)
        function.digest = digest_of(function)
        return function, bundle

    @property
    def returns_value(self) -> bool:
        """Whether what the function returns is its one output, and no dict of them."""
        return self.return_style == task_pb2.RETURN_STYLE_VALUE

    @functools.cached_property
    def hints(self) -> Mapping[str, Any]:
        """What is certain of the types of its inputs, and under `return` of what it returns, by annotations.

        Nothing for a function that takes one dict, or is called with the inputs of a batch.
        """
        is_plain = self.call_style == task_pb2.CALL_STYLE_KEYWORDS and not self.settings.HasField("batch")
        return hints_of(self.function) if is_plain else {}

    @property
    def __lattice__(self) -> dict[str, Any]:
        """What a worker needs to know to add this task to a run; see `lattice_worker.context.spawn`."""
        return {**self._form, "call": self.function}

    @functools.cached_property
    def form(self) -> task_pb2.TaskSpec:
        """All about a task of this definition but its id, its wiring and its code."""
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
        }

    def __reduce__(self) -> Any:
        # A task named inside another task's code is, over there, its plain function, with a note of what it needs. Only
        # the standard library is called: a worker need not import this package to load it.
        return (getattr, (SimpleNamespace(task=self.function), "task"), {"__lattice__": self._form})


@dataclass(frozen=True, slots=True)
class BoundTask:
    """A task with its inputs; see `TaskDefinition.bind`."""

    definition: TaskDefinition[..., Any]
    inputs: Mapping[str, Any]


def check_text(what: str, value: object) -> None:
    """Raise TaskDefinitionError unless a value is a text that the contract can hold."""
    if not isinstance(value, str):
        raise TaskDefinitionError(f"{what} must be a text, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TaskDefinitionError(f"{what} must be valid Unicode, not {value!r}") from None


def _named(names: Sequence[str]) -> str:
    return f"input{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"


@overload
def task(function: Callable[P, R], /) -> TaskDefinition[P, R]: ...
@overload
def task(**options: Unpack[DefinitionOptions]) -> Callable[[Callable[P, R]], TaskDefinition[P, R]]: ...
def task(function: Callable[P, R] | None = None, /, **options: Any) -> Any:
    """Make a function a task; use it bare or with options.

    Args:
        function: the function, when used bare.
        options: see `TaskSettings`, plus:
            `inputs` and `outputs`: names; with `inputs` the function takes one `params` dict and returns a dict.
            `resources`, or the same names directly: `cpu`, `gpu`, `cpu_mem` and `gpu_mem` in MiB.
            `modules`: what is sent with the function besides the modules that it is seen to import: modules by name,
                files and folders by path, relative to the script's folder.
            `exclude`: patterns of modules (`pack.tests`) and files (`*.csv`) that are not sent.
            `fresh_process`: each attempt has a new process, which is used once; a coroutine function too.
            `name`: for people.

    Raises:
        TaskDefinitionError: an option is unknown or out of range.
    """
    if function is not None:
        return define(function)
    return lambda decorated: define(decorated, **options)


def define(
    function: Callable[P, R],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    resources: Mapping[str, float] | None = None,
    modules: Sequence[Item] = (),
    exclude: Sequence[str] = (),
    fresh_process: bool = False,
    name: str | None = None,
    **more: Any,
) -> TaskDefinition[P, R]:
    """Return the definition `task` makes."""
    if not callable(function):
        raise TaskDefinitionError(f"a task must be a function, not {type(function).__name__}")
    label: str = name or _name_of(function)
    check_text("the name of a task", label)
    check_returns(label, function, is_batched=more.get("batch_size") is not None)
    for setting, patterns in (("modules", modules), ("exclude", exclude)):
        if isinstance(patterns, str) or not isinstance(patterns, Sequence):
            raise TaskDefinitionError(f"task {label!r}: {setting} must be a list, not {patterns!r}")
    if not isinstance(fresh_process, bool):
        raise TaskDefinitionError(f"task {label!r}: fresh_process must be True or False, not {fresh_process!r}")
    given = {key: more.pop(key) for key in SETTINGS if key in more}
    settings = TaskSettings(**given).to_proto(label)
    resources = {**(resources or {}), **more}
    parameters = parameters_of(function, label)
    is_params = inputs is not None or list(parameters) == ["params"]
    if is_params:
        names = names_of(label, "inputs", inputs or ())
        required, takes_any = frozenset(names), inputs is None
        check_params(label, parameters, names)
    else:
        kinds = {p.name: p for p in parameters.values() if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
        names = tuple(kinds)
        required = frozenset(n for n, p in kinds.items() if p.default is inspect.Parameter.empty)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        check_keywords(label, parameters)
    named = None if outputs is None else names_of(label, "outputs", outputs)
    found = returned(function, named, is_params)
    return TaskDefinition(
        function=function,
        name=label,
        inputs=names,
        required=required,
        takes_any=takes_any,
        outputs=found.names,
        call_style=task_pb2.CALL_STYLE_PARAMS if is_params else task_pb2.CALL_STYLE_KEYWORDS,
        return_style=found.style,
        may_return_more=found.may_be_more,
        may_be_left_out=found.optional,
        resources=resources_of(label, resources, inspect.iscoroutinefunction(function)),
        settings=settings,
        choice=Choice(tuple(modules), tuple(exclude)),
        has_fresh_process=fresh_process,
        options=given
        | {
            "inputs": inputs,
            "outputs": outputs,
            "resources": resources,
            "modules": modules,
            "exclude": exclude,
            "fresh_process": fresh_process,
            "name": name,
        },
    )


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def names_of(label: str, what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of inputs or outputs. Raises TaskDefinitionError when they are no list of different texts."""
    found = [] if isinstance(names, str) else list(names)
    if isinstance(names, str) or len(set(found)) != len(found) or not all(isinstance(n, str) and n for n in found):
        raise TaskDefinitionError(f"task {label!r}: {what} must be a list of different names, not {names!r}")
    for name in found:
        check_text(f"task {label!r}: a name among its {what}", name)
    return tuple(found)
