"""Failed tasks and their processes: retries, cancellation, failure policies, orphans."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lattice_client import LatticeClient, LatticeWorkflow, RunCancelledError, TaskDefinitionError, TaskFailedError, task
from tests.e2e.rooms import WAIT_S, Room, enter, note, started, until


class Flaky(Exception):
    """The failures that a test retries."""


class Overloaded(Flaky):
    """A kind of it."""


def fail_at_first(room: str, times: int, how: str) -> int:
    """Fail as often as said, then return how often it was tried."""
    note(room, "tried")
    tried = len((Path(room) / "notes").read_text().splitlines())
    if tried <= times:
        match how:
            case "exit":
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep":
                time.sleep(60)
            case "memory":
                bytearray(2**40)
            case "lookup":
                raise KeyError("nothing there")
            case _:
                raise Overloaded("try later")
    return tried


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("overloaded", {}),
        ("overloaded", {"retry_on": Overloaded}),
        ("overloaded", {"retry_on": [TypeError, Flaky]}),
        ("lookup", {"retry_on": [LookupError]}),
        ("lookup", {"retry_on": "error"}),
        ("exit", {"retry_on": "crash"}),
        ("kill", {"retry_on": ["crash", TypeError]}),
        ("sleep", {"retry_on": "timeout", "timeout": 4.0}),
        ("memory", {"retry_on": "out_of_memory"}),
    ],
)
def test_a_task_is_retried_when_its_policy_covers_the_failure(
    client: LatticeClient, room: Room, how: str, settings: dict[str, Any]
) -> None:
    flaky = task(retries=2, retry_backoff=0.01, **settings)(fail_at_first)
    workflow = client.create_workflow()
    workflow.add_task(flaky, {"room": room, "times": 2, "how": how})
    run = workflow.run()
    assert run.result(timeout=WAIT_S) == {"result": 3}
    events = list(run.events(timeout=WAIT_S))
    assert [event.data["attempt"] for event in events if event.type == "task_retrying"] == [1, 2]
    assert [event.data["attempt"] for event in events if event.type == "task_started"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("overloaded", {"retry_on": ValueError}),
        ("overloaded", {"retry_on": ["crash", "timeout", "out_of_memory"]}),
        ("lookup", {"retry_on": [IndexError, Flaky]}),
        ("exit", {"retry_on": ["error", "timeout"]}),
        ("exit", {"retry_on": OSError}),
    ],
)
def test_a_task_fails_after_one_attempt_when_its_policy_does_not_cover_the_failure(
    client: LatticeClient, room: Room, how: str, settings: dict[str, Any]
) -> None:
    flaky = task(retries=2, retry_backoff=0.01, **settings)(fail_at_first)
    with pytest.raises(TaskFailedError):
        client.run_task(flaky, {"room": room, "times": 1, "how": how})
    assert room.notes() == ["tried"]


def test_a_task_fails_with_its_last_failure_when_its_retries_are_used_up(client: LatticeClient, room: Room) -> None:
    flaky = task(retries=1, retry_backoff=0.01)(fail_at_first)
    with pytest.raises(TaskFailedError, match="try later") as caught:
        client.run_task(flaky, {"room": room, "times": 9, "how": ""})
    assert isinstance(caught.value.__cause__, Overloaded)
    assert len(room.notes()) == 2


def test_each_wait_is_twice_as_long_and_varies_by_up_to_a_half(client: LatticeClient) -> None:
    @task(retries=3, retry_backoff=0.2)
    def stumble() -> None:
        raise LookupError("always")

    workflow = client.create_workflow()
    workflow.add_task(stumble)
    retrying = [event for event in workflow.run().events(timeout=WAIT_S) if event.type == "task_retrying"]
    waits = [event.data["retry_time_s"] - event.time_s for event in retrying]
    assert len(waits) == 3
    for number, wait_s in enumerate(waits):
        assert 0.5 * 0.2 * 2**number - 0.001 <= wait_s <= 0.2 * 2**number + 0.001


def with_children(room: str, how: str) -> None:
    """Start children that try to outlive the task, note their ids, and stay or die."""
    code = "import os, sys, time; os.write(1, str(os.getpid()).encode() + b'\\n'); time.sleep(600)"
    child = [sys.executable, "-c", code]
    kinds: list[dict[str, Any]] = [{}, {"start_new_session": True}, {"preexec_fn": lambda: os.fork() and os._exit(0)}]
    kinds.append({"preexec_fn": lambda: (os.setsid(), os.fork() and os._exit(0))})
    for kind in kinds:
        process = subprocess.Popen(child, stdout=subprocess.PIPE, text=True, **kind)
        assert process.stdout is not None
        note(room, process.stdout.readline().strip())
    print("all are there")
    if how == "exit":
        os._exit(1)
    enter(room, "parent")


@pytest.fixture
def children(room: Room) -> Iterator[list[psutil.Process]]:
    """The children, as far as they were started; none is left when the test ends."""
    found: list[psutil.Process] = []
    yield found
    for process in found:
        if process.is_running():
            process.kill()


def _meet(room: Room, children: list[psutil.Process]) -> None:
    """Find the children once all are there."""
    for line in room.notes():
        if line.isdigit():
            try:
                children.append(psutil.Process(int(line)))
            except psutil.NoSuchProcess:
                continue


def _are_gone(children: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    return not alive


@pytest.mark.parametrize("how", ["run", "task", "timeout"])
def test_children_die_with_an_attempt_that_is_stopped(
    client: LatticeClient, room: Room, children: list[psutil.Process], how: str
) -> None:
    workflow = client.create_workflow()
    parent = workflow.add_task(
        task(timeout=6.0 if how == "timeout" else None)(with_children), {"room": room, "how": "stay"}
    )
    run = workflow.run()
    until(run, "task_log", "with_children")
    _meet(room, children)
    assert len(children) == 4
    if how == "run":
        run.cancel("enough")
    elif how == "task":
        run.cancel_task(parent)
    error = TaskFailedError if how == "timeout" else RunCancelledError
    with pytest.raises(error):
        run.result(timeout=WAIT_S)
    assert _are_gone(children)


def test_children_die_with_a_worker_that_is_killed(
    client: LatticeClient, room: Room, children: list[psutil.Process]
) -> None:
    workflow = client.create_workflow()
    workflow.add_task(task(with_children), {"room": room, "how": "stay"})
    run = workflow.run()
    until(run, "task_log", "with_children")
    _meet(room, children)
    assert len(children) == 4
    psutil.Process(client.nodes()[0].worker_pid).kill()
    assert _are_gone(children)
    # It was not the task's fault, so it runs again.
    until(run, "task_retrying", "with_children")
    room.open()
    run.result(timeout=WAIT_S)


def test_children_die_with_a_process_that_dies(
    client: LatticeClient, room: Room, children: list[psutil.Process]
) -> None:
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(task(with_children), {"room": room, "how": "exit"})
    assert caught.value.kind == "CRASHED"
    assert len(room.notes()) == 4
    _meet(room, children)
    assert _are_gone(children)


@task(outputs=["large", "odd"])
def give_two(room: str, how: str) -> dict[str, Any]:
    """Return a large value and one that is pickled after it, or is not."""

    class Odd:
        def __reduce__(self) -> tuple[object, ...]:
            if how == "it fails":
                raise ValueError("odd")
            enter(room, "pickling")
            return str, ("odd",)

    return {"large": b"x" * 3_000_000, "odd": Odd()}


@task
def store() -> str:
    """Return where this worker keeps large values."""
    folder: str = sys.modules["lattice_worker.runner.invocation.output"].current.get().header["store"]
    return folder


def files(folder: str) -> set[Path]:
    """Return the files of large values in a store, without spare files and bundles."""
    found = {path for path in Path(folder).rglob("*") if path.is_file()}
    return {path for path in found if path.relative_to(folder).parts[0] not in {"spares", "bundles"}}


@pytest.mark.parametrize("how", ["it fails", "it is cancelled", "its worker is killed"])
def test_no_large_value_is_left_of_an_attempt_that_does_not_succeed(
    client: LatticeClient, room: Room, how: str
) -> None:
    folder = client.run_task(store, {})["result"]
    before = files(folder)
    workflow = client.create_workflow()
    workflow.add_task(give_two, {"room": room, "how": how})
    run = workflow.run()
    if how != "it fails":
        until(run, "task_log", "give_two")
        assert len(files(folder) - before) == 1
    kept = 0
    if how == "its worker is killed":
        psutil.Process(client.nodes()[0].worker_pid).kill()
        until(run, "task_retrying", "give_two")
        room.open()
        run.result(timeout=WAIT_S)
        kept = 1
    elif how == "it is cancelled":
        run.cancel("enough")
    assert list(run.events(timeout=WAIT_S))[-1].type == "run_finished"
    deadline = time.monotonic() + WAIT_S
    while len(files(folder) - before) != kept:
        assert time.monotonic() < deadline, files(folder) - before
        time.sleep(0.01)


@task
def stay(room: str, name: str) -> str:
    enter(room, name)
    return name


@task
def one_more(value: Any) -> Any:
    return [value]


@task
def stumble(value: Any = None) -> None:
    raise LookupError("a reason")


def test_a_cancelled_task_ends_and_a_waiting_one_never_starts(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    first = workflow.add_task(stay, {"room": room, "name": "first"})
    second = workflow.add_task(stay, {"room": room, "name": "second"})
    workflow.add_task(one_more, {"value": first.output})
    workflow.add_task(one_more, {"value": second.output})
    last = workflow.add_task(task(cpu=4)(stay.function), {"room": room, "name": "third"})
    run = workflow.run()
    started(run, "stay", "stay-2")
    run.cancel_task(first)
    run.cancel_task(last.task_id)
    # Not before it has ended: it could be done before it is told to stop.
    until(run, "task_cancelled", "stay")
    room.open()
    with pytest.raises(RunCancelledError):
        run.result(timeout=WAIT_S)
    ended = {event.task_id: event.type for event in run.events(timeout=WAIT_S) if event.task_id}
    assert ended == {
        "stay": "task_cancelled",
        "stay-2": "task_succeeded",
        "one_more": "task_skipped",
        "one_more-2": "task_succeeded",
        "stay-3": "task_cancelled",
    }
    assert "+third" not in room.notes()


def _with_a_failure(client: LatticeClient, policy: str, room: Room) -> LatticeWorkflow:
    """Return a workflow in which one task fails while another one waits."""
    workflow = client.create_workflow(failure_policy=policy)
    aside = workflow.add_task(stay, {"room": room, "name": "aside"})
    workflow.add_task(one_more, {"value": aside.output})
    failing = workflow.add_task(stumble)
    workflow.add_task(one_more, {"value": failing.output})
    return workflow


def test_independent_tasks_finish_when_another_fails(client: LatticeClient, room: Room) -> None:
    run = _with_a_failure(client, "finish_independent", room).run()
    for event in run.events(timeout=WAIT_S):
        if event.type == "task_failed":
            room.open()
    states = {event.task_id: event.type for event in run.events(timeout=WAIT_S) if event.task_id}
    assert states == {
        "stay": "task_succeeded",
        "one_more": "task_succeeded",
        "stumble": "task_failed",
        "one_more-2": "task_skipped",
    }
    with pytest.raises(TaskFailedError, match="a reason") as caught:
        run.result(timeout=WAIT_S)
    assert caught.value.task_id == "stumble"


def test_a_failure_stops_the_run(client: LatticeClient, room: Room) -> None:
    run = _with_a_failure(client, "fail_fast", room).run()
    with pytest.raises(TaskFailedError, match="a reason"):
        run.result(timeout=WAIT_S)
    states = {event.task_id: event.type for event in run.events(timeout=WAIT_S) if event.task_id}
    assert states["stumble"] == "task_failed"
    assert states["stay"] == "task_cancelled"
    assert states["one_more"] == "task_skipped"
    assert "-aside" not in room.notes()


def test_there_is_no_other_failure_policy(client: LatticeClient) -> None:
    with pytest.raises(TaskDefinitionError, match="fail_fast, finish_independent"):
        client.create_workflow(failure_policy="carry_on")
