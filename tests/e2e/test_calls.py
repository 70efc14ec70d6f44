"""Calls of tasks by tasks, from the Python client."""

import asyncio
from typing import Any

import pytest

from lattice_client import LatticeClient, TaskFailedError, context, task
from tests.e2e.conftest import served

LEVELS = ["none", "subprocess", "seccomp"]


@task
def double(x: int) -> int:
    return 2 * x


@task
def both(x: int) -> dict[str, int]:
    return {"x": x}


@task(outputs=["low", "high"])
def bounds(x: int) -> Any:
    return {"low": x - 1, "high": x + 1}


@task
def broken(x: int) -> int:
    raise LookupError(f"no {x}")


@task
def parent(x: int) -> int:
    calls = [context.call(double, {"x": x + number}) for number in range(3)]
    return sum(call.result() for call in calls)


@task
async def parent_coroutine(x: int) -> int:
    return sum(await asyncio.gather(*(context.call(double, {"x": x + number}) for number in range(3))))


@task
def depth(n: int) -> int:
    return 0 if n == 0 else 1 + context.call(depth, {"n": n - 1}).result()


@task(timeout=30)
def forker() -> list[str]:
    import os

    earlier = context.call(double, {"x": 1})
    uses = [
        lambda: context.call(double, {"x": 2}),
        lambda: context.spawn(double, {"x": 3}),
        lambda: context.wait_for("go"),
        lambda: context.ask("what"),
        earlier.result,
    ]
    found = []
    for use in uses:
        read, write = os.pipe()
        if not os.fork():
            try:
                use()
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as said:
            found.append(said.read())
    return [*found, str(earlier.result())]


def test_four_parents_with_three_calls_each_finish_on_two_cpus() -> None:
    with served("--executor", "local", "--num-cpus", "2") as address, LatticeClient(address) as client:
        workflow = client.create_workflow()
        for number in range(4):
            workflow.add_task(parent, {"x": number}, task_id=f"p{number}")
        results = workflow.run().result(timeout=60)
        assert {name: found["result"] for name, found in results.items()} == {f"p{n}": 6 * n + 6 for n in range(4)}
        assert client.run_task(depth, {"n": 10}) == {"result": 10}
        assert client.run_task(parent_coroutine, {"x": 1}) == {"result": 12}


@pytest.mark.parametrize("level", LEVELS)
def test_a_call_returns_values_of_every_size_at_every_level(local: str, level: str) -> None:
    @task
    def large() -> bytes:
        return b"x" * 1_000_000

    @task(isolation=level)
    def calls() -> Any:
        found = context.call(both, {"x": 1}).result(), context.call(bounds, {"x": 1}).result()
        return *found, len(context.call(large).result()), context.call(lambda x: x + 1, {"x": 1}).result()

    with LatticeClient(local) as client:
        assert client.run_task(calls) == {"result": ({"x": 1}, {"low": 0, "high": 2}, 1_000_000, 2)}


def test_a_call_that_fails_raises_in_the_caller_which_may_go_on(local: str) -> None:
    @task
    def catches() -> Any:
        try:
            context.call(broken, {"x": 1}).result()
        except context.CallError as error:
            return [error.kind, error.type, error.task_id, str(error)]

    @task
    def passes_on() -> Any:
        return context.call(broken, {"x": 2}).result()

    with LatticeClient(local) as client:
        text = "task 'catches/broken' failed (USER_ERROR): LookupError: no 1"
        assert client.run_task(catches) == {"result": ["USER_ERROR", "LookupError", "catches/broken", text]}
        with pytest.raises(TaskFailedError, match=r"'passes_on/broken' failed \(USER_ERROR\): LookupError: no 2"):
            client.run_task(passes_on)


def test_a_failure_that_calls_pass_on_is_told_once(local: str) -> None:
    @task
    def descends(n: int) -> Any:
        return context.call(descends if n else broken, {"n": n - 1} if n else {"x": 0}).result()

    with LatticeClient(local) as client, pytest.raises(TaskFailedError) as raised:
        client.run_task(descends, {"n": 3})
    assert str(raised.value.__cause__) == (
        "task 'descends/descends/descends/descends/broken' failed (USER_ERROR): LookupError: no 0"
    )


def test_calls_stand_where_asyncio_takes_coroutines(local: str) -> None:
    @task
    async def waits() -> Any:
        calls = [context.call(double, {"x": number}) for number in range(4)]
        async with asyncio.TaskGroup() as group:
            first = group.create_task(calls[0])
        second = await asyncio.create_task(calls[1])
        third = await asyncio.wait_for(calls[2], 30)
        return [first.result(), second, third, await asyncio.wait_for(calls[2], 30), await next(iter([calls[3]]))]

    with LatticeClient(local) as client:
        assert client.run_task(waits) == {"result": [0, 2, 4, 4, 6]}


def test_a_task_may_return_a_call(local: str) -> None:
    @task
    def returns_call() -> Any:
        return context.call(double, {"x": 4})

    @task
    async def returns_call_async() -> Any:
        return context.call(double, {"x": 5})

    with LatticeClient(local) as client:
        assert client.run_task(returns_call) == {"result": 8}
        assert client.run_task(returns_call_async) == {"result": 10}


def test_called_tasks_are_cancelled_with_their_caller(local: str) -> None:
    @task
    def sleeps() -> None:
        import time

        time.sleep(600)

    @task
    def waits() -> None:
        context.call(sleeps).result()

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        waiting = workflow.add_task(waits)
        run = workflow.run()
        for event in run.events(timeout=60):
            if event.type == "task_started" and event.task_id == "waits/sleeps":
                run.cancel_task(waiting)
        states = {found.task_id: found.state for found in client.list_tasks(run)}
        assert len(set(states.values())) == 1, states
        assert run.status() in {"cancelled", "failed"}


def test_a_call_that_can_never_start_fails_at_once(local: str) -> None:
    @task(gpu=2)
    def inner() -> int:
        return 1

    @task(gpu=1)
    def outer() -> Any:
        try:
            return context.call(inner).result()
        except context.CallError as error:
            return [error.kind, str(error)]

    with LatticeClient(local) as client:
        kind, text = client.run_task(outer)["result"]
        assert kind == "NESTED_RESOURCES"
        assert "gpu that it needs is held by 'outer'" in text


def test_calls_spawns_and_waits_are_refused_in_a_forked_child(client: LatticeClient) -> None:
    refused = "RuntimeError: there is no task running here; this works inside tasks, and not in processes they fork"
    assert client.run_task(forker, {}) == {"result": [refused] * 5 + ["2"]}
