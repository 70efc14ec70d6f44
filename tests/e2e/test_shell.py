"""Growth, limits and explanations for callers that share only the contract with this project: JSON by buf."""

import json
import time
from typing import Any

import pytest

from tests.e2e.rooms import Room
from tests.e2e.test_other_languages import Call, call  # noqa: F401  # a fixture

JSON = "application/json"


def source(name: str, code: str) -> dict[str, Any]:
    return {"python": {"source": {"name": name, "code": code}}}


FUNCTIONS = {
    "split": source("split", "def split(n):\n    return list(range(n))\n"),
    "double": source("double", "def double(x):\n    return 2 * x\n"),
    "count": source("count", "def count(value):\n    return [len(value)] * len(value)\n"),
    "wait": source(
        "wait",
        "def wait(room):\n"
        "    import os, time\n"
        "    while not os.path.exists(os.path.join(room, 'open')):\n"
        "        time.sleep(0.01)\n"
        "    return 21\n",
    ),
    "total": {"entrypoint": "builtins:sum", "python": {"call_style": "CALL_STYLE_KEYWORDS"}},
}
WAIT = "60s"


def value(content: Any) -> dict[str, Any]:
    return {"payload": {"json": json.dumps(content)}}


def output(task_id: str, **more: Any) -> dict[str, Any]:
    return {"output": {"task_id": task_id, "output": "y", **more}}


def step(task_id: str, function: str, inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"task_id": task_id, "function": function, "outputs": ["y"], "inputs": inputs, **more}


def workflow(*tasks: dict[str, Any]) -> dict[str, Any]:
    used = {task["function"] for task in tasks}
    return {"functions": {name: FUNCTIONS[name] for name in used}, "tasks": list(tasks)}


def finals(call: Call, run_id: str) -> dict[str, Any]:  # noqa: F811
    """Wait for a run and return the JSON of each final task that has an output."""
    (answer,) = call("ResultsService/GetResult", {"run_id": run_id, "wait": WAIT})
    assert answer["run"]["state"] == "RUN_STATE_SUCCEEDED"
    return {t["taskId"]: json.loads(t["outputs"]["y"]["json"]) for t in answer["finalTasks"] if "outputs" in t}


def start(call: Call, *tasks: dict[str, Any]) -> str:  # noqa: F811
    (answer,) = call("WorkflowService/RunWorkflow", {"workflow": workflow(*tasks)})
    run_id: str = answer["run"]["runId"]
    return run_id


def test_a_map_and_the_task_that_takes_its_list(call: Call) -> None:  # noqa: F811
    doubled = step("double", "double", {"x": output("split")}, over="x")
    gathered = step("max", "max", {"values": output("double")})
    graph = workflow(step("split", "split", {"n": value(3)}), doubled)
    code = "def most(values):\n    return max(values)\n"
    graph["functions"]["max"] = source("most", code)
    graph["tasks"].append(gathered)
    (answer,) = call("WorkflowService/RunWorkflow", {"workflow": graph})
    assert finals(call, answer["run"]["runId"]) == {"max": 4}
    (listed,) = call("TaskService/ListTasks", {"run_id": answer["run"]["runId"]})
    (mapped,) = [task for task in listed["tasks"] if "itemCount" in task]
    assert (mapped["taskId"], mapped["itemCount"]) == ("double", 3)
    assert [t["taskId"] for t in listed["tasks"] if t.get("parentTaskId")] == ["double[0]", "double[1]", "double[2]"]


@pytest.mark.parametrize(("n", "expected"), [(0, {"double": []}), (2, {"double[0]": 0, "double[1]": 2})])
def test_the_items_of_a_final_map(call: Call, n: int, expected: dict[str, Any]) -> None:  # noqa: F811
    doubled = step("double", "double", {"x": output("split")}, over="x")
    assert finals(call, start(call, step("split", "split", {"n": value(n)}), doubled)) == expected


def test_a_condition_and_a_task_with_an_optional_input(call: Call) -> None:  # noqa: F811
    decision = step("decision", "double", {"x": value(4)})
    eight = {"output": output("decision")["output"], "equals": {"json": "8"}}
    yes = step("yes", "double", {"x": value(1)}, condition=eight)
    no = step("no", "double", {"x": value(1)}, condition={**eight, "negated": True})
    both = [output("yes", optional=True), output("no", optional=True)]
    last = step("last", "double", {"x": {"list": {"items": both}}})
    run_id = start(call, decision, yes, no, last)
    assert finals(call, run_id) == {"last": [2, None, 2, None]}
    (listed,) = call("TaskService/ListTasks", {"run_id": run_id, "states": ["TASK_STATE_SKIPPED"]})
    assert [task["taskId"] for task in listed["tasks"]] == ["no"]


