"""`@task` and wiring: what is read from a function, and what is found wrong before anything is sent."""

from collections.abc import Callable
from typing import Any, TypedDict

import pytest
from lattice.v1 import errors_pb2, resources_pb2, task_pb2

from lattice_client import LatticeClient, LatticeWorkflow, TaskDefinitionError, TaskOutput, task


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
        ({"cpus": 2}, "no setting 'cpus'"),
        ({"resources": {"ram": 2}}, "no setting 'ram'"),
        ({"cpu": -1}, "cpu must be a number from 0"),
        ({"gpu": "one"}, "gpu must be a number from 0"),
        ({"cpu": True}, "cpu must be a number from 0"),
        ({"cpu_mem": float("inf")}, "cpu_mem must be a number from 0"),
        ({"isolation": "jail"}, "isolation must be one of none, subprocess, seccomp, docker"),
        ({"retries": -1}, "retries must be a whole number from 0, not -1"),
        ({"retries": True}, "retries must be a whole number from 0, not True"),
        ({"retry_on": ValueError}, "retry_on must be used together with retries"),
        ({"retry_backoff": 1.0}, "retry_backoff must be used together with retries"),
        ({"retries": 1, "retry_on": "often"}, "retry_on must be one of error, crash, out_of_memory, timeout"),
        ({"timeout": 0}, "timeout must be seconds above 0"),
        ({"total_timeout": -1}, "total_timeout must be seconds from 0"),
        ({"priority": "high"}, "priority must be a whole number"),
        ({"max_parallel": 2**40}, "max_parallel must be a whole number from 0"),
        ({"concurrency_key": 3}, "concurrency_key must be a text, not 3"),
        ({"node_selector": {"zone": 1}}, "node_selector must be texts by text"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, not 0"),
        ({"batch_timeout": 1.0}, "batch_timeout must be used together with batch_size"),
        ({"batch_size": 2, "batch_within": "room"}, "batch_within must be one of server, run"),
    ],
)
def test_a_wrong_setting_is_found_at_the_decoration(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        task(**settings)(plain)


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
def test_what_is_retried_is_named_as_workers_name_it(causes: Any, kinds: list[str], types: list[str]) -> None:
    policy = task(retries=2, retry_on=causes)(plain).settings.retry
    assert policy.max_attempts == 3
    assert policy.retry_on == [errors_pb2.FailureKind.Value(f"FAILURE_KIND_{kind}") for kind in kinds]
    assert policy.retry_on_types == types


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


def test_any_input_goes_where_the_signature_takes_any(workflow: LatticeWorkflow) -> None:
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
        (lambda added: {1: added.output}, "keys are not all strings"),
        (lambda added: (number for number in range(3)), "cannot be pickled"),
    ],
)
def test_what_cannot_be_wired_is_found_before_anything_is_sent(
    workflow: LatticeWorkflow, wire: Callable[[Any], Any], text: str
) -> None:
    first = workflow.add_task(coroutine, {"a": 1})
    workflow.add_task(coroutine, {"a": wire(first)})
    with pytest.raises(TaskDefinitionError, match=f"input 'a' of task 'coroutine-2'.*{text}"):
        workflow.run()


def test_a_function_that_cannot_travel_is_found_before_anything_is_sent(workflow: LatticeWorkflow) -> None:
    import threading

    lock = threading.Lock()
    workflow.add_task(lambda: lock.locked() or None)
    with pytest.raises(TaskDefinitionError, match=r"'lock' .*cannot be pickled; create it inside the function"):
        workflow.run()
