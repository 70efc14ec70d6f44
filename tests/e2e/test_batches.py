"""Several tasks in one call: the tasks of a batch, its start, and the effect of one failed item on the others."""

import os
from typing import Any

import pytest

from lattice_client import LatticeClient, Run, TaskFailedError, task
from tests.e2e.rooms import WAIT_S, Room, entered, note, started, until

Outcomes = dict[str, Any]


def count(value: list[int]) -> list[int]:
    """Return, for each item, how many there are."""
    return [len(value)] * len(value)


def outcomes(run: Run) -> Outcomes:
    """Return the output of each task of a run, or the kind of its failure."""
    found: Outcomes = {}
    for event in run.events(timeout=WAIT_S):
        if event.type == "task_succeeded":
            found[event.task_id] = event.data["outputs"].get("result")
        elif event.type in {"task_failed", "task_cancelled", "task_skipped"}:
            found[event.task_id] = event.data["failure"]["kind"]
    return found


def batched(client: LatticeClient, function: Any, values: list[Any], **settings: Any) -> Run:
    """Run a function on each value, in batches, to the end of all."""
    workflow = client.create_workflow(failure_policy="finish_independent")
    definition = task(**{"batch_size": len(values), "batch_timeout": 60.0, **settings})(function)
    for value in values:
        workflow.add_task(definition, {"value": value})
    return workflow.run()


def test_a_batch_starts_when_it_is_full_or_its_time_is_over(client: LatticeClient) -> None:
    run = batched(client, count, list(range(10)), batch_size=4, batch_timeout=0.1)
    assert [outputs["result"] for outputs in run.result(timeout=WAIT_S).values()] == [4] * 8 + [2] * 2


def test_tasks_of_different_runs_share_a_batch_when_their_tenant_is_the_same(
    address: str, client: LatticeClient
) -> None:
    def one(caller: LatticeClient, **settings: Any) -> Run:
        workflow = caller.create_workflow()
        workflow.add_task(task(batch_size=2, **settings)(count), {"value": 1})
        return workflow.run()

    with LatticeClient(address, tenant="another") as another:
        alone = one(another, batch_timeout=0.2)
        together = [one(client, batch_timeout=60.0) for _ in range(2)]
        assert [run.result(timeout=WAIT_S)["result"] for run in (*together, alone)] == [2, 2, 1]
    apart = [one(client, batch_timeout=0.1, batch_within="run") for _ in range(2)]
    assert [run.result(timeout=WAIT_S)["result"] for run in apart] == [1, 1]


def test_tasks_share_a_batch_when_their_code_and_options_are_equal(client: LatticeClient) -> None:
    def also_count(value: list[int]) -> list[int]:
        return [len(value)] * len(value)

    workflow = client.create_workflow()
    settings: dict[str, Any] = {"batch_size": 8, "batch_timeout": 0.1}
    for function, more in ((count, {}), (also_count, {}), (count, {"cpu": 2}), (count, {"batch_size": 7})):
        for _ in range(2):
            workflow.add_task(task(**{**settings, **more})(function), {"value": 1})
    assert {outputs["result"] for outputs in workflow.run().result(timeout=WAIT_S).values()} == {2}


def test_a_function_of_params_takes_a_list_of_them(client: LatticeClient) -> None:
    @task(inputs=["x"], outputs=["double", "of"], batch_size=3, batch_timeout=60.0)
    def double(params: list[dict[str, int]]) -> list[dict[str, int]]:
        return [{"double": item["x"] * 2, "of": len(params)} for item in params]

    workflow = client.create_workflow()
    for x in (1, 2, 3):
        workflow.add_task(double, {"x": x})
    results = workflow.run().result(timeout=WAIT_S)
    assert list(results.values()) == [{"double": 2 * x, "of": 3} for x in (1, 2, 3)]


def test_other_functions_take_a_list_for_each_argument(client: LatticeClient) -> None:
    @task(batch_size=2, batch_timeout=60.0)
    async def add(a: list[int], b: list[int] = 10) -> list[int]:  # type: ignore[assignment]  # of one item
        return [x + y for x, y in zip(a, b, strict=True)]

    workflow = client.create_workflow()
    workflow.add_task(add, {"a": 1, "b": 2})
    workflow.add_task(add, {"a": 3})
    assert workflow.run().result(timeout=WAIT_S) == {"add": {"result": 3}, "add-2": {"result": 13}}


