"""The results of a run: their shape by the graph, outputs of single tasks, and partial results of failed runs."""

import asyncio
from typing import Any, TypedDict

import pytest

from lattice_client import (
    AsyncLatticeClient,
    LatticeClient,
    LatticeWorkflow,
    NotFoundError,
    RunCancelledError,
    RunError,
    TaskDefinitionError,
    TaskFailedError,
    task,
    template,
)
from lattice_worker import context

WAIT_S = 60


@task
async def give(value: Any = None) -> Any:
    return value


@task
async def fail(value: Any = None) -> Any:
    raise LookupError("a reason")


@task
async def invert(x: int) -> float:
    return 1 / x


@task(outputs=["low", "high"])
async def around(n: int) -> dict[str, int]:
    return {"low": n - 1, "high": n + 1}


class Some(TypedDict, total=False):
    half: float


class Report(Some):
    size: int


@task
async def report(size: int) -> Report:
    return {"size": size} if size % 2 else {"size": size, "half": size / 2}


@task
async def endless() -> None:
    await asyncio.Event().wait()


@pytest.fixture
def workflow(client: LatticeClient) -> LatticeWorkflow:
    """An empty workflow that finishes independent tasks."""
    return client.create_workflow(failure_policy="finish_independent")


# The shape of a result.


@pytest.mark.parametrize("flag", [True, False])
def test_result_has_the_same_keys_when_tasks_were_skipped(workflow: LatticeWorkflow, flag: bool) -> None:
    decision = workflow.add_task(give, {"value": flag})
    workflow.add_task(give, {"value": "yes"}, task_id="yes", when=decision.output)
    workflow.add_task(give, {"value": "no"}, task_id="no", unless=decision.output)
    expected = {"yes": {"result": "yes"}, "no": None} if flag else {"yes": None, "no": {"result": "no"}}
    assert workflow.run().result(WAIT_S) == expected


@pytest.mark.parametrize("flag", [True, False])
def test_a_result_of_one_final_task_is_by_name_or_empty(workflow: LatticeWorkflow, flag: bool) -> None:
    decision = workflow.add_task(give, {"value": flag})
    workflow.add_task(around, {"n": 1}, when=decision.output)
    assert workflow.run().result(WAIT_S) == ({"low": 0, "high": 2} if flag else {})


def test_a_final_map_has_a_place_for_each_item_and_output(workflow: LatticeWorkflow) -> None:
    workflow.map(report, workflow.add_task(give, {"value": [1, 2, 3]}).output)
    assert workflow.run().result(WAIT_S) == {"size": [1, 2, 3], "half": [None, 1.0, None]}


# Failed and cancelled runs.


def test_partial_result_has_the_available_outputs_when_the_run_failed(workflow: LatticeWorkflow) -> None:
    fine = workflow.add_task(give, {"value": 1})
    workflow.add_task(give, {"value": [fine.output, workflow.add_task(fail).output.optional()]}, task_id="gathered")
    workflow.add_task(fail, task_id="broken")
    run = workflow.run()
    with pytest.raises(TaskFailedError, match="a reason"):
        run.result(WAIT_S)
    assert run.result(WAIT_S, partial=True) == {"gathered": {"result": [1, None]}, "broken": None}
    assert run.status() == "failed"


def test_partial_result_has_the_available_items_when_a_map_failed(workflow: LatticeWorkflow) -> None:
    workflow.map(invert, workflow.add_task(give, {"value": [2, 0, 4]}).output)
    run = workflow.run()
    with pytest.raises(TaskFailedError, match="division by zero"):
        run.result(WAIT_S)
    assert run.result(WAIT_S, partial=True) == {"result": [0.5, None, 0.25]}


def test_partial_result_is_the_result_when_the_run_succeeded(workflow: LatticeWorkflow) -> None:
    workflow.add_task(give, {"value": 1})
    run = workflow.run()
    assert run.result(WAIT_S, partial=True) == run.result(WAIT_S) == {"result": 1}


