"""`@task` and wiring: the definition of a function, and the mistakes that raise before anything is sent."""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict, TypeVar

import numpy as np
import pytest
import typing_extensions
from lattice.v1 import errors_pb2, resources_pb2, task_pb2

from lattice_client import LatticeClient, LatticeWorkflow, TaskDefinitionError, TaskOutput, entrypoint, secret, task
from lattice_client.graph.options import DefinitionOptions, TaskOptions

T = TypeVar("T")


class Split(TypedDict):
    head: str
    tail: list[str]


def plain(a: int, b: int = 2, *, c: int, **more: int) -> int:
    return a + b + c


def typed(text: str) -> Split:
    return {"head": text[:1], "tail": list(text[1:])}


def seed(params: dict[str, Any]) -> dict[str, Any]:
    return params


async def coroutine(a: int) -> int:
    return a


def untyped(a):  # type: ignore[no-untyped-def]
    return a


def test_inputs_and_outputs_are_read_from_the_signature() -> None:
    found = task(plain)
    assert (found.inputs, found.required, found.takes_any) == (("a", "b", "c"), {"a", "c"}, True)
    assert (found.outputs, found.is_async, found.resources.cpu) == (("result",), False, 1.0)
    assert found.call_style == task_pb2.CALL_STYLE_KEYWORDS
    assert task(typed).outputs == ("head", "tail")
    assert task(coroutine).is_async
    assert task(coroutine).resources.cpu == 0.0


def test_a_function_of_params_is_called_as_the_seed_does() -> None:
    bare = task(seed)
    assert (bare.call_style, bare.takes_any) == (task_pb2.CALL_STYLE_PARAMS, True)
    named = task(inputs=["x"], outputs=["y"])(seed)
    assert (named.inputs, named.outputs, named.call_style) == (("x",), ("y",), task_pb2.CALL_STYLE_PARAMS)


def test_resources_are_named_either_way_and_memory_is_in_mebibytes() -> None:
    wanted = resources_pb2.Resources(cpu=2, gpu=1, memory_bytes=512 << 20, gpu_memory_bytes=8192 << 20)
    names = {"cpu": 2, "gpu": 1, "cpu_mem": 512, "gpu_mem": 8192}
    assert task(resources=names)(plain).resources == wanted
    assert task(**names)(plain).resources == wanted