def test_an_exception_in_the_list_fails_its_item_alone(client: LatticeClient) -> None:
    def invert(value: list[int]) -> list[Any]:
        return [1 / x if x else ZeroDivisionError("not this one") for x in value]

    run = batched(client, invert, [1, 0, 2])
    assert outcomes(run) == {"invert": 1.0, "invert-2": "USER_ERROR", "invert-3": 0.5}
    with pytest.raises(TaskFailedError, match="not this one") as caught:
        run.result(timeout=WAIT_S)
    assert caught.value.task_id == "invert-2"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_item_that_fails_is_tried_again_without_the_others(client: LatticeClient, room: Room) -> None:
    def flaky(value: list[str]) -> list[Any]:
        note(value[0].partition("|")[0], str(len(value)))
        is_first = len(value) > 1
        return [LookupError("later") if is_first and item.endswith("b") else item[-1] for item in value]

    again = {"retries": 1, "retry_on": LookupError, "retry_backoff": 0.01}
    run = batched(client, flaky, [f"{room}|a", f"{room}|b"], batch_timeout=0.2, **again)
    assert outcomes(run) == {"flaky": "a", "flaky-2": "b"}
    assert room.notes() == ["2", "1"]


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ([1], "a batch of 3 returned 1 values; one for each is needed"),
        ([1, 2, 3, 4], "a batch of 3 returned 4 values; one for each is needed"),
        (None, "a batch of 3 must return a list; it returned NoneType"),
        ({"a": 1, "b": 2, "c": 3}, "a batch of 3 must return a list; it returned dict"),
        ({1, 2, 3}, "a batch of 3 must return a list; it returned set"),
        ("abc", "a batch of 3 must return a list; it returned str"),
        (b"abc", "a batch of 3 must return a list; it returned bytes"),
    ],
)
def test_batch_fails_unless_it_returns_a_list_with_a_value_for_each_member(
    client: LatticeClient, returned: Any, text: str
) -> None:
    def miscount(value: list[int]) -> Any:
        return returned

    run = batched(client, miscount, [1, 2, 3])
    assert set(outcomes(run).values()) == {"PAYLOAD"}
    with pytest.raises(TaskFailedError, match=text):
        run.result(timeout=WAIT_S)


def test_all_items_of_a_batch_fail_when_the_function_raises(client: LatticeClient) -> None:
    def refuse(value: list[int]) -> list[int]:
        raise PermissionError("none of you")

    assert set(outcomes(batched(client, refuse, [1, 2, 3])).values()) == {"USER_ERROR"}


@pytest.mark.parametrize(("how", "kind"), [("exit", "CRASHED"), ("memory", "OUT_OF_MEMORY")])
def test_only_the_item_at_fault_fails_when_a_batch_crashes(client: LatticeClient, how: str, kind: str) -> None:
    def survive(value: list[str]) -> list[str]:
        if "exit" in value:
            os._exit(3)
        if "memory" in value:
            bytearray(2**40)
        return value

    values = ["a", "b", "c", how, "d", "e", "f"]
    run = batched(client, survive, values)
    ids = ["survive", *(f"survive-{number}" for number in range(2, 8))]
    assert outcomes(run) == {**dict(zip(ids, values, strict=True)), "survive-4": kind}
    with pytest.raises(TaskFailedError) as caught:
        run.result(timeout=WAIT_S)
    assert (caught.value.task_id, caught.value.kind) == ("survive-4", kind)


def test_a_batch_rule_of_the_server_overrides_the_options_of_the_task(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    for name in ("ruled out", "unruly", "ruled"):
        for _ in range(3):
            workflow.add_task(task(batch_size=100, batch_timeout=0.1)(count), {"value": 1}, name)
    sizes = [outputs["result"] for outputs in workflow.run().result(timeout=WAIT_S).values()]
    # Without the rule, all nine would have met.
    assert sizes == [3] * 9


def test_an_item_that_is_cancelled_leaves_its_batch(client: LatticeClient) -> None:
    run = batched(client, count, [1, 2, 3], batch_size=100, batch_timeout=1.0)
    run.cancel_task("count-2")
    assert outcomes(run) == {"count": 2, "count-2": "CANCELLED", "count-3": 2}


def test_a_running_batch_continues_when_an_item_is_cancelled(client: LatticeClient, room: Room) -> None:
    def meet(value: list[str]) -> list[int]:
        from tests.e2e.rooms import enter

        enter(value[0], "batch")
        return [len(value)] * len(value)

    run = batched(client, meet, [str(room)] * 3)
    started(run, "meet", "meet-2", "meet-3")
    run.cancel_task("meet-2")
    until(run, "task_cancelled", "meet-2")
    room.open()
    assert outcomes(run) == {"meet": 3, "meet-2": "CANCELLED", "meet-3": 3}


def test_a_batch_is_stopped_when_its_run_is_cancelled(client: LatticeClient, room: Room) -> None:
    def meet(value: list[str]) -> list[int]:
        from tests.e2e.rooms import enter

        enter(value[0], "batch")
        return [1] * len(value)

    run = batched(client, meet, [str(room)] * 3)
    entered(run, "meet")
    run.cancel()
    assert set(outcomes(run).values()) == {"CANCELLED"}
    assert room.notes() == ["+batch"]


def test_a_map_is_run_in_batches(client: LatticeClient) -> None:
    @task
    def numbers(n: int) -> list[int]:
        return list(range(n))

    workflow = client.create_workflow()
    source = workflow.add_task(numbers, {"n": 25})
    workflow.map(task(batch_size=10, batch_timeout=0.1)(count), source.output)
    assert workflow.run().result(timeout=WAIT_S) == {"result": [10] * 20 + [5] * 5}
