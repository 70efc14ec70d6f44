"""The asyncio client and the synchronous client return the same results of a run."""

import asyncio

import pytest

from lattice_client import AsyncLatticeClient, LatticeClient, NotFoundError, task
from lattice_client.client import AsyncLatticeWorkflow


@task
def half(n: int) -> float:
    return n / 2


@task
def broken(x: float) -> None:
    raise ValueError("no good")


@task
async def number(n: int) -> int:
    return n


@task
async def endless() -> None:
    await asyncio.Event().wait()


def test_both_clients_return_and_print_the_same_messages(
    client: LatticeClient, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workflow = client.create_workflow()
    workflow.add_task(broken, {"x": workflow.add_task(half, {"n": 3}).output})
    run_id = workflow.run()
    expected = workflow.get_results(run_id, timeout=60)
    assert [message["type"] for message in expected] == [
        "start_task",
        "finish_task",
        "start_task",
        "task_exception",
        "finish_workflow",
    ]
    assert expected[1]["data"]["result"] == {"result": 1.5}
    printed = capsys.readouterr().out
    assert printed == "".join(f"{message}\n" for message in expected)

    async def twin() -> None:
        async with AsyncLatticeClient(address) as connected:
            twin = connected.create_workflow()
            assert await twin.get_results(run_id, timeout=60) == expected
            assert capsys.readouterr().out == printed
            assert await twin.get_results(run_id, verbose=False) == expected
            assert capsys.readouterr().out == ""

    asyncio.run(twin())


def test_both_clients_raise_at_the_timeout_while_the_run_continues(client: LatticeClient, address: str) -> None:
    workflow = client.create_workflow()
    workflow.add_task(endless)
    run = workflow.run()
    with pytest.raises(TimeoutError):
        workflow.get_results(run, verbose=False, timeout=0.01)

    async def twin() -> None:
        async with AsyncLatticeClient(address) as connected:
            with pytest.raises(TimeoutError):
                await AsyncLatticeWorkflow(connected).get_results(run, verbose=False, timeout=0.01)

    asyncio.run(twin())
    assert run.status() == "running"
    run.cancel()


def test_the_tasks_of_a_run_are_listed_in_order_however_many(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    ids = [workflow.add_task(number, {"n": n}).task_id for n in range(150)]
    run = workflow.run()
    run.result(timeout=60)
    assert [found.task_id for found in client.list_tasks(run)] == ids
    with pytest.raises(NotFoundError):
        client.list_tasks("nowhere")