def test_a_task_is_still_its_function() -> None:
    found = task(plain)
    assert found(1, c=3) == 6
    assert (found.__name__, found.__doc__, found.__module__) == ("plain", None, __name__)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cpus": 2}, "no option 'cpus'; did you mean 'cpu'[?] resources: cpu, gpu, "),
        ({"retrys": 2}, "no option 'retrys'; did you mean 'retries'[?] .*; other options: .*modules, "),
        ({"resources": {"ram": 2}}, "no option 'ram'; resources: cpu, "),
        ({"cpu": -1}, "cpu must be a number from 0"),
        ({"gpu": "one"}, "gpu must be a number from 0"),
        ({"cpu": True}, "cpu must be a number from 0"),
        ({"cpu_mem": float("inf")}, "cpu_mem must be a number from 0"),
        ({"isolation": "jail"}, "isolation must be one of none, subprocess, seccomp, docker"),
        ({"retries": -1}, "retries must be a whole number from 0, not -1"),
        ({"retries": True}, "retries must be a whole number from 0, not True"),
        ({"retry_on": ValueError}, "retry_on must be used together with retries"),
        ({"retry_backoff": 1.0}, "retry_backoff must be used together with retries"),
        ({"max_worker_losses": 0}, "max_worker_losses must be a whole number from 1"),
        ({"max_worker_losses": 10_001}, "max_worker_losses must be a whole number from 1 to 10000"),
        ({"retries": 1, "retry_on": "often"}, "retry_on must be one of error, crash, out_of_memory, timeout, a class"),
        ({"retries": 1, "retry_on": ["error", "ValueError"]}, "a class of exceptions, .* not 'ValueError'"),
        ({"timeout": 0}, "timeout must be seconds above 0"),
        ({"total_timeout": -1}, "total_timeout must be seconds from 0"),
        ({"priority": "high"}, "priority must be a whole number"),
        ({"max_parallel": 2**40}, "max_parallel must be a whole number from 1"),
        ({"concurrency_key": 3}, "concurrency_key must be a text, not 3"),
        ({"node_selector": {"zone": 1}}, "node_selector must be a dict of texts"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, not 0"),
        ({"batch_timeout": 1.0}, "batch_timeout must be used together with batch_size"),
        ({"batch_size": 2, "batch_within": "room"}, "batch_within must be one of server, run"),
        ({"retries": 10_000}, "retries must be a whole number from 0 to 9999, not 10000"),
        ({"batch_size": 100_001}, "batch_size must be a whole number from 1 to 100000"),
        ({"timeout": 31 * 24 * 3600}, "timeout must be seconds from 0 to 2592000"),
        ({"timeout": float("nan")}, "timeout must be seconds from 0"),
        ({"retries": 1, "retry_backoff": -0.1}, "retry_backoff must be seconds from 0"),
        ({"retries": 1, "retry_backoff": 1e9}, "retry_backoff must be seconds from 0 to 2592000"),
        ({"outputs": "result"}, "outputs must be a list of different names, not 'result'"),
        ({"outputs": ["a", "a"]}, "outputs must be a list of different names"),
        ({"outputs": ["a", 1]}, "outputs must be a list of different names"),
        ({"inputs": "x"}, "inputs must be a list of different names, not 'x'"),
        ({"inputs": ["a", "b", "c"]}, r"with inputs=\[\.\.\.\] the function is called with one dict"),
        ({"name": 3}, "the name of a task must be a text, not 3"),
    ],
)
def test_task_raises_when_a_setting_is_wrong(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        task(**settings)(plain)


WRONG = [True, 0, -1, 1.5, math.nan, 10**400, "x", "", b"x", ["a"], [1], [[]], [None], {"a": 1}, {1: "a"}, {"a": None}]
WRONG += [object(), lambda: 1, int, ValueError, ValueError("x"), range(3), iter([1]), 1j, "\ud83d", ["\ud83d"]]
WRONG += [{"\ud83d": "a"}, {"a": "\ud83d"}]


@pytest.mark.parametrize("option", sorted({*DefinitionOptions.__annotations__, *TaskOptions.__annotations__}))
def test_option_of_any_type_is_accepted_or_refused_with_its_name(option: str) -> None:
    for value in WRONG:
        for others in ({}, {"retries": 2}, {"batch_size": 3}, {"isolation": "seccomp"}):
            if option in others:
                continue
            assert option in refusal({option: value, **others}), (value, others)


def test_no_error_shows_the_value_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "hidden\udcff")
    with LatticeClient("127.0.0.1:1") as client:
        for given in ("hidden\ud83d", secret("KEY")):
            with pytest.raises(TaskDefinitionError, match=r"KEY.* is not valid") as caught:
                client.run_task(task(env={"KEY": given})(lambda: 1))
            assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("name", [3, None, "\ud83d"])
def test_name_of_a_secret_is_a_text(name: Any) -> None:
    with pytest.raises(TaskDefinitionError, match="the name of a secret must be"):
        secret(name)


def refusal(options: dict[str, Any]) -> str:
    """Return the error that a task with these options raises; their names when it raises none."""
    try:
        task(**options)(plain).pack()
    except TaskDefinitionError as error:
        return str(error)
    return str([*options])


class Flaky(Exception):
    pass


@pytest.mark.parametrize(
    ("causes", "kinds", "types"),
    [
        ((), [], []),
        (ValueError, ["USER_ERROR"], ["ValueError"]),
        ([Flaky, "crash"], ["CRASHED", "USER_ERROR"], [f"{__name__}.Flaky"]),
        (["timeout"], ["TIMEOUT"], []),
        (["error", ValueError], ["USER_ERROR"], []),
    ],
)
def test_retry_on_names_exception_classes_as_workers_do(causes: Any, kinds: list[str], types: list[str]) -> None:
    policy = task(retries=2, retry_on=causes)(plain).settings.retry
    assert policy.max_attempts == 3
    assert policy.retry_on == [errors_pb2.FailureKind.Value(f"FAILURE_KIND_{kind}") for kind in kinds]
    assert policy.retry_on_types == types


def test_losses_are_limited_apart_from_retries() -> None:
    policy = task(max_worker_losses=10)(plain).settings.retry
    assert (policy.max_worker_losses, policy.HasField("max_attempts")) == (10, False)


def test_a_backoff_of_zero_is_sent_as_zero() -> None:
    policy = task(retries=2, retry_backoff=0)(plain).settings.retry
    assert policy.HasField("initial_backoff")
    assert policy.initial_backoff.ToNanoseconds() == 0
    assert not task(retries=2)(plain).settings.retry.HasField("initial_backoff")


