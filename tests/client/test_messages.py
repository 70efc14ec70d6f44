"""The error messages for wrong use of tasks, outputs and runs: each names the mistake, its place and the correction."""

import asyncio
import functools
import inspect
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NotRequired, TypedDict

import pytest

from lattice_client import (
    AsyncLatticeClient,
    LangGraphClient,
    LatticeClient,
    LatticeWorkflow,
    Run,
    SecurityError,
    TargetError,
    TaskDefinitionError,
    entrypoint,
    task,
)
from lattice_client.graph.workflow import Graph, single
from lattice_client.runs.ids import task_id_of


def leaf(a: int, b: int = 0) -> int:
    return a + b


def nothing() -> int:
    return 1


class Some(TypedDict, total=False):
    title: str
    body: str


class Mostly(TypedDict):
    title: str
    body: NotRequired[str]


def some() -> Some:
    return {}


def mostly() -> Mostly:
    return {"title": ""}


def unclear(params: dict[str, Any]) -> Any:
    return params


@pytest.fixture
def graph() -> Graph[None]:
    """An empty workflow of no client."""
    return Graph(None)


# Definitions.


def items() -> Iterator[int]:
    yield 1


async def async_items() -> AsyncIterator[int]:
    yield 1


class Stepping:
    def __call__(self) -> Iterator[int]:
        yield 1

    def steps(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    "function",
    [items, async_items, functools.partial(items), Stepping(), Stepping().steps, functools.partial(Stepping())],
)
def test_a_generator_function_is_a_task_with_one_output(function: Callable[..., Any]) -> None:
    assert task(function).outputs == ("result",)
    assert task(combine=sum)(function).outputs == ("result",)


@pytest.mark.parametrize(("options", "text"), [({}, "not 1"), ({"batch_size": 2}, "combine must be a function")])
def test_task_raises_when_combine_is_no_function_or_the_task_is_batched(options: Any, text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        task(combine=1, **options)(items)
    with pytest.raises(TaskDefinitionError, match="combine is for a generator function"):
        task(combine=sum, batch_size=2)(items)


def test_a_generator_of_a_batch_or_behind_a_decorator_is_a_task() -> None:
    assert task(batch_size=2)(items).outputs == ("result",)
    assert task(contextmanager(items)).outputs == ("result",)
    with pytest.raises(TaskDefinitionError, match="is an asynchronous generator function"):
        task(batch_size=2)(async_items)


def test_a_definition_is_shown_in_one_line() -> None:
    assert repr(task(leaf)) == "<task definition leaf(a, b) -> result>"
    assert repr(task(mostly)) == "<task definition mostly() -> title, ...>"
    assert repr(task(unclear)) == "<task definition unclear(**) -> ...>"
    assert repr(entrypoint("js/count", inputs=["text"])) == "<task definition count(text) -> result>"


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            some,
            "task 'some' declares no output: 'title', 'body' of the returned TypedDict may be left out, .*Required",
        ),
        (unclear, r"task 'unclear' declares no output: its outputs are not declared: name them in @task\(outputs="),
        (task(outputs=[])(some), r"task 'some' declares no output: it declares none; name its outputs in @task"),
    ],
)
def test_output_error_explains_why_the_task_declares_none(
    graph: Graph[None], function: Callable[..., Any], text: str
) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        _ = graph.add_task(function).output


def test_output_error_explains_that_a_key_may_be_left_out(graph: Graph[None]) -> None:
    added = graph.add_task(mostly)
    with pytest.raises(
        TaskDefinitionError, match=r"no output 'body'; its outputs: 'title'; 'body' of the .*Required\["
    ):
        added.outputs["body"]
    with pytest.raises(TaskDefinitionError, match=r"no output 'rump'; its outputs: 'title'$"):
        added.outputs["rump"]


