"""How much at once and how long: parallel calls, server limits, admission, memory, time limits."""

import concurrent.futures
import time
from typing import Any

import pytest
from lattice.v1 import run_pb2, task_pb2

from lattice_client import LatticeClient, ResourceExhaustedError, Run, RunTimeoutError, TaskFailedError, task
from tests.e2e.rooms import WAIT_S, Room, enter, entered, started

MIB = 2**20


@task(cpu=0.1, max_parallel=2)
def two(room: str, name: str) -> str:
    enter(room, name)
    return name


def ask(room: str, name: str) -> str:
    enter(room, name)
    return name


async def ask_aside(room: str, name: str) -> str:
    return ask(room, name)


def waits_for_a_limit(run: Run, task_id: str) -> str:
    """Return the message of the limit that the task waits for; empty when there is none."""
    kinds = {reason.kind: reason.message for reason in run.explain(task_id).reasons}
    return kinds.get(task_pb2.WAIT_KIND_LIMIT, "")


def test_a_function_runs_no_more_calls_than_its_limit(client: LatticeClient, room: Room) -> None:
    runs = []
    for _ in range(2):
        workflow = client.create_workflow()
        for _ in range(3):
            workflow.add_task(two, {"room": room, "name": "call"})
        runs.append(workflow.run())
    entered(runs[0], "two", "two-2")
    for run, task_id in ((runs[0], "two-3"), (runs[1], "two"), (runs[1], "two-3")):
        assert waits_for_a_limit(run, task_id).endswith("run, the limit is 2")
    assert client.run_task(number, {"value": 1}) == {"result": 1}
    room.open()
    for run in runs:
        assert len(run.result(timeout=WAIT_S)) == 3
    assert room.crowd() == 2
    assert len(room.notes()) == 12


@pytest.mark.parametrize(("key", "settings"), [("one-api", {"max_parallel": 1}), ("two-at-once", {})])
def test_functions_share_a_limit_by_name(
    address: str, client: LatticeClient, room: Room, key: str, settings: dict[str, Any]
) -> None:
    limit = 1 if settings else 2
    kinds = [task(cpu=0, concurrency_key=key, **settings)(function) for function in (ask, ask_aside, two.function)]
    with LatticeClient(address, tenant="another") as another:
        runs = []
        for caller in (client, another):
            workflow = caller.create_workflow()
            for kind in kinds:
                workflow.add_task(kind, {"room": room, "name": "call"})
            runs.append(workflow.run())
        started(runs[0], "ask", *(["ask_aside"] if limit == 2 else []))
        assert waits_for_a_limit(runs[1], "two") == f"{limit} calls of {key!r} run, the limit is {limit}"
        room.open()
        for run in runs:
            assert len(run.result(timeout=WAIT_S)) == 3
    assert room.crowd() <= limit
    assert len(room.notes()) == 12


@task(cpu=0)
def number(value: Any) -> int:
    return 1


def _filled(client: LatticeClient, room: Room) -> Run:
    """Return a run that is as much as the server takes, and that waits."""
    workflow = client.create_workflow()
    gate = workflow.add_task(task(cpu=0)(ask), {"room": room, "name": "gate"})
    for _ in range(1999):
        workflow.add_task(number, {"value": gate.output})
    return workflow.run()


def test_the_client_retries_when_the_server_is_full(address: str, client: LatticeClient, room: Room) -> None:
    full = _filled(client, room)
    with LatticeClient(address, admission_timeout=0.0) as hasty:
        workflow = hasty.create_workflow()
        workflow.add_task(number, {"value": 1})
        with pytest.raises(ResourceExhaustedError, match="2000 tasks are open") as caught:
            workflow.run()
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s
        with pytest.raises(ResourceExhaustedError):
            hasty.run_task(number, {"value": 1})
        with pytest.raises(ResourceExhaustedError):
            hasty.get_run(full).add_tasks([workflow.tasks["number"]])
    workflow = client.create_workflow()
    workflow.add_task(number, {"value": 1})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        patient = pool.submit(workflow.run)
        with pytest.raises(concurrent.futures.TimeoutError):
            patient.result(timeout=0.2)
        full.cancel()
        assert patient.result(timeout=WAIT_S).result(timeout=WAIT_S) == {"result": 1}


