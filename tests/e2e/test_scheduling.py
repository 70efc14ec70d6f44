"""Placement and order: devices, labels, impossible tasks, priorities, fair shares, explanations."""

import os
import time
from typing import Any

import pytest
from lattice.v1 import resources_pb2, task_pb2

from lattice_client import LatticeClient, PreconditionError, Run, task
from tests.client.shell import call
from tests.e2e.conftest import OFFERS, served
from tests.e2e.rooms import WAIT_S, Room, enter, note, started, until


@task
def devices(room: str = "", name: str = "") -> str:
    if room:
        enter(room, name)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def using(function: Any = devices, **settings: Any) -> Any:
    """Return a task as it is, but for its settings."""
    return task(**settings)(function.function)


def together(client: LatticeClient, room: Room, *wanted: dict[str, Any]) -> list[str]:
    """Return the devices of tasks that ran at the same time."""
    workflow = client.create_workflow()
    tasks = [workflow.add_task(using(**settings), {"room": room, "name": str(settings)}) for settings in wanted]
    run = workflow.run()
    started(run, *(member.task_id for member in tasks))
    room.open()
    results = run.result(timeout=WAIT_S)
    return [results[member.task_id]["result"] for member in tasks]


def reasons(run: Run, task_id: str) -> dict[str, task_pb2.WaitReason]:
    """Return why a task waits, by class."""
    found = run.explain(task_id).reasons
    return {task_pb2.WaitKind.Name(reason.kind).removeprefix("WAIT_KIND_"): reason for reason in found}


@pytest.mark.parametrize(
    ("settings", "visible"), [({}, {""}), ({"gpu": 1}, {"0", "1"}), ({"gpu": 0.5}, {"0", "1"}), ({"gpu": 2}, {"0,1"})]
)
def test_a_task_sees_the_devices_it_was_given(
    client: LatticeClient, settings: dict[str, Any], visible: set[str]
) -> None:
    assert client.run_task(using(**settings), {})["result"] in visible


def test_two_halves_share_a_device(client: LatticeClient, room: Room) -> None:
    first, second = together(client, room, {"gpu": 0.5}, {"gpu": 0.5})
    assert first == second


def test_four_quarters_share_a_device(client: LatticeClient, room: Room) -> None:
    assert len(set(together(client, room, *[{"gpu": 0.25}] * 4))) == 1


def test_a_share_that_does_not_fit_gets_the_other_device(client: LatticeClient, room: Room) -> None:
    first, second = together(client, room, {"gpu": 0.5, "gpu_mem": 6000}, {"gpu": 0.5, "gpu_mem": 4000})
    assert first != second


def test_a_task_that_needs_device_memory_only_shares_a_device(client: LatticeClient, room: Room) -> None:
    wanted = [{"gpu": 0.5, "gpu_mem": 8192}, {"gpu": 0.5, "gpu_mem": 6144}, {"gpu_mem": 2048}]
    full, roomy, guest = together(client, room, *wanted)
    assert full != roomy
    assert guest == roomy


def test_a_whole_device_is_not_shared(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    workflow.add_task(using(gpu=2), {"room": room, "name": "both"})
    both = workflow.run()
    started(both, "devices")
    workflow = client.create_workflow()
    workflow.add_task(using(gpu_mem=1))
    guest = workflow.run()
    assert "RESOURCES" in reasons(guest, "devices")
    room.open()
    assert guest.result(timeout=WAIT_S)["result"] in {"0", "1"}
    both.result(timeout=WAIT_S)


def test_a_task_for_two_devices_waits_while_others_run(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    workflow.add_task(using(gpu=0.5), {"room": room, "name": "half"}, "half")
    half = workflow.run()
    started(half, "devices")
    workflow = client.create_workflow()
    workflow.add_task(using(gpu=2))
    both = workflow.run()
    shortage = reasons(both, "devices")["RESOURCES"]
    assert (shortage.resource, shortage.wanted, shortage.free) == (resources_pb2.RESOURCE_KIND_GPU, 2, 1)
    for _ in range(10):
        assert client.run_task(devices, {}) == {"result": ""}
    assert reasons(both, "devices").keys() == {"RESOURCES"}
    room.open()
    assert both.result(timeout=WAIT_S) == {"result": "0,1"}
    half.result(timeout=WAIT_S)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"cpu": 64}, "cpu: 64 wanted, 4 in all"),
        ({"gpu": 3}, "gpu: 3 wanted, 2 in all"),
        ({"gpu": 0.5, "gpu_mem": 9000}, "gpu memory: 8.789 GiB wanted, 8 GiB in all"),
        ({"gpu_mem": 9000}, "gpu memory: 8.789 GiB wanted, 8 GiB in all"),
        ({"cpu_mem": 10**9}, "memory: .* TiB wanted"),
        ({"node_selector": {"zone": "us"}}, "its label zone is 'eu', not 'us'"),
        ({"node_selector": {"disk": "fast"}}, "it has no label disk, and 'fast' is wanted"),
    ],
)
def test_a_task_that_can_never_run_is_refused_with_the_missing_resource(
    client: LatticeClient, settings: dict[str, Any], missing: str
) -> None:
    workflow = client.create_workflow()
    workflow.add_task(devices)
    workflow.add_task(using(**settings), task_name="greedy")
    with pytest.raises(PreconditionError, match=missing) as caught:
        workflow.run()
    assert caught.value.reason == "UNSATISFIABLE_RESOURCES"
    assert caught.value.metadata == {"task_id": "devices-2"}