class Partly(TypedDict, total=False):
    always: Required[int]
    maybe: int


class Marked(TypedDict):
    always: int
    maybe: NotRequired[int]


class Inherited(Partly):
    also: int


class Ours(typing_extensions.TypedDict, total=False):
    always: typing_extensions.Required[int]
    maybe: int


def returning(annotation: Any) -> Callable[..., Any]:
    def made(n: Any = None) -> Any:
        return n

    made.__annotations__["return"] = annotation
    return made


@pytest.mark.parametrize(
    ("annotation", "names"),
    [
        (Partly, ("always",)),
        (Marked, ("always",)),
        (Inherited, ("always", "also")),
        (Ours, ("always",)),
        (Split, ("head", "tail")),
        ("Split", ("head", "tail")),
        ("Marked", ("always",)),
        ("a list of numbers", ("result",)),
        ("Unknown[", ("result",)),
        ("1 / 0", ("result",)),
        (dict[str, int], ("result",)),
        (None, ("result",)),
    ],
)
def test_function_declares_the_outputs_that_it_always_returns(annotation: Any, names: tuple[str, ...]) -> None:
    assert task(returning(annotation)).outputs == names


def test_keys_marked_in_annotations_that_are_texts_are_read() -> None:
    namespace: dict[str, Any] = {"__name__": "made"}
    source = """from __future__ import annotations
from typing import NotRequired, TypedDict
class Found(TypedDict):
    always: int
    maybe: NotRequired[int]
def find(text: nowhere) -> Found: ...
"""
    exec(source, namespace)
    assert task(namespace["find"]).outputs == ("always",)


@pytest.mark.parametrize(
    ("annotation", "names", "style"),
    [
        (int, ("result",), task_pb2.RETURN_STYLE_VALUE),
        (list[int], ("result",), task_pb2.RETURN_STYLE_VALUE),
        (Split, ("head", "tail"), task_pb2.RETURN_STYLE_MAPPING),
        (dict[str, int], (), task_pb2.RETURN_STYLE_UNSPECIFIED),
        (Any, (), task_pb2.RETURN_STYLE_UNSPECIFIED),
        (dict[str, int] | None, (), task_pb2.RETURN_STYLE_UNSPECIFIED),
    ],
)
def test_a_function_of_params_returns_a_value_or_a_dict_of_outputs(annotation: Any, names: Any, style: Any) -> None:
    def made(params: Any) -> Any:
        return params

    made.__annotations__["return"] = annotation
    found = task(made)
    assert (found.outputs, found.return_style) == (names, style)


def positional(x: int, /, y: int = 0) -> int:
    return x + y


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (max, "task 'max': it has no signature"),
        (math.sqrt, "task 'sqrt': its parameter 'x' is positional-only, and inputs are given by keyword"),
        (positional, "task 'positional': its parameter 'x' is positional-only"),
        (len, "task 'len': its parameter 'obj' is positional-only"),
    ],
)
def test_task_raises_with_advice_when_its_function_takes_no_keywords(function: Any, text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=f"{text}.*; call it in a function of your own"):
        task(function)


def test_input_named_as_its_parameter_is_not_params() -> None:
    with pytest.raises(TaskDefinitionError, match="leave inputs= out for a function that takes each by its name"):
        task(inputs=["x"])(lambda x: x)
    assert task(inputs=["x"])(lambda given: given).inputs == ("x",)
    assert task(inputs=["x"])(lambda given, extra=1: given).inputs == ("x",)


def test_only_functions_are_tasks() -> None:
    with pytest.raises(TaskDefinitionError, match="must be a function, not int"):
        task(3)  # type: ignore[call-overload]


@pytest.fixture
def workflow(client: LatticeClient) -> LatticeWorkflow:
    """An empty workflow."""
    return client.create_workflow()


@pytest.mark.parametrize(
    ("function", "inputs", "text"),
    [
        (plain, {"a": 1}, "needs input 'c'; its inputs: a, b, c"),
        (coroutine, {"a": 1, "z": 1}, "has no input 'z'; its inputs: a"),
        (coroutine, None, "needs input 'a'"),
    ],
)
def test_a_wrong_input_is_found_when_the_task_is_added(
    workflow: LatticeWorkflow, function: Callable[..., Any], inputs: dict[str, Any], text: str
) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        workflow.add_task(function, inputs)


def test_any_input_is_accepted_when_the_signature_has_keywords(workflow: LatticeWorkflow) -> None:
    assert workflow.add_task(plain, {"a": 1, "c": 2, "z": 3}).task_id == "plain"
    assert workflow.add_task(seed, {"whatever": 1}).task_id == "seed"