def test_partial_result_has_the_available_outputs_when_the_run_was_cancelled(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(give, {"value": 1})
    workflow.add_task(endless, task_id="left")
    run = workflow.run()
    assert run.output(first, WAIT_S) == 1
    run.cancel()
    with pytest.raises(RunCancelledError):
        run.result(WAIT_S)
    assert run.result(WAIT_S, partial=True) == {"give": {"result": 1}, "left": None}
    with pytest.raises(RunError, match=r"task 'left' of run '.*' was cancelled and has no output"):
        run.output("left", WAIT_S)


# Outputs of any task.


def test_any_task_s_output_can_be_had(client: LatticeClient, workflow: LatticeWorkflow) -> None:
    one, several = workflow.add_task(give, {"value": 3}), workflow.add_task(around, {"n": 5})
    mapped = workflow.map(invert, workflow.add_task(give, {"value": [1, 2]}).output)
    empty = workflow.map(invert, workflow.add_task(give, {"value": []}).output)
    loose = workflow.add_task(report, {"size": 3})
    workflow.add_task(give, {"value": [one.output, several.outputs["low"], mapped.output, empty.output]})
    run = workflow.run()
    assert [run.output(one), run.output("give")] == [3, 3]
    assert [run.output(several), run.output("around")] == [{"low": 4, "high": 6}] * 2
    assert [run.output(mapped), run.output("invert")] == [[1.0, 0.5]] * 2
    assert [run.output(empty), run.output("invert-2")] == [[], []]
    assert run.output("invert[1]") == 0.5
    assert run.output(loose) == {"size": 3}
    assert client.get_run(run).output("give-4") == [3, 4, [1.0, 0.5], []]


def test_an_output_that_cannot_be_had_names_the_task_and_its_state(workflow: LatticeWorkflow) -> None:
    decision = workflow.add_task(give, {"value": False})
    skipped = workflow.add_task(give, {"value": 1}, when=decision.output)
    failed = workflow.add_task(fail, task_name="the one that fails")
    dependent = workflow.add_task(give, {"value": failed.output})
    run = workflow.run()
    with pytest.raises(RunError, match=r"task 'give-2' of run '.*' was skipped and has no output"):
        run.output(skipped, WAIT_S)
    with pytest.raises(RunError, match=r"task 'give-3' of run '.*' was skipped and has no output: .*'fail'"):
        run.output(dependent, WAIT_S)
    with pytest.raises(TaskFailedError, match=r"task 'fail' \('the one that fails'\) of run .*a reason") as caught:
        run.output(failed, WAIT_S)
    assert isinstance(caught.value.__cause__, LookupError)
    assert (caught.value.task_id, caught.value.task_name) == ("fail", "the one that fails")
    with pytest.raises(NotFoundError, match="nothing"):
        run.output("nothing", WAIT_S)


def test_output_raises_when_the_timeout_passed(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    left = workflow.add_task(endless)
    run = workflow.run()
    with pytest.raises(TimeoutError):
        run.output(left, timeout=0.05)
    run.cancel()


def test_asyncio_client_returns_the_same_outputs(address: str) -> None:
    async def twin() -> None:
        async with AsyncLatticeClient(address) as client:
            workflow = client.create_workflow(failure_policy="finish_independent")
            first = workflow.add_task(give, {"value": 3})
            workflow.add_task(give, {"value": first.output}, task_id="fine")
            workflow.add_task(fail)
            run = await workflow.run()
            assert await run.output(first, WAIT_S) == 3
            assert await run.result(WAIT_S, partial=True) == {"fine": {"result": 3}, "fail": None}
            with pytest.raises(TaskFailedError):
                await run.result(WAIT_S)

    asyncio.run(twin())


# Names and ids.


def test_a_failure_shows_the_name_beside_the_id(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(fail, task_name="item 59")
    with pytest.raises(TaskFailedError, match=r"task 'fail' \('item 59'\) of run '.*' failed \(USER_ERROR\)"):
        workflow.run().result(WAIT_S)
    workflow = client.create_workflow()
    workflow.add_task(fail)
    with pytest.raises(TaskFailedError, match="task 'fail' of run"):
        workflow.run().result(WAIT_S)


def test_result_has_every_task_when_names_look_like_item_ids(client: LatticeClient) -> None:
    step, step_2 = task(name="step")(_tens), task(name="step-2")(_hundreds)
    workflow = client.create_workflow()
    workflow.add_task(step, {"x": 1})
    second = workflow.add_task(step, {"x": 2})
    shown = workflow.add_task(give, {"value": second.output})
    workflow.add_task(step_2, {"x": 3})
    workflow.add_task(task(name="step")(_hundreds), {"x": 4}, task_id="step-1")
    run = workflow.run()
    assert {task_id: found and found["result"] for task_id, found in run.result(WAIT_S).items()} == {
        "step": 11,
        "give": 12,
        "step-2-2": 103,
        "step-1": 104,
    }
    assert run.output(shown) == 12


async def _tens(x: int) -> int:
    return 10 + x


async def _hundreds(x: int) -> int:
    return 100 + x


def test_functions_of_the_same_name_are_distinct(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    added = [
        workflow.add_task(task(name="y")(_tens), {"x": 1}, task_id="a"),
        workflow.add_task(task(name="x")(_tens), {"x": 2}, task_id="b"),
        workflow.add_task(task(name="x")(_hundreds), {"x": 3}, task_id="y"),
        workflow.add_task(task(name="x-2")(_tens), {"x": 4}, task_id="x"),
    ]
    run = workflow.run()
    assert [run.output(one, WAIT_S) for one in added] == [11, 12, 103, 14]


# Wiring, through a server.


def test_output_of_another_workflow_is_refused_in_every_place(client: LatticeClient) -> None:
    there = client.create_workflow().add_task(give, {"value": True}).output
    cases: list[dict[str, Any]] = [
        {"inputs": {"value": there}},
        {"inputs": {"value": [{"k": (there,)}]}},
        {"inputs": {"value": template("{x}", x=there)}},
        {"when": there},
        {"unless": there.optional()},
    ]
    for case in cases:
        workflow = client.create_workflow()
        workflow.add_task(give, {"value": False})
        workflow.add_task(give, **case)
        with pytest.raises(TaskDefinitionError, match="'give-2' is wired to output 'result' of task 'give' of another"):
            workflow.run()
    workflow = client.create_workflow()
    workflow.add_task(give, {"value": [1]})
    workflow.map(give, there)
    with pytest.raises(TaskDefinitionError, match="of another workflow"):
        workflow.run()
    with pytest.raises(TaskDefinitionError, match="of another workflow"):
        client.run_task(give, {"value": there})


def test_tasks_added_to_a_run_are_wired_to_it_and_to_each_other(client: LatticeClient) -> None:
    workflow, aside = client.create_workflow(), client.create_workflow()
    first = workflow.add_task(give, {"value": 1})
    left = workflow.add_task(endless, task_id="left")
    run = workflow.run()
    second = aside.add_task(give, {"value": [first.output]}, task_id="second")
    run.add_tasks([second])
    third = aside.add_task(give, {"value": [second.output]}, task_id="third")
    run.add_tasks([third])
    stranger = aside.add_task(give, {"value": aside.add_task(give, {"value": 5}).output}, task_id="fourth")
    with pytest.raises(TaskDefinitionError, match="task 'give' of another workflow, which this run does not have"):
        run.add_tasks([stranger])
    assert run.output(third, WAIT_S) == [[1]]
    run.cancel_task(left)


def test_spawned_task_receives_outputs_at_any_depth(client: LatticeClient) -> None:
    @task
    def plan() -> int:
        first = context.spawn(lambda: 5, name="five")
        value = ({"deep": [first.output]}, {1: first.output}, [first.output, {"k": first.output}])
        context.spawn(lambda value: value, {"value": value}, name="gather")
        context.spawn(lambda text: text, {"text": template("<{x}>", x=first.output)}, name="text")
        return 0

    workflow = client.create_workflow()
    workflow.add_task(plan)
    run = workflow.run()
    run.result(WAIT_S)
    assert run.output("plan/gather") == ({"deep": [5]}, {1: 5}, [5, {"k": 5}])
    assert run.output("plan/text") == "<5>"


def test_run_task_returns_the_outputs_of_the_task_when_it_spawns_others(client: LatticeClient) -> None:
    def ends_last() -> int:
        made = context.spawn(give, {"value": 2})
        return context.call(give, {"value": made.output}).result() + 1

    def waits() -> str:
        try:
            context.wait_for("go", 0.5)
        except TimeoutError:
            return "waited"
        return "signalled"

    def ends_first() -> int:
        context.spawn(waits)
        return 3

    for function in (ends_last, ends_first):
        assert client.run_task(function) == {"result": 3}


def test_run_task_raises_when_a_spawned_task_fails(client: LatticeClient) -> None:
    def spawns() -> int:
        context.spawn(fail)
        return 3

    with pytest.raises(TaskFailedError, match="a reason"):
        client.run_task(spawns)


@pytest.mark.parametrize("read", [str, list, bool, len, "{}".format, lambda x: [1, x], lambda x: x[0]])
def test_a_spawned_task_s_output_cannot_be_read_or_returned(client: LatticeClient, read: Any) -> None:
    def careless() -> Any:
        return read(context.spawn(lambda: 5, name="five").output)

    workflow = client.create_workflow()
    workflow.add_task(careless)
    run = workflow.run()
    with pytest.raises(TaskFailedError, match=r"SpawnedOutput.* has no value yet") as caught:
        run.result(WAIT_S)
    assert caught.value.kind == "PAYLOAD"


def test_keys_of_a_dict_with_outputs_arrive_in_order(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(give, {"value": 1})
    keys = [chr(ord("z") - number) for number in range(20)]
    workflow.add_task(lambda value: [*value], {"value": dict.fromkeys(keys, first.output)})
    assert workflow.run().result(WAIT_S) == {"result": keys}


def test_a_function_of_params_may_return_a_value(client: LatticeClient) -> None:
    def size(params: dict[str, Any]) -> int:
        return len(params)

    def either(params: dict[str, Any]) -> Any:
        return params if params else 7

    assert client.run_task(size, {"x": 1, "y": 2}) == {"result": 2}
    assert client.run_task(either, {"x": 1}) == {"x": 1}
    assert client.run_task(either, {}) == {"result": 7}
