"""Clients that share only the contract with this project: Node.js and Go from its files, buf by reflection."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import certificates
from tests.e2e.conftest import served

ROOT = Path(__file__).resolve().parent.parent.parent
NODEJS = ROOT / "examples" / "nodejs"
GO = ROOT / "examples" / "go"
BUF = str(Path(sys.executable).parent / "buf")

Call = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def nodejs() -> None:
    """The Node.js example with its packages installed."""
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js")
    subprocess.run(["make", "nodejs"], cwd=ROOT, check=True, capture_output=True, timeout=300)


def curl(address: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Call a method, `Service/Method`, with a request as JSON; returns the messages of the answer."""
    url = f"http://{address}/lattice.v1.{method}"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect", "-d", "@-", url]
    text = json.dumps(request)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return _documents(done.stdout)


@pytest.fixture
def call(address: str) -> Call:
    """Call a method of the server."""
    return functools.partial(curl, address)


def _documents(text: str) -> list[dict[str, Any]]:
    decoder, found, position = json.JSONDecoder(), [], 0
    while position < len(text.rstrip()):
        document, position = decoder.raw_decode(text, position)
        found.append(document)
        position += len(text[position:]) - len(text[position:].lstrip())
    return found


def _calls_of_the_page() -> list[tuple[str, dict[str, Any]]]:
    """Return the method and the request of every `grpcurl` call, in order."""
    blocks = re.findall(r"```sh\n(grpcurl.*?)```", (ROOT / "docs" / "languages.md").read_text(), re.DOTALL)
    calls = re.findall(r"-d '(.*?)' (?:\\\n)?\s*127\.0\.0\.1:50051 lattice\.v1\.(\S+)", "".join(blocks), re.DOTALL)
    return [(method, json.loads(request)) for request, method in calls]


def _source(name: str, code: str) -> dict[str, Any]:
    return {"python": {"source": {"name": name, "code": code}}}


ADD = _source("add", "def add(a, b):\n    return a + b\n")