# Calls.


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda t: single(leaf, None, {"a": 1}),
            r'run_task has no argument a; .*: run_task\(leaf, {"a": ..., "b": ...}\)',
        ),
        (
            lambda t: single(leaf, {"a": 1}, {"cpu": 1, "retries": 2}),
            r"run_task has no argument cpu, retries, which is an option of .*, or leaf.with_\(cpu=..., retries=...\)$",
        ),
        (lambda t: single(leaf, None, {}), "task 'leaf' needs input 'a'; its inputs: a, b"),
        (lambda t: single(leaf, 1, {}), r"the inputs are one dict, run_task\(leaf, .*\), not int"),
        (lambda t: single(t.output, None, {}), "must be a function or a @task, not the output 'result' of task 'leaf'"),
        (
            lambda t: task_id_of(t.outputs),
            "a task of a run is named by itself, its id or one of its outputs, not by Out",
        ),
        (lambda t: task_id_of(None), "not by None"),
    ],
)
def test_calls_about_a_task_name_the_accepted_types_when_the_argument_is_wrong(
    graph: Graph[None], call: Callable[[Any], Any], text: str
) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        call(graph.add_task(leaf, {"a": 1}))


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (
            lambda g, t: g.add_edge(t.output, t),
            "source_task must be a task .* not the output 'result' of task 'leaf'; give the task 'leaf' itself",
        ),
        (
            lambda g, t: g.add_edge(leaf, t),
            "source_task must be a task that add_task returned, not the function 'leaf'",
        ),
        (lambda g, t: g.add_edge(t, task(leaf)), "target_task must be a task .*, not the function 'leaf'"),
        (lambda g, t: g.add_edge(t, "leaf"), "target_task must be a task .*, not a str"),
        (lambda g, t: g.add_task(leaf, {"a": 1}, when=t), "not the task 'leaf': when=task.output$"),
        (
            lambda g, t: g.add_task(leaf, {"a": 1}, unless=t.outputs),
            "not all outputs of a task, .*: unless=task.output$",
        ),
        (lambda g, t: g.add_task(t, {"a": 1}), "must be a function or a @task, not the task 'leaf'"),
        (
            lambda g, t: g.map(leaf, t),
            "over is the task 'leaf', not exactly one output of another task; give one: task.output$",
        ),
        (lambda g, t: g.map(leaf, t.output, b=1), r"map has no argument b; .*: map\(leaf, task.output, {"),
    ],
)
def test_wiring_error_names_the_wrong_value(graph: Graph[None], wire: Callable[[Any, Any], Any], text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        wire(graph, graph.add_task(leaf, {"a": 1}))


def test_a_task_without_inputs_runs_without_any(client: LatticeClient) -> None:
    assert client.run_task(nothing) == {"result": 1}
    with pytest.raises(TaskDefinitionError, match=r"run_task has no argument a"):
        client.run_task(leaf, a=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prioritty": 3}, "a run has no setting 'prioritty'; its settings: run_id, labels, priority, timeout"),
        ({"labels": {"a": 1}}, "a run's labels are a dict of texts by text, not {'a': 1}"),
        ({"labels": ["a"]}, r"a run's labels are a dict of texts by text, not \['a'\]"),
        ({"priority": "high"}, "a run's priority must be a whole number up to 2147483647, not 'high'"),
        ({"priority": 2**31}, "a run's priority must be a whole number up to 2147483647, not 2147483648"),
        ({"priority": True}, "a run's priority must be a whole number up to 2147483647, not True"),
        ({"run_id": {"x": 1}}, "the id of a run must be a text, not {'x': 1}; settings are given by name"),
        ({"timeout": 0}, "a run's timeout must be seconds above 0, not 0"),
        ({"timeout": "5"}, "a run's timeout must be seconds above 0, not '5'"),
        ({"timeout": float("inf")}, "a run's timeout must be seconds above 0, not inf"),
    ],
)
def test_a_wrong_setting_of_a_run_is_refused(client: LatticeClient, settings: dict[str, Any], text: str) -> None:
    workflow: LatticeWorkflow = client.create_workflow()
    workflow.add_task(nothing)
    with pytest.raises(TaskDefinitionError, match=text):
        workflow.run(**settings)  # type: ignore[typeddict-item]