def allocate(mebibytes: int) -> int:
    return len(bytearray(mebibytes * MIB))


def allocate_in_numpy(mebibytes: int) -> int:
    import numpy

    return int(numpy.ones(mebibytes * MIB, dtype=numpy.uint8).nbytes)


def give_back_too_much(mebibytes: int) -> list[str]:
    # The list fits; its items as messages do not.
    return ["x" * MIB] * mebibytes


def test_memory_of_async_tasks_is_counted_and_not_bounded(client: LatticeClient) -> None:
    @task(cpu_mem=64)
    async def hoard(mebibytes: int) -> int:
        return len(bytearray(mebibytes * 2**20))

    assert client.run_task(hoard, {"mebibytes": 300}) == {"result": 300 * MIB}


@pytest.mark.parametrize("function", [allocate, allocate_in_numpy, give_back_too_much])
def test_a_task_that_takes_far_more_memory_fails_alone(client: LatticeClient, room: Room, function: Any) -> None:
    workers = [node.worker_pid for node in client.nodes()]
    workflow = client.create_workflow()
    workflow.add_task(ask, {"room": room, "name": "neighbour"})
    neighbour = workflow.run()
    started(neighbour, "ask")
    bounded = task(cpu_mem=64)(function)
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(bounded, {"mebibytes": 1000})
    assert caught.value.kind == "OUT_OF_MEMORY"
    assert client.run_task(task(cpu_mem=64)(allocate), {"mebibytes": 32}) == {"result": 32 * MIB}
    # Nothing of the limit is left in the process that had it.
    assert client.run_task(task(allocate), {"mebibytes": 500}) == {"result": 500 * MIB}
    room.open()
    assert neighbour.result(timeout=WAIT_S) == {"result": "neighbour"}
    assert [node.worker_pid for node in client.nodes()] == workers


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


async def sleep_aside(seconds: float) -> float:
    import asyncio

    await asyncio.sleep(seconds)
    return seconds


@pytest.mark.parametrize("function", [sleep, sleep_aside])
def test_an_attempt_fails_when_its_time_limit_is_over(client: LatticeClient, function: Any) -> None:
    hasty = task(timeout=1.0)(function)
    with pytest.raises(TaskFailedError, match=r"ran longer than 1 s") as caught:
        client.run_task(hasty, {"seconds": 60})
    assert caught.value.kind == "TIMEOUT"
    assert client.run_task(hasty, {"seconds": 0}) == {"result": 0}


def test_a_task_fails_when_its_total_time_is_over_in_any_state(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    holder = workflow.add_task(task(cpu=2)(ask), {"room": room, "name": "holder"})
    run = workflow.run()
    started(run, holder.task_id)

    @task(cpu=0, total_timeout=0.5, retries=1000, retry_backoff=0.05)
    def stumble() -> None:
        raise LookupError("always")

    late = client.create_workflow(failure_policy="finish_independent")
    late.add_task(task(cpu=4, total_timeout=0.3)(sleep), {"seconds": 0}, "waits")
    late.add_task(task(cpu=0, total_timeout=0.3)(sleep), {"seconds": 60}, "runs")
    late.add_task(stumble)
    ended = late.run()
    failures = {e.task_id: e.data["failure"] for e in ended.events(timeout=WAIT_S) if e.type == "task_failed"}
    assert {task_id: failure["kind"] for task_id, failure in failures.items()} == {
        "sleep": "TIMEOUT",
        "sleep-2": "TIMEOUT",
        "stumble": "TIMEOUT",
    }
    assert failures["sleep"]["message"] == "the task took longer than 0.3 s in all"
    room.open()
    run.result(timeout=WAIT_S)


def test_a_run_fails_when_its_time_limit_is_over(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(sleep, {"seconds": 60})
    workflow.add_task(sleep, {"seconds": first.output})
    run = workflow.run(timeout=0.5)
    with pytest.raises(RunTimeoutError, match=r"took longer than 0\.5 s"):
        run.result(timeout=WAIT_S)
    assert run.status() == "failed"
    states = [found.state for found in client.list_tasks(run)]
    assert states == [run_pb2.TASK_STATE_CANCELLED, run_pb2.TASK_STATE_SKIPPED]
