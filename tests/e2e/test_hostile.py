"""Hostile functions through a server, in every form a task can have: runs end, and the node is whole afterwards."""

import random
from typing import Any

import pytest
from lattice.v1 import run_pb2

from lattice_client import LatticeClient, TaskFailedError, task
from tests.e2e.rooms import WAIT_S
from tests.examples import SEED, share
from tests.hostile import Plan, act, act_async, act_each, is_expected, plan_of

TIMEOUT_S = 5.0
ROUND = 5
CALM = 25


@task
def give(value: Any) -> Any:
    return value


@task
def calm(number: int) -> int:
    return number


process = task(timeout=TIMEOUT_S, name="process")(act)
coroutine = task(timeout=TIMEOUT_S, name="coroutine")(act_async)
batch = task(timeout=TIMEOUT_S, batch_size=3, batch_timeout=0.05, name="batch")(act_each)
item = task(timeout=TIMEOUT_S, name="item")(act)


def check_round(client: LatticeClient, plans: list[Plan]) -> None:
    """Run plans in all forms; assert that every task ends, as expected unless it shares its process."""
    workflow = client.create_workflow(failure_policy="finish_independent")
    alone = {workflow.add_task(process, {"plan": plan}).task_id: plan for plan in plans}
    for plan in plans:
        workflow.add_task(coroutine, {"plan": plan})
        workflow.add_task(batch, {"plan": plan})
    workflow.map(item, {"plan": workflow.add_task(give, {"value": plans}).output})
    run = workflow.run()
    for _ in run.events(timeout=WAIT_S * 2):
        pass
    ended = {"SUCCEEDED", "FAILED", "CANCELLED", "SKIPPED"}
    states = {found.task_id: found.state for found in client.list_tasks(run)}
    names = {task_id: run_pb2.TaskState.Name(state).removeprefix("TASK_STATE_") for task_id, state in states.items()}
    assert set(names.values()) <= ended, names
    items = {f"item[{number}]": plan for number, plan in enumerate(plans)}
    for task_id, plan in (alone | items).items():
        try:
            kind, value = "", run.output(task_id)
        except TaskFailedError as error:
            kind, value = error.kind, None
        assert is_expected(plan, kind, value), (task_id, plan, kind, value)


def check_whole(client: LatticeClient) -> None:
    """Assert that all resources of the node are free, and that plain tasks succeed on it."""
    workflow = client.create_workflow()
    for number in range(CALM):
        workflow.add_task(calm, {"number": number})
    results = workflow.run().result(timeout=WAIT_S)
    assert sorted(found["result"] for found in results.values()) == list(range(CALM))
    (node,) = client.nodes()
    assert node.free == node.capacity


@pytest.mark.timeout(600)
def test_a_run_of_hostile_functions_ends_and_frees_the_node(local: str) -> None:
    print(f"LATTICE_SEED={SEED}")
    choice = random.Random(SEED)
    with LatticeClient(local) as client:
        for _ in range(max(1, share(300) // ROUND)):
            check_round(client, [plan_of(choice) for _ in range(ROUND)])
            check_whole(client)