@pytest.fixture(scope="session")
def golang() -> None:
    """The Go example, built."""
    subprocess.run(["make", "go"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    if not (GO / ".build" / "example").exists():
        pytest.skip("needs Go")


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What tells a client how to reach a server with TLS and a token: its environment."""
    folder = tmp_path_factory.mktemp("safe")
    made, token = certificates(folder), folder / "token"
    token.write_text("se-cret-0123456789")
    flags = ["--tls-cert", str(made.cert), "--tls-key", str(made.key), "--token-file", str(token)]
    with served("--executor", "local", "--num-cpus", "2", *flags) as address:
        known = {"LATTICE_TLS_CA": str(made.ca), "LATTICE_TOKEN": token.read_text()}
        yield {**os.environ, **known, "LATTICE_TARGET": address}


PROGRAMS = {"nodejs": ["node", str(NODEJS / "main.js")], "golang": [str(GO / ".build" / "example")]}
TESTS = {"nodejs": ["npm", "test"], "golang": [str(GO / ".build" / "lattice.test"), "-test.v"]}


@pytest.fixture(params=list(PROGRAMS))
def language(request: pytest.FixtureRequest) -> str:
    """A language that has an example, which can be run."""
    request.getfixturevalue(request.param)
    return str(request.param)


def ran(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a program in the folder of the Node.js example, to which Go is indifferent."""
    return subprocess.run(command, cwd=NODEJS, env=environment, capture_output=True, text=True, timeout=90, check=False)


def test_another_language_runs_python_functions_and_follows_them(address: str, language: str) -> None:
    done = ran([*PROGRAMS[language], "a bb cccc"], {**os.environ, "LATTICE_TARGET": address})
    assert done.returncode == 0, done.stderr
    *events, result = done.stdout.splitlines()
    assert [int(line.split()[0]) for line in events] == list(range(1, len(events) + 1))
    assert re.fullmatch(r" *1 +run_started *", events[0])
    assert re.fullmatch(r" *\d+ +run_finished +RUN_STATE_SUCCEEDED", events[-1])
    assert json.loads(result) == {"text": "a bb cccc", "longest": "cccc", "mean": 2.33}


def test_another_language_resumes_over_tls_with_a_token(safe: dict[str, str], language: str) -> None:
    done = ran(TESTS[language], safe)
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_language_is_refused_without_the_token(safe: dict[str, str], language: str) -> None:
    done = ran(PROGRAMS[language], {name: value for name, value in safe.items() if name != "LATTICE_TOKEN"})
    assert done.returncode != 0
    assert re.search("unauthenticated", done.stderr, re.IGNORECASE), done.stderr


def test_the_tests_of_another_language_fail_in_time_when_there_is_no_server(language: str) -> None:
    one = {
        "nodejs": ["node", "--test", "--test-name-pattern=leave", "lattice.test.js"],
        "golang": [*TESTS["golang"], "-test.run=MayLeave"],
    }
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        done = ran(one[language], {**os.environ, "LATTICE_TARGET": target})
    assert done.returncode != 0
    assert "nothing was heard of the server" in done.stdout + done.stderr


def test_nodejs_lock_names_no_place_to_download_from() -> None:
    assert "http" not in (NODEJS / "package-lock.json").read_text()


def test_reflection_lists_the_services(address: str) -> None:
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-services", f"http://{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    wanted = {f"lattice.v1.{name}Service" for name in ("Workflow", "Task", "Results", "Worker")}
    assert wanted | {"grpc.health.v1.Health"} <= set(done.stdout.split())


def test_a_workflow_from_a_shell_in_one_call(call: Call) -> None:
    tasks = [
        {
            "task_id": "sum",
            "function": "add",
            "outputs": ["total"],
            "inputs": {"a": {"payload": {"json": "40"}}, "b": {"payload": {"json": "2"}}},
        },
        {
            "task_id": "both",
            "function": "add",
            "outputs": ["list"],
            "inputs": {
                "a": {"list": {"items": [{"output": {"task_id": "sum", "output": "total"}}]}},
                "b": {"payload": {"json": '["é", null, 2.5]'}},
            },
        },
    ]
    messages = call(
        "WorkflowService/ExecuteWorkflow", {"run": {"workflow": {"functions": {"add": ADD}, "tasks": tasks}}}
    )
    accepted, ended = messages
    run_id = accepted["accepted"]["run"]["runId"]
    assert [final["taskId"] for final in ended["ended"]["finalTasks"]] == ["both"]
    watched = call("ResultsService/WatchRun", {"run_id": run_id})
    assert watched[-1]["complete"] is True
    events = [event for message in watched for event in message.get("events", [])]
    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    outputs = {
        event["taskSucceeded"]["taskId"]: event["taskSucceeded"]["outputs"]
        for event in events
        if "taskSucceeded" in event
    }
    assert outputs["sum"]["total"]["json"] == "42"
    assert json.loads(outputs["both"]["list"]["json"]) == [42, "é", None, 2.5]


def test_a_workflow_from_a_shell_step_by_step(call: Call) -> None:
    name = f"by-hand-{time.monotonic_ns()}"
    call("WorkflowService/CreateWorkflow", {"workflow_id": name, "spec": {"functions": {"add": ADD}}})
    two = {"payload": {"json": "2"}}
    for task_id in ("first", "second"):
        task = {"task_id": task_id, "function": "add", "outputs": ["total"], "inputs": {"a": two, "b": two}}
        call("WorkflowService/AddTasks", {"workflow_id": name, "tasks": [task]})
    edge = {"source_task_id": "second", "target_task_id": "first"}
    call("WorkflowService/AddEdges", {"workflow_id": name, "edges": [edge]})
    run_id = call("WorkflowService/RunWorkflow", {"workflow_id": name})[0]["run"]["runId"]
    (answer,) = call("ResultsService/GetResult", {"run_id": run_id, "wait": "30s"})
    assert answer["run"]["state"] == "RUN_STATE_SUCCEEDED"
    (final,) = answer["finalTasks"]
    assert final["taskId"] == "first"
    assert final["outputs"]["total"] == {"mediaType": "application/json", "json": "4"}
    (watched,) = [m for m in call("ResultsService/WatchRun", {"run_id": run_id, "after_sequence": 5}) if "events" in m]
    assert "runFinished" in watched["events"][-1]


def test_one_function_from_a_shell(call: Call) -> None:
    request = {
        "function": {"entrypoint": "statistics:mean", "python": {"call_style": "CALL_STYLE_KEYWORDS"}},
        "task": {"task_id": "mean", "inputs": {"data": {"payload": {"json": "[1, 2, 6]"}}}, "outputs": ["mean"]},
        "wait": "30s",
    }
    (answer,) = call("TaskService/RunTask", request)
    assert answer["task"]["state"] == "TASK_STATE_SUCCEEDED"
    assert answer["task"]["outputs"]["mean"]["json"] == "3"


def test_the_calls_of_the_page(call: Call) -> None:
    calls = _calls_of_the_page()
    assert len(calls) == 6
    mark = f"-{time.monotonic_ns()}"
    for method, request in calls:
        own = {key: value + mark if key in {"workflow_id", "run_id"} else value for key, value in request.items()}
        answers = call(method, own)
        text = json.dumps(answers)
        match method.rpartition("/")[2]:
            case "ExecuteWorkflow" | "GetResult":
                assert '"json": "42"' in text
                assert "RUN_STATE_SUCCEEDED" in text
            case "WatchRun":
                assert [event["sequence"] for event in answers[0]["events"]] == ["3", "4"]
