"""Tasks that are added to a run while it goes on: from outside, and by its own tasks."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from lattice_client import (
    AbortedError,
    AlreadyExistsError,
    InvalidArgumentError,
    LatticeClient,
    PreconditionError,
    TaskDefinitionError,
    TaskFailedError,
    entrypoint,
    task,
)
from lattice_worker import context
from tests.e2e.rooms import WAIT_S, Room, enter, note, started, until


@task
def add(a: int, b: int = 1) -> int:
    return a + b


greedy = task(gpu=7)(add.function)


@task
def total(values: list[int]) -> int:
    return sum(values)


@task
def wait(room: str) -> int:
    enter(room, "wait")
    return 5


@task
def split(n: int) -> list[int]:
    return list(range(n))


@task(gpu=1, retries=1, retry_backoff=0.01)
def visible(folder: str) -> str:
    """Fail once, then return the devices."""
    if not (Path(folder) / "failed").exists():
        (Path(folder) / "failed").touch()
        raise LookupError("once")
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_tasks_are_added_from_outside(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(wait, {"room": room})
    run = workflow.run()
    started(run, "wait")
    before = client.describe_run(run).revision
    second = workflow.add_task(add, {"a": first.output})
    third = workflow.add_task(add, {"a": second.output, "b": 100})
    revision = run.add_tasks([third, second], expected_revision=before)
    assert revision == before + 1
    fourth = workflow.add_task(total, {"values": [second.output, third.output, first.output]})
    with pytest.raises(AbortedError) as caught:
        run.add_tasks([fourth], expected_revision=before)
    assert caught.value.reason == "REVISION_MISMATCH"
    assert run.add_tasks([fourth], expected_revision=revision) == revision + 1
    room.open()
    assert client.get_run(run).result(timeout=WAIT_S) == {"result": 6 + 106 + 5}
    with pytest.raises(PreconditionError) as late:
        run.add_tasks([workflow.add_task(add, {"a": 1})])
    assert late.value.reason == "RUN_ENDED"


def test_what_is_added_may_depend_on_what_has_ended(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    workflow.add_task(wait, {"room": room})
    done = workflow.add_task(add, {"a": 1})
    skipped = workflow.add_task(add, {"a": 1}, unless=done.output)
    run = workflow.run()
    until(run, "task_succeeded", "add")
    until(run, "task_skipped", "add-2")
    run.add_tasks([workflow.add_task(add, {"a": done.output}), workflow.add_task(add, {"a": skipped.output})])
    until(run, "task_succeeded", "add-3")
    until(run, "task_skipped", "add-4")
    room.open()
    assert run.result(timeout=WAIT_S)["add-3"] == {"result": 3}


def test_a_map_can_be_added(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    workflow.add_task(wait, {"room": room})
    ended = workflow.add_task(split, {"n": 2})
    run = workflow.run()
    until(run, "task_succeeded", "split")
    source = workflow.add_task(split, {"n": 3})
    mapped = workflow.map(add, source.output)
    run.add_tasks([source, mapped, workflow.add_task(total, {"values": mapped.output})])
    until(run, "task_succeeded", "total")
    # Its list was sent as one value; nobody has its items any more.
    with pytest.raises(InvalidArgumentError, match="cannot be mapped over later"):
        run.add_tasks([workflow.map(add, ended.output)])
    room.open()
    assert run.result(timeout=WAIT_S)["total"] == {"result": 6}


def test_what_does_not_fit_is_refused_and_changes_nothing(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(wait, {"room": room})
    run = workflow.run()
    other = client.create_workflow()
    same = other.add_task(wait, {"room": room})
    stranger = other.add_task(total, {"values": other.add_task(split, {"n": 1}).output})
    impossible = other.add_task(task(gpu=3)(add.function), {"a": 1})
    with pytest.raises((InvalidArgumentError, AlreadyExistsError), match="wait"):
        run.add_tasks([same])
    with pytest.raises(TaskDefinitionError, match="task 'split' of another workflow, which this run does not have"):
        run.add_tasks([stranger])
    with pytest.raises(PreconditionError, match="gpu: 3 wanted"):
        run.add_tasks([impossible])
    cycle = workflow.add_task(add, {"a": first.output})
    workflow.add_edge(cycle, workflow.add_task(add, {"a": cycle.output}))
    workflow.add_edge(workflow.tasks["add-2"], cycle)
    with pytest.raises(InvalidArgumentError) as caught:
        run.add_tasks([cycle, workflow.tasks["add-2"]])
    assert caught.value.reason == "WORKFLOW_CYCLE"
    room.open()
    assert run.result(timeout=WAIT_S) == {"result": 5}
    assert client.describe_run(run).revision == 1


@task
def plan(n: int) -> int:
    added = [context.spawn(add, {"a": number}) for number in range(n)]
    context.spawn(total, {"values": [found.output for found in added]}, name="sum")
    return n


@pytest.mark.parametrize("n", [0, 3])
def test_a_task_spawns_tasks(client: LatticeClient, n: int) -> None:
    workflow = client.create_workflow()
    workflow.add_task(plan, {"n": n})
    run = workflow.run()
    results = run.result(timeout=WAIT_S)
    assert results == {"plan": {"result": n}, "plan/sum": {"result": sum(range(1, n + 1))}}
    children = {found.task_id: found.parent_task_id for found in client.list_tasks(run)}
    names = ["plan/add", *(f"plan/add-{number}" for number in range(2, n + 1))][:n]
    assert children == {"plan": "", "plan/sum": "plan", **dict.fromkeys(names, "plan")}


def test_what_was_spawned_starts_at_once_and_keeps_what_it_needs(client: LatticeClient, room: Room) -> None:
    @task
    def parent(room: str) -> str:
        context.spawn(visible, {"folder": room})
        enter(room, "parent")
        return "done"

    workflow = client.create_workflow()
    workflow.add_task(parent, {"room": room})
    run = workflow.run()
    until(run, "task_retrying", "parent/visible")
    until(run, "task_succeeded", "parent/visible")
    room.open()
    results = run.result(timeout=WAIT_S)
    assert results["parent"] == {"result": "done"}
    assert results["parent/visible"]["result"] in {"0", "1"}


def test_tasks_spawn_tasks_that_spawn_tasks(client: LatticeClient) -> None:
    def count_down(n: int) -> int:
        if n:
            context.spawn(count_down, {"n": n - 1}, name="next")
        return n

    workflow = client.create_workflow()
    workflow.add_task(count_down, {"n": 5})
    results = workflow.run().result(timeout=WAIT_S)
    assert results["count_down" + "/next" * 5] == {"result": 0}
    assert len(results) == 6


def test_async_tasks_spawn_side_by_side(client: LatticeClient) -> None:
    @task
    async def parent(number: int) -> int:
        await asyncio.sleep(0.01)
        first = context.spawn(add, {"a": number, "b": 0})
        await asyncio.sleep(0.01)
        context.spawn(add, {"a": first.output, "b": 100}, name="end", after=[first])
        return context.current().number

    workflow = client.create_workflow()
    for number in range(20):
        workflow.add_task(parent, {"number": number})
    results = workflow.run().result(timeout=WAIT_S)
    ids = ["parent", *(f"parent-{number}" for number in range(2, 21))]
    assert [results[f"{task_id}/end"]["result"] for task_id in ids] == list(range(100, 120))
    assert {results[task_id]["result"] for task_id in ids} == {1}


def test_a_task_named_plan_spawns_itself_100_deep(client: LatticeClient) -> None:
    def plan(depth: int) -> int:
        if depth:
            context.spawn(plan, {"depth": depth - 1})
        return depth

    workflow = client.create_workflow()
    workflow.add_task(task(plan), {"depth": 100})
    results = workflow.run().result(timeout=WAIT_S)
    assert sorted(outputs["result"] for outputs in results.values()) == list(range(101))


def test_another_attempt_means_the_same_tasks(client: LatticeClient, room: Room) -> None:
    @task(retries=2, retry_backoff=0.01)
    def parent(room: str) -> int:
        spawned = context.spawn(note, {"room": room, "text": "child"}, name="child")
        context.spawn(note, {"room": room, "text": "last"}, name="last", after=[spawned])
        note(room, "parent")
        attempt = context.current().number
        if attempt == 1:
            raise LookupError("again")
        if attempt == 2:
            os._exit(1)
        return attempt

    workflow = client.create_workflow()
    workflow.add_task(parent, {"room": room})
    run = workflow.run()
    assert run.result(timeout=WAIT_S) == {"parent": {"result": 3}, "parent/last": {"result": None}}
    assert sorted(room.notes()) == ["child", "last", "parent", "parent", "parent"]
    assert [event.data["task_ids"] for event in run.events(timeout=WAIT_S) if event.type == "tasks_added"] == [
        ["parent/child"],
        ["parent/last"],
    ]


def test_a_task_spawns_what_workers_have_by_name(client: LatticeClient) -> None:
    mean = entrypoint("statistics:mean", inputs=["data"])

    @task
    def parent() -> int:
        first = context.spawn(mean, {"data": [1, 2, 6]})
        context.spawn(mean, {"data": [first.output, 5]}, name="again")
        return 0

    workflow = client.create_workflow()
    workflow.add_task(parent, {})
    assert workflow.run().result(timeout=WAIT_S) == {"parent": {"result": 0}, "parent/again": {"result": 4}}


def test_what_cannot_be_spawned_fails_the_task_that_tried(client: LatticeClient) -> None:
    def impossible() -> None:
        context.spawn(greedy, {"a": 1})

    def unknown() -> None:
        context.spawn(add, {"a": context.SpawnedOutput("nobody", "result")})

    def unpicklable() -> None:
        context.spawn(add, {"a": (number for number in range(3))})

    def unheard_of() -> None:
        context.spawn(entrypoint("js/nobody"), {})

    for function, text in (
        (impossible, "gpu: 7 wanted"),
        (unknown, "nobody"),
        (unheard_of, "no entry point 'js/nobody'"),
        (unpicklable, "cannot pickle|cannot be pickled"),
    ):
        with pytest.raises(TaskFailedError, match=text):
            client.run_task(task(function), {})


def test_spawning_is_for_running_tasks_that_are_not_batched(client: LatticeClient) -> None:
    with pytest.raises(RuntimeError, match="there is no task running here"):
        context.current()

    @task(batch_size=2)
    def several(value: list[Any]) -> list[Any]:
        context.current()
        return value

    with pytest.raises(TaskFailedError, match="a batch is several tasks at once"):
        client.run_task(several, {"value": 1})