def test_a_waiting_task_is_explained(call: Call, room: Room) -> None:  # noqa: F811
    waiting = step("wait", "wait", {"room": value(room)})
    large = step("large", "double", {"x": value(1)}, resources={"cpu": 4})
    run_id = start(call, waiting, large, step("double", "double", {"x": output("wait")}))
    (first,) = call("TaskService/ExplainTask", {"run_id": run_id, "task_id": "double"})
    assert first["task"]["state"] == "TASK_STATE_BLOCKED"
    assert first["reasons"][0]["kind"] == "WAIT_KIND_INPUT"
    assert first["reasons"][0]["taskId"] == "wait"
    (second,) = call("TaskService/ExplainTask", {"run_id": run_id, "task_id": "large"})
    assert second["task"]["state"] == "TASK_STATE_QUEUED"
    shortage = next(reason for reason in second["reasons"] if reason["kind"] == "WAIT_KIND_RESOURCES")
    assert (shortage["resource"], shortage["wanted"], shortage["free"]) == ("RESOURCE_KIND_CPU", 4, 3)
    room.open()
    assert finals(call, run_id) == {"large": 2, "double": 42}


def test_tasks_are_added_to_a_run(call: Call, room: Room) -> None:  # noqa: F811
    run_id = start(call, step("wait", "wait", {"room": value(room)}))
    more = workflow(step("twice", "double", {"x": output("wait")}), step("four", "double", {"x": output("twice")}))
    request = {"run_id": run_id, "expected_revision": 1, **more}
    assert call("WorkflowService/AddTasks", request) == [{"revision": "2"}]
    room.open()
    assert finals(call, run_id) == {"four": 84}


def test_source_takes_signals_and_streams_values(call: Call) -> None:  # noqa: F811
    code = (
        "from lattice_client import context\n"
        "def agent():\n    context.emit('begun')\n    return context.wait_for('go')\n"
    )
    graph = workflow() | {"functions": {"agent": source("agent", code)}, "tasks": [step("agent", "agent", {})]}
    (answer,) = call("WorkflowService/RunWorkflow", {"workflow": graph})
    run_id = answer["run"]["runId"]
    signal = {"run_id": run_id, "name": "go", "value": {"json": '"yes"'}, "request_id": "1"}
    call("WorkflowService/SignalRun", signal)
    assert finals(call, run_id) == {"agent": "yes"}
    answers = call("ResultsService/WatchChunks", {"run_id": run_id, "task_id": "agent"})
    assert '"begun"' in json.dumps(answers).replace("\\", "")
    assert answers[-1]["complete"]


def test_a_batch_and_a_limit(call: Call) -> None:  # noqa: F811
    batch = {"max_size": 3, "max_wait": "60s"}
    counts = [step(f"c{n}", "count", {"value": value(n)}, batch=batch, max_parallel=1) for n in range(6)]
    assert finals(call, start(call, *counts)) == {f"c{n}": 3 for n in range(6)}


def test_retries_and_time_limits(call: Call, room: Room) -> None:  # noqa: F811
    code = (
        "def flaky(room):\n"
        "    import os, time\n"
        "    with open(os.path.join(room, 'tries'), 'a') as file:\n"
        "        file.write('x')\n"
        "        file.flush()\n"
        "        if file.tell() == 1:\n"
        "            raise KeyError('once')\n"
        "        if file.tell() == 2:\n"
        "            time.sleep(60)\n"
        "        return file.tell()\n"
    )
    retry = {"max_attempts": 3, "initial_backoff": "0.01s", "retry_on_types": ["LookupError"]}
    task = step("flaky", "flaky", {"room": value(room)}, retry=retry, timeout={"attempt": "0.3s", "total": "50s"})
    request = {"task": task, "function": source("flaky", code), "wait": WAIT, "run_id": f"flaky-{time.monotonic_ns()}"}
    (answer,) = call("TaskService/RunTask", request)
    assert answer["task"]["outputs"]["y"] == {"mediaType": JSON, "json": "3"}
    assert answer["task"]["attempt"] == 3