def test_a_task_that_can_never_run_is_refused_immediately_after_the_start() -> None:
    with (
        served("--executor", "local", "--num-cpus", "1") as fresh,
        LatticeClient(fresh) as client,
        pytest.raises(PreconditionError, match="cpu: 2 wanted, 1 in all"),
    ):
        client.run_task(using(cpu=2), {})


def test_a_task_runs_where_the_labels_are_right(client: LatticeClient) -> None:
    assert OFFERS[-1] == "zone=eu"
    assert client.run_task(using(node_selector={"zone": "eu"}), {}) == {"result": ""}


@task(cpu=4)
def hold(room: str) -> None:
    enter(room, "hold")


@task(cpu=4)
def jot(room: str, text: str, seconds: float = 0.02) -> None:
    note(room, text)
    time.sleep(seconds)


def held(client: LatticeClient, room: Room) -> Run:
    """Return a run that has all CPUs until the room is open."""
    workflow = client.create_workflow()
    workflow.add_task(hold, {"room": room})
    run = workflow.run()
    started(run, "hold")
    return run


def order_of_starts(room: Room, *runs: Run) -> list[str]:
    """Open the room and return the lines that were noted until all runs ended."""
    room.open()
    for run in runs:
        run.result(timeout=WAIT_S)
    return [line for line in room.notes() if line not in {"+hold", "-hold"}]


def test_higher_priority_goes_first_within_a_run_and_between_runs(client: LatticeClient, room: Room) -> None:
    holding = held(client, room)
    workflow = client.create_workflow()
    for priority in (0, 5, -5):
        workflow.add_task(using(jot, cpu=4, priority=priority), {"room": room, "text": f"task {priority}"})
    runs = [holding, workflow.run()]
    for priority in (10, -10):
        workflow = client.create_workflow()
        workflow.add_task(jot, {"room": room, "text": f"run {priority}"})
        runs.append(workflow.run(priority=priority))
    assert order_of_starts(room, *runs) == ["run 10", "task 5", "task 0", "task -5", "run -10"]


def test_tasks_start_in_order_of_submission(client: LatticeClient, room: Room) -> None:
    holding = held(client, room)
    workflow = client.create_workflow()
    texts = [str(number) for number in range(6)]
    for text in texts:
        workflow.add_task(jot, {"room": room, "text": text})
    assert order_of_starts(room, holding, workflow.run()) == texts


def test_a_large_task_is_not_passed_by_small_ones_forever(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    workflow.add_task(using(hold, cpu=1), {"room": room})
    holding = workflow.run()
    started(holding, "hold")
    workflow = client.create_workflow()
    workflow.add_task(jot, {"room": room, "text": "large"})
    for number in range(45):
        # Never at the end together, so that four CPUs are not free by chance.
        inputs = {"room": room, "text": "small", "seconds": 0.07 + number % 7 / 50}
        workflow.add_task(using(jot, cpu=1), inputs)
    order = order_of_starts(room, holding, workflow.run())
    assert len(order) == 46
    assert order[0] == "small"
    assert order[-1] != "large"


def test_a_tenant_with_little_work_does_not_wait_for_one_with_much(
    address: str, client: LatticeClient, room: Room
) -> None:
    holding = held(client, room)
    runs = [holding]
    with LatticeClient(address, tenant="much") as much, LatticeClient(address, tenant="little") as little:
        for caller, name, count in ((much, "much", 20), (little, "little", 4)):
            workflow = caller.create_workflow()
            for _ in range(count):
                workflow.add_task(jot, {"room": room, "text": name})
            runs.append(workflow.run())
        order = order_of_starts(room, *runs)
    assert len(order) == 24
    # In turns, the last of the four would be at place 8; in the order of arrival, at place 24.
    assert max(place for place, name in enumerate(order, 1) if name == "little") <= 18


@task
def pause(room: str) -> None:
    enter(room, "pause")


@task(retries=1, retry_backoff=60.0)
def stumble() -> None:
    raise LookupError("not yet")


@task(batch_size=10, batch_timeout=60.0)
def gather(value: list[int]) -> list[int]:
    return value


def test_a_waiting_task_has_reasons(address: str, client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(pause, {"room": room})
    workflow.add_task(devices, {"name": first.output})
    workflow.add_task(stumble)
    workflow.add_task(gather, {"value": 1})
    workflow.add_task(using(cpu=4), task_name="large")
    done = workflow.add_task(using(cpu=0))
    run = workflow.run()
    started(run, "pause")
    until(run, "task_retrying", "stumble")
    until(run, "task_succeeded", done.task_id)
    expected = {
        "pause": ("RUNNING", "attempt 1 runs on node"),
        "devices": ("INPUT", "task 'pause'"),
        "stumble": ("RETRY", "attempt 1 failed; the next one may start in"),
        "gather": ("BATCH", "its batch has 1 of 10 tasks and leaves in"),
        "devices-2": ("RESOURCES", "cpu: 4 wanted, 3 free"),
        done.task_id: ("ENDED", "it has succeeded"),
    }
    for task_id, (kind, text) in expected.items():
        found = reasons(run, task_id)
        assert text in found[kind].message, task_id
        told = call(address, "runs", "explain", run, task_id)
        assert told.exit_code == 0
        assert f"  {kind.lower()}: " in told.output
        assert text in told.output
    run.cancel()
