"""Runs that grow or branch: maps, conditions, optional inputs, tasks that are added and spawned."""

from typing import Any

import pytest

from lattice_client import LatticeClient, Run, RunError, TaskDefinitionError, TaskFailedError, task
from tests.e2e.rooms import WAIT_S, Room, enter, started


@task
def give(value: Any) -> Any:
    return value


@task
def add(a: int, b: int = 1) -> int:
    return a + b


@task
def total(values: list[Any]) -> int:
    return sum(value or 0 for value in values)


@task
def split(n: int) -> list[int]:
    return list(range(n))


@task(inputs=["x"], outputs=["low", "high"])
def around(params: dict[str, int]) -> dict[str, int]:
    return {"low": params["x"] - 1, "high": params["x"] + 1}


@task
def fail(value: Any = None) -> Any:
    raise LookupError("a reason")


@task
def parse(n: int, bad: list[int]) -> str:
    if n in bad:
        raise ValueError(f"page {n} cannot be read")
    return f"page {n}"


@task
def wait(room: str) -> str:
    enter(room, "wait")
    return "waited"


def states(run: Run) -> dict[str, str]:
    """Return how each task of a run ended."""
    events = [event for event in run.events(timeout=WAIT_S) if event.task_id]
    return {event.task_id: event.type.removeprefix("task_") for event in events}


# Maps.


@pytest.mark.parametrize("n", [0, 1, 7, 300])
def test_a_map_is_as_long_as_the_list(client: LatticeClient, n: int) -> None:
    workflow = client.create_workflow()
    source = workflow.add_task(split, {"n": n})
    mapped = workflow.map(add, source.output, {"b": 10})
    workflow.add_task(total, {"values": mapped.output})
    assert workflow.run().result(timeout=WAIT_S) == {"result": sum(range(10, 10 + n))}


@pytest.mark.parametrize("n", [0, 3])
def test_a_final_map_gives_lists(client: LatticeClient, n: int) -> None:
    workflow = client.create_workflow()
    source = workflow.add_task(split, {"n": n})
    workflow.map(around, source.output)
    run = workflow.run()
    assert run.result(timeout=WAIT_S) == {"low": [x - 1 for x in range(n)], "high": [x + 1 for x in range(n)]}
    assert run.status() == "succeeded"
    mapped = client.list_tasks(run)[1]
    assert mapped.item_count == n
    items = [found for found in client.list_tasks(run) if found.parent_task_id]
    assert [found.task_id for found in items] == [f"around[{x}]" for x in range(n)]


@pytest.mark.parametrize("n", [0, 4])
def test_a_map_over_a_map_goes_item_by_item(client: LatticeClient, n: int) -> None:
    workflow = client.create_workflow()
    source = workflow.add_task(split, {"n": n})
    first = workflow.map(around, source.output)
    second = workflow.map(add, {"b": first.outputs["high"]}, {"a": 100})
    workflow.add_task(total, {"values": second.output})
    workflow.add_task(give, {"value": {"lows": first.outputs["low"], "highs": [first.outputs["high"]]}})
    expected = {"lows": [x - 1 for x in range(n)], "highs": [[x + 1 for x in range(n)]]}
    assert workflow.run().result(timeout=WAIT_S) == {
        "total": {"result": sum(x + 101 for x in range(n))},
        "give": {"result": expected},
    }


def test_items_may_be_large_or_no_json(client: LatticeClient) -> None:
    @task
    def make() -> list[Any]:
        return [b"x" * 400_000, {1, 2}, "y" * 300_000, None]

    @task
    def measure(value: Any) -> int:
        return 0 if value is None else len(value)

    workflow = client.create_workflow()
    source = workflow.add_task(make)
    mapped = workflow.map(measure, source.output)
    workflow.map(give, source.output)
    workflow.add_task(total, {"values": mapped.output})
    results = workflow.run().result(timeout=WAIT_S)
    assert results["total"] == {"result": 700_002}
    assert results["give"]["result"] == [b"x" * 400_000, {1, 2}, "y" * 300_000, None]


@pytest.mark.parametrize("value", ["text", {"a": 1}, 3, None])
def test_only_a_list_can_be_mapped_over(client: LatticeClient, value: Any) -> None:
    workflow = client.create_workflow()
    workflow.map(add, workflow.add_task(give, {"value": value}).output)
    with pytest.raises(TaskFailedError, match="is mapped over and must be a list; it is of type ") as caught:
        workflow.run().result(timeout=WAIT_S)
    assert caught.value.kind == "PAYLOAD"


