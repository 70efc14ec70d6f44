"""Workflows with parameters, stored and run by their id, and the settings and lists of runs."""

import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from lattice_client import (
    AlreadyExistsError,
    InvalidArgumentError,
    LatticeClient,
    LatticeWorkflow,
    NotFoundError,
    RunTimeoutError,
    TaskDefinitionError,
    context,
    task,
    template,
)


@dataclass
class Query:
    text: Any


@task
async def echo(value: Any) -> Any:
    return value


@task
async def text_of(query: Query) -> Any:
    return query.text


@task
def nap() -> None:
    time.sleep(30)


@pytest.fixture
def workflow(client: LatticeClient) -> LatticeWorkflow:
    return client.create_workflow("with parameters")


@pytest.mark.parametrize("value", [1, "text", None, {"a": [1]}, b"bytes", {1, 2}, Query("q")])
def test_a_parameter_has_the_value_of_its_run_or_its_default(workflow: LatticeWorkflow, value: Any) -> None:
    workflow.add_task(echo, {"value": workflow.parameter("x", default=value)})
    assert workflow.run().result() == {"result": value}
    assert workflow.run(parameters={"x": "other"}).result() == {"result": "other"}


def test_parameter_is_found_at_any_depth_of_an_input(workflow: LatticeWorkflow) -> None:
    x = workflow.parameter("x")
    first = workflow.add_task(echo, {"value": 5})
    shapes = [
        (echo, "value", [1, {"k": x}], [1, {"k": 7}]),
        (echo, "value", (x, {x: 1}.__len__()), (7, 1)),
        (text_of, "query", Query(x), 7),
        (echo, "value", [x, first.output], [7, 5]),
        (echo, "value", template("{a} and {b}", a=x, b=first.output), "7 and 5"),
    ]
    made = [workflow.add_task(function, {name: value}) for function, name, value, _ in shapes]
    run = workflow.run(parameters={"x": 7})
    assert [run.output(found) for found in made] == [wanted for *_, wanted in shapes]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "the workflow needs parameter 'x'; its parameters: x, y"),
        ({"x": 1, "z": 1}, "the workflow has no parameter 'z'; its parameters: x, y"),
        ([1], "a run's parameters are one dict"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(workflow: LatticeWorkflow, parameters: Any, message: str) -> None:
    workflow.add_task(echo, {"value": [workflow.parameter("x"), workflow.parameter("y", default=1)]})
    with pytest.raises(TaskDefinitionError, match=message):
        workflow.run(parameters=parameters)


def test_a_parameter_that_cannot_be_wired_is_refused(client: LatticeClient, workflow: LatticeWorkflow) -> None:
    x = workflow.parameter("x", default=1)
    for name in ("x", "", 3):
        with pytest.raises(TaskDefinitionError, match="the name of a parameter must be"):
            workflow.parameter(name)  # type: ignore[arg-type]
    other = client.create_workflow()
    other.add_task(echo, {"value": [x]})
    with pytest.raises(TaskDefinitionError, match=r"input 'value' of task 'echo' is wired to Parameter\(name='x'\)"):
        other.run()
    with pytest.raises(TaskDefinitionError, match="of another workflow"):
        client.run_task(echo, {"value": x})
    with pytest.raises(TaskDefinitionError, match="has no value yet"):
        f"{x}"
    workflow.add_task(echo, {"value": f"{[x]}"})
    with pytest.raises(TaskDefinitionError, match=r"holds Parameter\(name='x'\) as a text"):
        workflow.run()


def test_a_stored_workflow_is_run_by_its_id(client: LatticeClient, workflow: LatticeWorkflow) -> None:
    workflow.add_task(echo, {"value": [workflow.parameter("x"), workflow.parameter("y", default=2)]})
    name = f"stored-{uuid4().hex}"
    stored = workflow.store(name)
    assert workflow.store(name).workflow_id == stored.workflow_id == name
    assert name in [found.workflow_id for found in client.list_workflows()]
    assert stored.run(parameters={"x": 1}).result() == {"result": [1, 2]}
    assert client.get_workflow(name).run(parameters={"x": 1, "y": 3}).result() == {"result": [1, 3]}
    for parameters, message in (({}, "the run has no parameter 'x'"), ({"x": 1, "z": 1}, "no such parameter")):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            stored.run(parameters=parameters)
        assert caught.value.reason == "INVALID_WORKFLOW"
    workflow.add_task(echo, {"value": 1})
    with pytest.raises(AlreadyExistsError):
        workflow.store(name)
    client.delete_workflow(name)
    with pytest.raises(NotFoundError):
        stored.run(parameters={"x": 1})


def test_a_stored_workflow_takes_no_more_tasks(client: LatticeClient) -> None:
    stored = client.get_workflow("kept")
    with pytest.raises(TaskDefinitionError, match=r"workflow 'kept' is stored, .* by run.add_tasks, or make another"):
        stored.add_task(lambda: 1)


def test_a_workflow_is_stored_under_an_id_of_its_own(client: LatticeClient, workflow: LatticeWorkflow) -> None:
    workflow.add_task(echo, {"value": 1})
    assert workflow.store().run().result() == workflow.store().run().result() == {"result": 1}


def test_runs_are_listed_by_state_and_label(client: LatticeClient, workflow: LatticeWorkflow) -> None:
    mark = {"mark": uuid4().hex}
    workflow.add_task(echo, {"value": 1})
    run = workflow.run(labels={**mark, "kind": "a"})
    run.result()
    client.run_task(echo, {"value": 1}, labels={**mark, "kind": "b"})
    assert len(client.list_runs(labels=mark)) == 2
    assert [found.run_id for found in client.list_runs(labels={**mark, "kind": "a"})] == [run]
    assert [found.run_id for found in client.list_runs(1, labels=mark)] != [run]
    assert client.list_runs(labels=mark, states=["running", "failed"]) == []
    assert len(client.list_runs(labels=mark, states=["succeeded"])) == 2
    with pytest.raises(InvalidArgumentError, match="a run has no state 'done'; its states: running, cancelling, succ"):
        client.list_runs(states=["done"])


def test_one_task_has_the_settings_of_a_run(client: LatticeClient) -> None:
    with pytest.raises(RunTimeoutError):
        client.run_task(nap, timeout=0.2)
    mark = {"mark": uuid4().hex}
    client.run_task(echo, {"value": 1}, labels=mark, priority=3)
    (found,) = client.list_runs(labels=mark)
    assert (client.describe_run(found.run_id).priority, dict(found.labels)) == (3, mark)
    with pytest.raises(TaskDefinitionError, match="a run's timeout must be seconds above 0"):
        client.run_task(echo, {"value": 1}, timeout=-1)


def test_a_task_knows_its_attempt_and_spawns_by_the_client_s_package(client: LatticeClient) -> None:
    @task
    def plan(x: int) -> list[Any]:
        found = context.spawn(echo, {"value": x})
        context.spawn(echo, {"value": [found.output]}, "last", after=[found])
        attempt = context.current()
        return [attempt.task_id, attempt.number]

    workflow = client.create_workflow()
    planned = workflow.add_task(plan, {"x": 3})
    run = workflow.run()
    assert run.output(planned) == ["plan", 1]
    assert run.result() == {"plan": {"result": ["plan", 1]}, "plan/last": {"result": [3]}}
    with pytest.raises(RuntimeError, match="there is no task running here"):
        context.current()
