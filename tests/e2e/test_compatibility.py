"""The client and the worker of the commit that set the contract's baseline work with this server."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lattice.v1 import run_pb2

from lattice_client import LatticeClient, RunCancelledError, TaskFailedError, task
from tests.e2e.conftest import served
from tests.server.apps import NoWorkers, serving_aside

ROOT = Path(__file__).resolve().parent.parent.parent
BASELINE = "proto/lattice_v1.binpb"
WAIT_S = 60.0
LARGE_BYTES = 3_000_000
SCRIPT = """
import json, os, sys
import lattice_client
from lattice_client import LatticeClient, RunCancelledError, TaskFailedError, task

@task
def numbers(most: int) -> list[int]:
    return list(range(most))

@task
def square(number: int) -> int:
    return number * number

@task
def total(values: list[int]) -> int:
    return sum(values)

@task(retries=2, retry_backoff=0.0)
def flaky(path: str) -> int:
    with open(path, "a") as file:
        file.write("x")
    if os.path.getsize(path) < 3:
        raise ValueError("not yet")
    return os.path.getsize(path)

@task
def fail() -> None:
    raise KeyError("gone")

@task
def nap(seconds: float) -> None:
    import time
    time.sleep(seconds)

@task
def double(data: bytes) -> bytes:
    return data * 2

found = {"package": lattice_client.__file__}
with LatticeClient() as client:
    workflow = client.create_workflow("old")
    squares = workflow.map(square, workflow.add_task(numbers, {"most": 10}).output)
    workflow.add_task(total, {"values": squares.output})
    run = workflow.run(labels={"from": "old"})
    found["result"] = run.result(timeout=60)
    events = list(run.events())
    found["events"] = [event.type for event in events]
    found["dense"] = [event.sequence for event in events] == list(range(1, len(events) + 1))
    found["retried"] = client.run_task(flaky, {"path": sys.argv[1]})
    try:
        client.run_task(fail)
    except TaskFailedError as error:
        found["failed"] = repr(error.__cause__)
    workflow = client.create_workflow()
    slept = workflow.add_task(nap, {"seconds": 60})
    run = workflow.run()
    next(event for event in run.events() if event.type == "task_started")
    run.cancel("enough")
    try:
        run.result(timeout=60)
    except RunCancelledError as error:
        found["cancelled"] = str(error)
    found["large"] = len(client.run_task(double, {"data": bytes(3_000_000)})["result"])
    workflow = client.create_workflow()
    workflow.add_task(total, {"values": [workflow.parameter("first"), 2]})
    stored = workflow.store()
    found["stored"] = stored.run(parameters={"first": 40}).result(timeout=60)
    found["listed"] = [run.state for run in client.list_runs(labels={"from": "old"})]
    found["states"] = [task.state for task in client.list_tasks(run)]
    found["nodes"] = len(client.nodes())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds the packages of the commit that last changed the contract's baseline."""
    command = ["git", "log", "-1", "--format=%H", "--", BASELINE]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        pytest.skip("needs the history of the repository")
    folder = tmp_path_factory.mktemp("earlier")
    command = ["git", "archive", commit, "lattice_client", "lattice_worker", "proto"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'proto'}", "EARLIER": str(folder)}


@pytest.fixture(scope="module")
def told(earlier: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results that the earlier client got from the present server and worker."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(SCRIPT)
    with served("--executor", "local", "--num-cpus", "2") as address:
        environment = {**earlier, "LATTICE_TARGET": address}
        command = [sys.executable, "script.py", str(folder / "tries")]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["package"].startswith(earlier["EARLIER"])
    return found


def test_an_earlier_client_runs_a_graph_and_reads_its_events(told: dict[str, Any]) -> None:
    assert told["result"] == {"result": 285}
    assert (told["events"][0], told["events"][-1], told["dense"]) == ("run_started", "run_finished", True)
    assert told["events"].count("task_succeeded") >= 12
    assert told["listed"] == [run_pb2.RUN_STATE_SUCCEEDED]
    assert told["stored"] == {"result": 42}
    assert told["nodes"] == 1


def test_an_earlier_client_sees_retries_failures_and_cancellation(told: dict[str, Any]) -> None:
    assert told["retried"] == {"result": 3}
    assert told["failed"] == "KeyError('gone')"
    assert "enough" in told["cancelled"]
    assert told["states"] == [run_pb2.TASK_STATE_CANCELLED]


def test_an_earlier_client_sends_and_fetches_large_values(told: dict[str, Any]) -> None:
    assert told["large"] == 2 * LARGE_BYTES


@task
def place() -> str:
    import lattice_worker

    return str(lattice_worker.__file__)


@task
def text_of(size: int) -> str:
    return "x" * size


@task
def length(text: str) -> int:
    return len(text)


@task
async def later(number: int) -> int:
    import asyncio

    await asyncio.sleep(0.01)
    return number


@task(retries=1, retry_backoff=0)
def second_time(path: str) -> bool:
    with open(path, "a") as file:
        file.write("x")
        file.flush()
        if os.path.getsize(path) == 1:
            raise ValueError("not yet")
    return True


@task
def nap(seconds: float) -> None:
    import time

    time.sleep(seconds)


@contextmanager
def worked(earlier: dict[str, str]) -> Iterator[LatticeClient]:
    """A client of now of a server of now, whose only worker is the earlier one."""
    with serving_aside(NoWorkers()) as address, LatticeClient(address) as client:
        flags = ["--addr", address, "--node-id", "earlier", "--num-cpus", "2"]
        with subprocess.Popen(
            # In a folder of its own: `-m` looks for the package where it is started.
            [sys.executable, "-m", "lattice_worker", *flags],
            cwd=earlier["EARLIER"],
            env=earlier,
        ) as process:
            try:
                yield client
            finally:
                process.terminate()
                assert process.wait(WAIT_S) == 0


def test_an_earlier_worker_runs_tasks(earlier: dict[str, str], tmp_path: Path) -> None:
    with worked(earlier) as client:
        workflow = client.create_workflow()
        texts = [workflow.add_task(text_of, {"size": LARGE_BYTES + number}) for number in range(2)]
        both = [workflow.add_task(length, {"text": text.output}) for text in texts]
        asyncs = [workflow.add_task(later, {"number": number.output}) for number in both]
        where = workflow.add_task(place)
        run = workflow.run()
        outputs = run.result(timeout=WAIT_S)
        assert [outputs[one.task_id]["result"] for one in asyncs] == [LARGE_BYTES, LARGE_BYTES + 1]
        assert outputs[where.task_id]["result"].startswith(earlier["EARLIER"])
        # Made by the worker, and read through the server.
        assert len(run.output(texts[1], timeout=WAIT_S)) == LARGE_BYTES + 1
        assert client.run_task(second_time, {"path": str(tmp_path / "tries")}) == {"result": True}
        with pytest.raises(TaskFailedError, match="invalid literal"):
            client.run_task(task(lambda text: int(text) + 1), {"text": "no number"})
        workflow = client.create_workflow()
        workflow.add_task(nap, {"seconds": 60})
        napping = workflow.run()
        next(event for event in napping.events(timeout=WAIT_S) if event.type == "task_started")
        napping.cancel("enough")
        with pytest.raises(RunCancelledError, match="enough"):
            napping.result(timeout=WAIT_S)