def test_an_item_that_fails_fails_the_map_when_the_others_have_ended(client: LatticeClient) -> None:
    @task
    def invert(x: int) -> float:
        return 1 / x

    workflow = client.create_workflow(failure_policy="finish_independent")
    mapped = workflow.map(invert, workflow.add_task(split, {"n": 3}).output)
    workflow.add_task(total, {"values": mapped.output})
    run = workflow.run()
    found = states(run)
    assert found["invert[0]"] == found["invert"] == "failed"
    assert found["invert[1]"] == found["invert[2]"] == "succeeded"
    assert found["total"] == "skipped"
    with pytest.raises(TaskFailedError, match="division by zero") as caught:
        run.result(timeout=WAIT_S)
    assert caught.value.task_id == "invert[0]"


def test_a_map_that_waits_runs_or_is_cancelled(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    mapped = workflow.map(wait, workflow.add_task(give, {"value": [room] * 6}).output)
    aside = workflow.add_task(give, {"value": 1})
    run = workflow.run()
    started(run, "wait[0]", "wait[1]", "wait[2]", "wait[3]")
    assert "6 of its 6 items have not ended" in run.explain(mapped).reasons[0].message
    run.cancel_task(mapped)
    found = states(run)
    assert {state for task_id, state in found.items() if task_id.startswith("wait")} == {"cancelled"}
    assert found[aside.task_id] == "succeeded"
    assert not any(line.startswith("-") for line in room.notes())


def test_an_invalid_map_is_refused_before_it_is_sent(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    source = workflow.add_task(split, {"n": 1})
    with pytest.raises(TaskDefinitionError, match="for a list that is known now, add a task for each item"):
        workflow.map(add, {"a": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(TaskDefinitionError, match="has no input left for an item"):
        workflow.map(add, source.output, {"a": 1, "b": 2})
    with pytest.raises(TaskDefinitionError, match="exactly one output"):
        workflow.map(add, {"a": source.output, "b": source.output})
    with pytest.raises(TaskDefinitionError, match="has no input 'c'"):
        workflow.map(add, {"c": source.output}, {"a": 1})


# Branches.

TRUE: tuple[Any, ...] = (True, 1, "no", [0], {"a": None})
FALSE: tuple[Any, ...] = (False, 0, "", [], {}, None, 0.0)


@pytest.mark.parametrize(
    ("value", "is_true"), [*((value, True) for value in TRUE), *((value, False) for value in FALSE)]
)
def test_a_task_runs_when_an_output_is_true_and_another_one_unless(
    client: LatticeClient, value: Any, is_true: bool
) -> None:
    workflow = client.create_workflow()
    decision = workflow.add_task(give, {"value": value})
    workflow.add_task(add, {"a": 1}, when=decision.output)
    workflow.add_task(add, {"a": 2}, unless=decision.output)
    run = workflow.run()
    chosen, other = ({"result": 2}, None) if value in TRUE else (None, {"result": 3})
    assert run.result(timeout=WAIT_S) == {"add": chosen, "add-2": other}
    assert run.status() == "succeeded"


@pytest.mark.parametrize("value", ["small", "large", "huge"])
def test_a_condition_by_value_skips_the_other_branches_and_their_dependents(client: LatticeClient, value: str) -> None:
    workflow = client.create_workflow()
    choice = workflow.add_task(give, {"value": value})
    for name, number in (("small", 1), ("large", 10)):
        branch = workflow.add_task(give, {"value": number}, name, when=choice.output, equals=name)
        workflow.add_task(add, {"a": branch.output}, name)
    workflow.add_task(add, {"a": 100}, unless=choice.output, equals="small")
    run = workflow.run()
    found = states(run)
    assert [found[task_id] for task_id in ("give-2", "add")] == ["succeeded" if value == "small" else "skipped"] * 2
    assert [found[task_id] for task_id in ("give-3", "add-2")] == ["succeeded" if value == "large" else "skipped"] * 2
    assert found["add-3"] == ("skipped" if value == "small" else "succeeded")
    assert run.status() == "succeeded"


def test_branches_join_in_a_task_with_optional_inputs(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    decision = workflow.add_task(give, {"value": False})
    left = workflow.add_task(add, {"a": 1}, when=decision.output)
    right = workflow.add_task(add, {"a": 2}, unless=decision.output)
    further = workflow.add_task(add, {"a": left.output})
    gathered = [left.output.optional(), right.output.optional(), further.output.optional()]
    workflow.add_task(give, {"value": gathered})
    assert workflow.run().result(timeout=WAIT_S) == {"result": [None, 3, None]}


def test_an_optional_input_is_none_when_its_task_failed(client: LatticeClient) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    failed, fine = workflow.add_task(fail), workflow.add_task(add, {"a": 1})
    workflow.add_task(give, {"value": {"failed": failed.output.optional(), "fine": fine.output.optional()}})
    run = workflow.run()
    ended = {event.task_id: event.data for event in run.events(timeout=WAIT_S) if event.type == "task_succeeded"}
    assert ended["give"]["outputs"] == {"result": {"failed": None, "fine": 2}}
    assert run.status() == "failed"


@pytest.mark.parametrize("bad", [(1,), (0, 1, 2)])
def test_an_optional_map_gives_none_in_the_place_of_each_item_that_failed(
    client: LatticeClient, bad: tuple[int, ...]
) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    parsed = workflow.map(parse, workflow.add_task(split, {"n": 3}).output, inputs={"bad": list(bad)})
    workflow.add_task(give, {"value": parsed.output.optional()})
    run = workflow.run()
    ended = {event.task_id: event.data for event in run.events(timeout=WAIT_S) if event.type == "task_succeeded"}
    assert ended["give"]["outputs"] == {"result": [None if n in bad else f"page {n}" for n in range(3)]}
    assert run.status() == "failed"


def test_a_condition_fails_when_its_output_is_not_json(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    decision = workflow.add_task(give, {"value": {1, 2}})
    workflow.add_task(add, {"a": 1}, when=decision.output)
    with pytest.raises(TaskFailedError, match="is not JSON"):
        workflow.run().result(timeout=WAIT_S)
    workflow.add_task(add, {"a": 1}, when=decision.output, equals={1, 2})
    with pytest.raises(TaskDefinitionError, match="must be a value of JSON"):
        workflow.run()


def test_a_condition_may_be_a_map(client: LatticeClient) -> None:
    for n in (0, 2):
        workflow = client.create_workflow()
        mapped = workflow.map(add, workflow.add_task(split, {"n": n}).output)
        workflow.add_task(give, {"value": "some"}, when=mapped.output)
        workflow.add_task(give, {"value": "none"}, unless=mapped.output)
        some, none = ({"result": "some"}, None) if n else (None, {"result": "none"})
        assert workflow.run().result(timeout=WAIT_S) == {"give": some, "give-2": none}


# Parts of outputs.


@task
def answer(large: bool = False) -> dict[str, Any]:
    return {"choices": [{"text": "no"}, {"text": "yes" * (100_000 if large else 1)}], "is_final": True}


@task
def answer_pickled() -> dict[str, Any]:
    return {"choices": [{"text": "no"}, {"text": "yes"}], "seen": {1, 2}}


@pytest.mark.parametrize("kind", ["json", "large", "pickle"])
def test_tasks_are_given_parts_of_outputs(client: LatticeClient, kind: str) -> None:
    workflow = client.create_workflow()
    made = (
        workflow.add_task(answer_pickled) if kind == "pickle" else workflow.add_task(answer, {"large": kind == "large"})
    )
    first = workflow.add_task(give, {"value": made.output["choices"][-1]["text"]})
    workflow.add_task(give, {"value": {"parts": [made.output["choices"][0], first.output]}})
    run = workflow.run()
    wanted = "yes" * (100_000 if kind == "large" else 1)
    assert run.result(timeout=WAIT_S) == {"result": {"parts": [{"text": "no"}, wanted]}}
    assert run.output(made.output["choices"][0]["text"]) == "no"
    with pytest.raises(RunError, match="there is no 'gone' in a dict"):
        run.output(made.output["gone"])


def test_a_task_fails_when_an_output_lacks_the_selected_part(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    made = workflow.add_task(answer)
    workflow.add_task(give, {"value": made.output["choices"][7]})
    with pytest.raises(
        TaskFailedError, match=r"no part \['choices'\]\[7\]: its part \['choices'\] is a list of 2"
    ) as caught:
        workflow.run().result(timeout=WAIT_S)
    assert caught.value.kind == "PAYLOAD"


def test_a_condition_selects_a_part(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    made = workflow.add_task(answer)
    workflow.add_task(give, {"value": 1}, task_id="then", when=made.output["is_final"])
    workflow.add_task(give, {"value": 2}, task_id="else", unless=made.output["choices"][0]["text"], equals="no")
    assert states(workflow.run()) == {"answer": "succeeded", "then": "succeeded", "else": "skipped"}
