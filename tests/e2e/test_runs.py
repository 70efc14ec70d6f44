"""Whole runs through the public client, on real workers of both executors."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lattice_client import (
    InvalidArgumentError,
    LangGraphClient,
    LatticeClient,
    NotFoundError,
    PreconditionError,
    RunCancelledError,
    TaskDefinitionError,
    TaskFailedError,
    task,
)
from tests.commands import LATTICE, START
from tests.e2e.rooms import Room, enter


@task
def add(a: int, b: int = 1) -> int:
    return a + b


@task(inputs=["x"], outputs=["y", "z"])
def split(params: dict[str, Any]) -> dict[str, Any]:
    return {"y": params["x"], "z": params["x"] * 2}


@task
def gather(values: list[int], named: dict[str, int]) -> dict[str, Any]:
    return {"values": values, "named": named}


@task
def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@task
def stay(room: str) -> str:
    enter(room, "stay")
    return "stayed"


def test_outputs_are_wired_inside_lists_and_dicts(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(split, {"x": 3})
    second = workflow.add_task(add, {"a": first.outputs["z"]})
    inputs = {"values": [first.outputs["y"], second.output, 9], "named": {"k": second.output}}
    workflow.add_task(gather, inputs)
    assert workflow.run().result(timeout=30) == {"result": {"values": [3, 7, 9], "named": {"k": 7}}}


def test_results_come_as_the_messages_of_the_seed(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(split, {"x": 1}, task_name="splitting")
    run_id = workflow.run()
    messages = workflow.get_results(run_id, verbose=False, timeout=30)
    assert [message["type"] for message in messages] == ["start_task", "finish_task", "finish_workflow"]
    assert messages[0]["data"].keys() == {"workflow_id", "task_id", "node_ip", "node_id", "gpu_id"}
    assert messages[1]["data"]["result"] == {"y": 1, "z": 2}
    assert messages[2]["data"]["run_id"] == run_id


def test_independent_tasks_run_side_by_side(client: LatticeClient, tmp_path: Path) -> None:
    @task
    def meet(folder: str, name: str) -> bool:
        (Path(folder) / name).touch()
        deadline = time.monotonic() + 20
        while len(list(Path(folder).iterdir())) < 4:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    workflow = client.create_workflow()
    for name in "abcd":
        workflow.add_task(meet, {"folder": str(tmp_path), "name": name})
    results = workflow.run().result(timeout=60)
    assert [outputs["result"] for outputs in results.values()] == [True] * 4


def test_any_value_arrives_unchanged(client: LatticeClient) -> None:
    @task
    def echo(value: Any) -> Any:
        return value

    array = np.arange(400_000, dtype=np.float64).reshape(200, 2000)
    for value in ({"a": [1, 2.5, None, "ü"]}, b"\0\xff", (1, {2, 3}), 2**80, "x" * 600_000):
        workflow = client.create_workflow()
        workflow.add_task(echo, {"value": value})
        assert workflow.run().result(timeout=30) == {"result": value}
    workflow = client.create_workflow()
    first = workflow.add_task(echo, {"value": array})
    workflow.add_task(echo, {"value": first.output})
    assert np.array_equal(workflow.run().result(timeout=30)["result"], array)


def test_an_exception_comes_back_with_its_traceback(client: LatticeClient) -> None:
    @task
    def divide(a: int) -> float:
        return a / 0

    workflow = client.create_workflow()
    workflow.add_task(divide, {"a": 1})
    with pytest.raises(TaskFailedError, match="in divide") as caught:
        workflow.run().result(timeout=30)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.kind == "USER_ERROR"


@pytest.mark.parametrize("how", ["exit", "segfault", "kill"])
def test_a_crash_fails_its_own_task_and_no_other(client: LatticeClient, how: str) -> None:
    @task
    def crash(how: str) -> None:
        import ctypes
        import signal

        if how == "exit":
            os._exit(3)
        elif how == "segfault":
            ctypes.string_at(0)
        os.kill(os.getpid(), signal.SIGKILL)

    neighbours = client.create_workflow()
    for _ in range(3):
        neighbours.add_task(nap, {"seconds": 0.3})
    steady = neighbours.run()
    workflow = client.create_workflow()
    workflow.add_task(crash, {"how": how})
    with pytest.raises(TaskFailedError) as caught:
        workflow.run().result(timeout=30)
    assert caught.value.kind == "CRASHED"
    assert len(steady.result(timeout=30)) == 3


def test_a_killed_worker_is_replaced_and_its_tasks_run_again(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow()
    workflow.add_task(stay, {"room": room})
    run = workflow.run()
    seen = []
    for event in run.events(timeout=60):
        seen.append(event.type)
        if event.type == "task_started" and "task_retrying" not in seen:
            psutil.Process(client.nodes()[0].worker_pid).kill()
        elif event.type == "task_retrying":
            room.open()
    assert "task_retrying" in seen
    assert run.result(timeout=30) == {"result": "stayed"}


def test_output_is_logged_and_cut(client: LatticeClient) -> None:
    @task
    def chatter(lines: int) -> None:
        print("through print")
        os.write(1, b"through the descriptor\n")
        for _ in range(lines):
            print("x" * 1000)

    workflow = client.create_workflow()
    workflow.add_task(chatter, {"lines": 5000})
    logs = [event.data for event in workflow.run().events(timeout=60) if event.type == "task_log"]
    text = "".join(log["text"] for log in logs)
    assert "through print" in text
    assert "through the descriptor" in text
    assert len(text) < 2_000_000
    assert any(log["truncated"] for log in logs)


def test_a_thousand_async_tasks_wait_together(client: LatticeClient) -> None:
    @task
    async def wait(number: int) -> int:
        await asyncio.sleep(1)
        return number

    workflow = client.create_workflow()
    for number in range(1000):
        workflow.add_task(wait, {"number": number})
    results = workflow.run().result(timeout=60)
    assert [outputs["result"] for outputs in results.values()] == list(range(1000))


def test_a_cancelled_run_ends(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    slow = workflow.add_task(nap, {"seconds": 600})
    workflow.add_task(nap, {"seconds": slow.output})
    run = workflow.run()
    for event in run.events(timeout=60):
        if event.type == "task_started":
            run.cancel()
    assert run.status() == "cancelled"
    with pytest.raises(RunCancelledError):
        run.result(timeout=30)


def test_every_reader_sees_every_event_once(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    for number in range(20):
        workflow.add_task(add, {"a": number})
    run = workflow.run()
    seen: list[list[int]] = []

    def read() -> None:
        seen.append([event.sequence for event in run.events(timeout=60)])

    readers = [threading.Thread(target=read) for _ in range(50)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert seen == [list(range(1, 43))] * 50
    assert [event.sequence for event in run.events(after=40, timeout=30)] == [41, 42]


def test_the_same_run_id_is_the_same_run(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(add, {"a": 1})
    name = f"run-{time.monotonic_ns()}"
    assert workflow.run(name) == workflow.run(name) == name


def test_an_invalid_input_is_named_when_the_run_is_submitted(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    with pytest.raises(TaskDefinitionError, match="needs input 'a'"):
        workflow.add_task(add, {"b": 1})
    first = workflow.add_task(split, {"x": 1})
    with pytest.raises(TaskDefinitionError, match="no output 'q'; its outputs: 'y', 'z'"):
        first.outputs["q"]
    second = workflow.add_task(add, {"a": first.outputs["y"]})
    workflow.add_edge(second, first)
    with pytest.raises(InvalidArgumentError, match=r"(split -> add|add -> split) -> "):
        workflow.run()
    with pytest.raises(NotFoundError):
        client.get_run("nowhere")


def test_unsupported_options_are_refused(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(task(isolation="docker")(lambda: 1))
    with pytest.raises(PreconditionError, match=r"could ever run tasks\[0\], .*: it cannot isolate by docker \("):
        workflow.run()


def test_a_missing_output_is_named(client: LatticeClient) -> None:
    @task(inputs=[], outputs=["wanted"])
    def forget(params: dict[str, Any]) -> dict[str, Any]:
        return {"other": 1}

    workflow = client.create_workflow()
    workflow.add_task(forget)
    with pytest.raises(TaskFailedError, match="no output 'wanted'; it returned: other"):
        workflow.run().result(timeout=30)


def test_a_function_runs_on_the_server_when_called(address: str) -> None:
    lattice = LangGraphClient(address)

    @lattice.task(cpu=0.5)
    def node(state: dict[str, int]) -> dict[str, int]:
        return {"n": state["n"] + 1, "pid": os.getpid()}

    answer = node({"n": 1})
    assert answer["n"] == 2
    assert answer["pid"] != os.getpid()


def test_modules_beside_the_script_travel_with_it(address: str, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "inner.py").write_text("from . import constant\n\ndef up(x):\n    return x + constant.ONE\n")
    (tmp_path / "pack" / "constant.py").write_text("ONE = 1\n")
    (tmp_path / "script.py").write_text(
        "from lattice_client import LatticeClient, task\n"
        "import helper\n"
        "from pack.inner import up\n"
        "@task\n"
        "def work(x):\n"
        "    return up(helper.double(x))\n"
        "workflow = LatticeClient().create_workflow()\n"
        "workflow.add_task(work, {'x': 4})\n"
        "print(workflow.run().result(timeout=30))\n"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    environment = {**os.environ, "LATTICE_TARGET": address}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "{'result': 9}\n", done.stderr
    done = subprocess.run(
        [LATTICE, "runs", "list", "--addr", address], capture_output=True, text=True, timeout=60, check=True
    )
    assert "succeeded" in done.stdout


def test_a_port_in_use_is_a_clear_error(address: str) -> None:
    port = address.rpartition(":")[2]
    done = subprocess.run(
        [*START, "--head", "--port", port, "--executor", "local", "--journal", "memory"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: cannot listen on 127.0.0.1:{port}: Address already in use")