def test_tasks_of_one_function_are_counted(workflow: LatticeWorkflow) -> None:
    ids = [workflow.add_task(coroutine, {"a": 1}, task_name="shown").task_id for _ in range(3)]
    assert ids == ["coroutine", "coroutine-2", "coroutine-3"]


def test_outputs_are_wired_by_name(workflow: LatticeWorkflow) -> None:
    added = workflow.add_task(typed, {"text": "x"})
    assert added.outputs["head"] == TaskOutput("typed", "head")
    assert list(added.outputs) == ["head", "tail"]
    with pytest.raises(TaskDefinitionError, match="no output 'rump'; its outputs: 'head', 'tail'"):
        added.outputs["rump"]
    with pytest.raises(TaskDefinitionError, match="has 2 outputs; name one"):
        _ = added.output


def test_an_edge_joins_tasks_of_one_workflow(client: LatticeClient, workflow: LatticeWorkflow) -> None:
    here = workflow.add_task(coroutine, {"a": 1})
    there = client.create_workflow().add_task(coroutine, {"a": 1})
    with pytest.raises(TaskDefinitionError, match="belongs to another workflow"):
        workflow.add_edge(here, there)


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (lambda added: added, "is a task; wire one of its outputs"),
        (lambda added: [added], "is a task; wire one of its outputs"),
        (lambda added: added.outputs, "are not one value; wire each by name"),
        (lambda added: (number for number in range(3)), "cannot be pickled"),
    ],
)
def test_wiring_raises_before_sending_when_a_value_cannot_be_wired(
    workflow: LatticeWorkflow, wire: Callable[[Any], Any], text: str
) -> None:
    first = workflow.add_task(coroutine, {"a": 1})
    workflow.add_task(untyped, {"a": wire(first)})
    with pytest.raises(TaskDefinitionError, match=f"input 'a' of task 'untyped'.*{text}"):
        workflow.run()


def test_a_function_that_cannot_travel_is_found_before_anything_is_sent(workflow: LatticeWorkflow) -> None:
    import threading

    lock = threading.Lock()
    workflow.add_task(lambda: lock.locked() or None)
    with pytest.raises(TaskDefinitionError, match=r"'lock' .*cannot be pickled; create it inside the function"):
        workflow.run()


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (float, 1),
        (int, 1.5),
        (list[int], (1, 2)),
        (str | None, None),
        (Literal["a", 1], 1),
        (Split, {}),
        (Sequence[str], "text"),
        (Mapping[str, int], {}),
        (Path, "a/path"),
        (np.ndarray, [1]),
        ("Unknown", 1),
        ("1 / 0", 1),
        (Annotated[int, "of one"], 3),
        (int, np.int64(3)),
        (T, 1),
        (Any, 1),
        (object, 1),
        (type[int], 1),
    ],
)
def test_value_is_accepted_when_it_may_match_the_annotation(
    workflow: LatticeWorkflow, annotation: Any, value: Any
) -> None:
    def function(x):  # type: ignore[no-untyped-def]
        return x

    function.__annotations__ = {"x": annotation}
    assert workflow.add_task(function, {"x": value}).inputs == {"x": value}


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (str, 5, r"is 5, which is of type int; the function's annotation asks for str"),
        (list[int], "text", r"is 'text', which is of type str; .* list\[int\]"),
        (int | None, "5", r"is '5', which is of type str; .* int \| None"),
        (Literal["a"], 1, r"is 1, which is of type int; .* Literal\['a'\]"),
        (Split, [1], r"is \[1\], which is of type list; .*Split"),
        (Mapping[str, int], [1], r"is \[1\], which is of type list; .*Mapping"),
        (str, None, "is None, which is of type NoneType"),
        (bytes, "x" * 100, r"is 'x{59}\.\.\., which is of type str"),
        ("list[int]", {}, r"is {}, which is of type dict"),
    ],
)
def test_add_task_raises_when_a_value_does_not_match_the_annotation(
    workflow: LatticeWorkflow, annotation: Any, value: Any, text: str
) -> None:
    def function(x):  # type: ignore[no-untyped-def]
        return x

    function.__annotations__ = {"x": annotation}
    with pytest.raises(TaskDefinitionError, match=f"input 'x' of task 'function' {text}"):
        workflow.add_task(function, {"x": value})


