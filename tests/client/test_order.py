"""The order of outputs, of inputs by any name, and of `params`, which the contract sends as maps."""

from typing import Any

import pytest

from lattice_client import LatticeClient, task

NAMES = ["z", "b", "a", "y", "m", "c", "x"]
TIMEOUT_S = 60


def parts(**parts: Any) -> list[str]:
    return list(parts)


def of_params(params: dict[str, Any]) -> list[str]:
    return list(params)


def several(n: int = 0) -> dict[str, int]:
    return {**dict.fromkeys(sorted(NAMES), n), "more": n, "extra": n}


declared = task(outputs=NAMES)(several)


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], sorted(NAMES)])
@pytest.mark.parametrize("function", [parts, of_params, task(inputs=NAMES)(of_params)])
def test_inputs_of_any_name_come_by_name(client: LatticeClient, function: Any, names: list[str]) -> None:
    assert client.run_task(function, dict.fromkeys(names, 0)) == {"result": sorted(NAMES)}


def test_members_of_a_batch_have_their_inputs_by_name(client: LatticeClient) -> None:
    @task(batch_size=2)
    def batched(**parts: Any) -> list[list[str]]:
        return [list(parts)] * len(parts["z"])

    assert client.run_task(batched, dict.fromkeys(NAMES, 0)) == {"result": sorted(NAMES)}


def test_outputs_are_in_declared_order_and_others_by_name(client: LatticeClient) -> None:
    expected = [*NAMES, "extra", "more"]
    assert list(client.run_task(declared)) == expected
    workflow = client.create_workflow()
    first = workflow.add_task(declared, {"n": 1})
    mapped = workflow.map(declared, workflow.add_task(task(lambda: [1, 2])).output, task_id="mapped")
    run = workflow.run()
    results = run.result(timeout=TIMEOUT_S)
    assert [list(results[name]) for name in ("several", "mapped")] == [expected, expected]
    assert list(run.output(first)) == list(run.output("several")) == list(run.output(mapped)) == expected
    told = {event.task_id: list(event.data["outputs"]) for event in run.events() if event.type == "task_succeeded"}
    assert told["several"] == told["mapped[0]"] == expected
    messages = workflow.get_results(run, verbose=False)
    finished = [found["data"] for found in messages if found["type"] == "finish_task"]
    assert [list(found["result"]) for found in finished if found["task_id"] == "several"] == [expected]


def test_outputs_are_ordered_by_name_when_the_declaration_is_unknown(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(declared)
    run = client.get_run(str(workflow.run()))
    assert list(run.result(timeout=TIMEOUT_S)) == sorted([*NAMES, "more", "extra"])


def test_outputs_of_an_added_task_are_in_declared_order(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(declared)
    run = workflow.run()
    run.twin.note_added([client.create_workflow().add_task(declared, task_id="later")])
    assert list(run.declared["later"]) == list(run.declared["several"]) == NAMES


def test_output_returns_one_output_when_it_is_given_an_output(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(declared, {"n": 7})
    single = workflow.add_task(task(parts), {"k": first.outputs["z"]})
    run = workflow.run()
    assert run.output(first.outputs["z"], timeout=TIMEOUT_S) == 7
    assert run.output(single.output, timeout=TIMEOUT_S) == ["k"]