@pytest.mark.parametrize("timeout", ["5", math.nan, 10**400, [1]])
@pytest.mark.parametrize(
    "wait",
    [
        lambda run, timeout: run.result(timeout),
        lambda run, timeout: run.output("nothing", timeout),
        lambda run, timeout: list(run.events(timeout=timeout)),
    ],
)
def test_wait_of_a_wrong_length_is_refused(
    client: LatticeClient, wait: Callable[[Any, Any], object], timeout: Any
) -> None:
    with pytest.raises(TypeError, match=r"timeout must be a number of seconds, not "):
        wait(started(client), timeout)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda client: client.create_workflow(5), "the name of a workflow must be a text, not 5"),
        (lambda client: client.open_run("\ud83d"), "the name of a workflow must be valid Unicode"),
        (lambda client: client.get_workflow(None), "the id of a workflow must be a text, not None"),
        (lambda client: client.list_runs(states="failed"), "the states of runs must be a list of states, not 'failed'"),
        (lambda client: client.retry_run("r", secrets="KEY"), "secrets must be a list of names of variables"),
        (
            lambda client: client.aio.add_tasks("r", [leaf]),
            "the tasks to add must be a list .*; the function 'leaf' is none",
        ),
        (lambda client: client.aio.add_tasks("r", 5), "the tasks to add must be a list of tasks .*, not 5"),
        (lambda client: LatticeClient(client.target, tenant=5).list_runs(), "the tenant of a client must be a text"),
    ],
)
def test_argument_of_a_wrong_type_is_named(client: LatticeClient, call: Callable[[Any], Any], text: str) -> None:
    def result() -> None:
        if inspect.iscoroutine(found := call(client)):
            asyncio.run(found)

    with pytest.raises(TaskDefinitionError, match=text):
        result()


def started(client: LatticeClient) -> Run:
    workflow: LatticeWorkflow = client.create_workflow()
    workflow.add_task(nothing)
    return workflow.run()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda client: client.list_runs(limit="5"), "limit must be a whole number, not '5'"),
        (lambda client: client.list_runs(limit=-1), "limit must be at least 0, not -1"),
        (lambda client: client.drain_node("n", deadline="soon"), "deadline must be a number of seconds, not 'soon'"),
        (lambda client: client.drain_node("n", deadline=math.inf), "a duration must be a finite number of seconds"),
        (lambda client: list(started(client).events(after=None)), "after must be a whole number, not None"),
        (lambda client: list(started(client).chunks(after=5)), "after must be a dict .*, not 5"),
        (lambda client: list(started(client).chunks(after={"t": 1.5})), r"after\['t'\] must be a whole number"),
    ],
)
def test_number_of_a_wrong_kind_is_named(client: LatticeClient, call: Callable[[Any], Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        call(client)


@pytest.mark.parametrize("paths", [{"tls_ca": 1.5}, {"tls_cert": 1.5, "tls_key": "key"}])
def test_path_of_a_wrong_type_is_named(paths: dict[str, Any]) -> None:
    (name,) = (name for name, value in paths.items() if value == 1.5)
    with pytest.raises(SecurityError, match=rf"\({name}\) 1\.5"):
        LatticeClient("localhost:1", **paths)


def test_client_refuses_settings_that_it_could_not_use_later() -> None:
    with pytest.raises(TypeError, match="admission_timeout must be a number of seconds, not 'x'"):
        LatticeClient("127.0.0.1:1", admission_timeout="x")  # type: ignore[arg-type]
    with pytest.raises(SecurityError, match="the token must be a text, not a int"):
        LatticeClient("127.0.0.1:1", token=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["tcp://127.0.0.1:6117", "ws://h:1", "Http://h:1", "grpc+tls://h:1", "grpcs:/h:1"])
def test_a_scheme_that_is_not_known_is_refused_with_those_that_are(target: str) -> None:
    with pytest.raises(
        TargetError, match=r"has the scheme .*: host:port .* grpc://, http://, grpcs://, https://, unix:"
    ):
        LatticeClient(target)


def test_a_client_refuses_an_unknown_argument() -> None:
    for make in (LatticeClient, AsyncLatticeClient, LangGraphClient):
        with pytest.raises(TypeError, match="a client has no argument tls_certs; how it connects is given by token, "):
            make("127.0.0.1:1", tls_certs="x")  # type: ignore[call-arg]


class Refusing:
    """Refuses to be pickled, with an error that does not say so."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not now")


def test_an_object_that_refuses_to_be_pickled_is_named_with_its_error(client: LatticeClient) -> None:
    with pytest.raises(TaskDefinitionError, match=r"item 0 cannot be pickled: RuntimeError: not now$"):
        client.run_task(lambda x: x, {"x": [Refusing()]})
    captured = Refusing()
    with pytest.raises(TaskDefinitionError, match=r"function, which cannot be pickled: RuntimeError: not now$"):
        client.run_task(lambda: captured)