def test_annotations_are_ignored_when_a_decorator_or_batch_changes_the_inputs(workflow: LatticeWorkflow) -> None:
    @functools.wraps(coroutine)
    def wrapper(**given: Any) -> int:
        return int(given["a"])

    def defaulted(a: int = None) -> int:  # type: ignore[assignment]  # noqa: RUF013
        return a

    assert workflow.add_task(wrapper, {"a": "3"})
    assert workflow.add_task(defaulted, {"a": None})
    assert workflow.add_task(task(batch_size=2)(lambda a: a).with_(batch_size=3), {"a": 1})

    def nothing() -> None:
        pass

    assert workflow.add_task(coroutine, {"a": workflow.add_task(nothing).output})
    made = workflow.add_task(typed, {"text": "x"})
    assert workflow.add_task(coroutine, {"a": made.outputs["head"].optional()})
    assert workflow.add_task(coroutine, {"a": made.outputs["tail"][0]})
    assert workflow.map(coroutine, made.outputs["tail"]).over == "a"


def test_with_changes_only_the_given_options() -> None:
    first = task(resources={"cpu": 2, "gpu": 1}, retries=2, outputs=["a", "b"], exclude=["*.csv"], name="first")(typed)
    found = first.with_(cpu=3, cpu_mem=1, timeout=4, fresh_process=True)
    assert found.function is typed
    assert (found.name, found.outputs, found.choice) == ("first", ("a", "b"), first.choice)
    assert found.resources == resources_pb2.Resources(cpu=3, gpu=1, memory_bytes=1 << 20)
    assert found.settings.retry == first.settings.retry
    assert found.settings.timeout.attempt.seconds == 4
    assert (found.has_fresh_process, first.has_fresh_process) == (True, False)
    assert first.resources.cpu == 2
    again = found.with_(resources={"gpu": 0}, name="again", retries=0)
    assert (again.name, again.resources.cpu, again.resources.gpu) == ("again", 3, 0)
    assert not again.settings.HasField("retry")
    with pytest.raises(TaskDefinitionError, match="no option 'outputs'"):
        first.with_(outputs=["c"])  # type: ignore[call-arg]
    with pytest.raises(TaskDefinitionError, match="gpu must be a number"):
        first.with_(gpu="one")  # type: ignore[arg-type]


def test_with_returns_an_entry_point_when_it_changes_one() -> None:
    found = entrypoint("js/word_count", inputs=["text"]).with_(cpu=2, priority=3)
    assert (found.entrypoint, found.inputs, found.takes_any) == ("js/word_count", ("text",), False)
    assert (found.resources.cpu, found.settings.priority) == (2, 3)


def test_inputs_are_bound_as_in_a_call(workflow: LatticeWorkflow) -> None:
    assert task(plain).bind(1, c=2, z=3).inputs == {"a": 1, "c": 2, "z": 3}
    assert task(inputs=["x"])(seed).bind({"x": 1}).inputs == {"x": 1}
    assert entrypoint("statistics:mean").bind(data=[1]).inputs == {"data": [1]}
    added = workflow.add_task(task(plain).bind(1, c=2), task_id="bound")
    assert (added.inputs, added.task_id) == ({"a": 1, "c": 2}, "bound")
    bound = task(coroutine).bind(1)
    for call in (
        lambda: workflow.add_task(bound, {"a": 2}),
        lambda: workflow.add_task(bound, a=2),  # type: ignore[arg-type]
        lambda: workflow.map(bound, added.output),  # type: ignore[arg-type]
        lambda: task(lambda *numbers: numbers).bind(1),
        lambda: task(seed).bind([1]),  # type: ignore[arg-type]
    ):
        with pytest.raises(TaskDefinitionError, match=r"already|bind|are given by name|as one dict, not as list"):
            call()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("remote", r": client\.run_task\(plain, \{\.\.\.\}\) runs it, and workflow\.add_task\(plain, "),
        ("submit", r": .*; within a task, context\.call\(plain, "),
        ("map", r": workflow\.map\(plain, other\.output\) runs it for each item"),
        ("options", r": plain\.with_\(cpu=2, retries=3\) is the same task with other options"),
        ("nothing", "$"),
    ],
)
def test_a_method_that_tasks_of_other_systems_have_is_an_error_with_advice(name: str, advice: str) -> None:
    with pytest.raises(AttributeError, match=f"^a task has no attribute '{name}'{advice}"):
        getattr(task(plain), name)


def test_a_task_can_be_copied() -> None:
    assert copy.copy(task(plain))(1, c=3) == 6
