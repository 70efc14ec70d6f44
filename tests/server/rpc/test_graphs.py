"""Runs read back: the graph, the parameters, and the times of tasks."""

from typing import Any

from google.protobuf.duration_pb2 import Duration
from lattice.v1 import errors_pb2, payload_pb2, resources_pb2, results_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_server.core.model import Function
from lattice_server.rpc.convert.tasks import task_from_proto, task_to_spec
from tests.server.rpc.callers import Caller, graph, json_payload, output, run, task, value, walk

FUNCTION = Function("sha256:f", False, None)


def result_of(caller: Caller, spec: workflow_pb2.WorkflowSpec) -> results_pb2.GetResultResponse:
    """Run a workflow to its end."""
    run_id = caller.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec)).run.run_id
    return caller.results.GetResult(results_pb2.GetResultRequest(run_id=run_id, wait=Duration(seconds=60)))


def graph_of(caller: Caller, run_id: str, **more: Any) -> list[workflow_pb2.GraphTask]:
    """Return all tasks in the graph of a run."""
    request = workflow_pb2.GetRunGraphRequest(run_id=run_id, **more)
    return [found for page in walk(caller.workflows.GetRunGraph, request, "tasks", 2) for found in page]


def test_the_graph_of_an_inline_workflow_is_read_back_when_it_runs(idle: Caller) -> None:
    condition = task_pb2.Condition(output=output("b").output)
    tasks = task("a"), task("b", inputs={"x": output("a")}), task("c", after=["a"], condition=condition)
    run_id = run(idle, *tasks).run.run_id
    found = graph_of(idle, run_id)
    edges = {each.task_id: sorted(each.predecessor_task_ids) for each in found}
    assert edges == {"a": [], "b": ["a"], "c": ["a", "b"]}
    assert [each.display_name for each in found] == ["a", "b", "c"]
    assert not any(each.HasField("spec") for each in found)


def test_items_are_in_the_graph_when_a_task_was_mapped(busy: Caller) -> None:
    code = "def split(params):\n    return {'out': [1, 2]}\n"
    split = task_pb2.Function(
        python={"source": {"code": code, "name": "split"}, "call_style": task_pb2.CALL_STYLE_PARAMS}
    )
    spec = graph(task("s", function="split"), task("m", inputs={"x": output("s")}, over="x"))
    spec.functions["split"].CopyFrom(split)
    run_id = result_of(busy, spec).run.run_id
    found = {each.task_id: each.parent_task_id for each in graph_of(busy, run_id)}
    assert found == {"s": "", "m": "", "m[0]": "m", "m[1]": "m"}


def rich_task() -> task_pb2.TaskSpec:
    """Return a task that sets all it can."""
    optional = payload_pb2.OutputRef(task_id="a", output="out", optional=True)
    steps = [payload_pb2.PathStep(key="k"), payload_pb2.PathStep(index=-1)]
    part = payload_pb2.Binding(output=payload_pb2.OutputRef(task_id="a", output="out", path=steps))
    items = payload_pb2.BindingList(items=[part, value("1")])
    entries = payload_pb2.BindingMap(entries={"key": payload_pb2.Binding(parameter="p")})
    return task_pb2.TaskSpec(
        task_id="t",
        display_name="named",
        function="f",
        inputs={
            "list": payload_pb2.Binding(list=items),
            "map": payload_pb2.Binding(map=entries),
            "over": payload_pb2.Binding(output=optional),
        },
        outputs=["out", "more"],
        after=["b"],
        resources=resources_pb2.Resources(cpu=0.5, memory_bytes=7, gpu=1, gpu_memory_bytes=8),
        retry=task_pb2.RetryPolicy(
            max_attempts=4,
            initial_backoff=Duration(nanos=500_000_000),
            backoff_multiplier=3,
            max_backoff=Duration(seconds=9),
            retry_on=[errors_pb2.FAILURE_KIND_USER_ERROR],
            retry_on_types=["ValueError"],
            max_worker_losses=1,
        ),
        timeout=task_pb2.TimeoutPolicy(attempt=Duration(seconds=5), total=Duration(seconds=6)),
        batch=task_pb2.BatchPolicy(max_size=3, max_wait=Duration(seconds=1), scope=task_pb2.BATCH_SCOPE_RUN),
        isolation=resources_pb2.ISOLATION_SECCOMP,
        sandbox=task_pb2.SandboxPolicy(network=["api.example.com:443"]),
        node_selector={"zone": "z"},
        priority=-2,
        max_parallel=5,
        concurrency_key="api",
        over="over",
        condition=task_pb2.Condition(output=output("c").output, equals=json_payload("8"), negated=True),
        environment={"A": task_pb2.TaskVariable(plain="x"), "B": task_pb2.TaskVariable(secret="key")},
        services=["m", "n"],
    )


def test_a_definition_is_the_one_that_was_sent_when_it_is_read_back() -> None:
    sent = rich_task()
    unset = [field.name for field in sent.DESCRIPTOR.fields if field not in [found for found, _ in sent.ListFields()]]
    assert not unset, "the task of this test sets every field"
    found = task_to_spec(task_from_proto(sent, "task", {"f": FUNCTION}, 1000))
    assert found.function == FUNCTION.digest
    found.function = sent.function
    for payload in (found.inputs["list"].list.items[1].payload, found.condition.equals):
        payload.ClearField("media_type")
    assert found == sent


def test_definitions_are_in_the_graph_when_the_view_is_full(idle: Caller) -> None:
    run_id = run(idle, task("a"), task("b", inputs={"x": output("a")}, priority=3)).run.run_id
    first, second = graph_of(idle, run_id, view=run_pb2.VIEW_FULL)
    assert first.spec.retry.max_attempts == 1
    assert (second.spec.priority, second.spec.inputs["x"].output.task_id) == (3, "a")
    assert second.spec.function.startswith("sha256:")


def test_run_shows_its_parameters_when_the_view_is_full(idle: Caller) -> None:
    spec = graph(task("a", inputs={"x": payload_pb2.Binding(parameter="p")}), parameters={"q": json_payload("2")})
    request = workflow_pb2.RunWorkflowRequest(
        workflow=spec, parameters={"p": json_payload("1")}, priority=4, tenant="team", timeout=Duration(seconds=90)
    )
    run_id = idle.workflows.RunWorkflow(request).run.run_id
    found = idle.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id, view=run_pb2.VIEW_FULL)).run
    assert {name: payload.json for name, payload in found.parameters.items()} == {"p": "1", "q": "2"}
    assert (found.priority, found.tenant, found.timeout.seconds) == (4, "team", 90)
    assert not found.HasField("start_time")
    basic = idle.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id)).run
    assert not basic.parameters
    assert (basic.priority, basic.tenant) == (4, "team")


def test_runs_are_found_by_tenant(idle: Caller) -> None:
    mine, _ = run(idle, tenant="mine").run.run_id, run(idle, tenant="yours")
    listed = idle.workflows.ListRuns(workflow_pb2.ListRunsRequest(tenant="mine")).runs
    assert [found.run_id for found in listed] == [mine]


def test_run_of_one_task_has_the_priority_and_timeout_of_its_request(idle: Caller) -> None:
    request = task_pb2.RunTaskRequest(task=task(), function=graph().functions["work"], tenant="team", priority=4)
    request.task.function = ""
    request.timeout.FromMilliseconds(50)
    started = idle.tasks.RunTask(request).run
    assert (started.tenant, started.priority, started.timeout.nanos) == ("team", 4, 50_000_000)
    wait = Duration(seconds=30)
    ended = idle.results.GetResult(results_pb2.GetResultRequest(run_id=started.run_id, wait=wait)).run
    assert ended.failure.kind == errors_pb2.FAILURE_KIND_TIMEOUT


def test_tasks_show_their_queue_time_and_duration(busy: Caller) -> None:
    code = "import time\ndef nap(params):\n    time.sleep(0.05)\n    return {'out': 1}\n"
    spec = graph(task("a", function="nap", display_name="Nap"))
    spec.functions["nap"].CopyFrom(
        task_pb2.Function(python={"source": {"code": code, "name": "nap"}, "call_style": task_pb2.CALL_STYLE_PARAMS})
    )
    answer = result_of(busy, spec)
    assert answer.run.start_time.ToNanoseconds() >= answer.run.create_time.ToNanoseconds()
    (found,) = answer.final_tasks
    assert found.duration.ToNanoseconds() >= 50_000_000
    assert found.HasField("queue_time")
    watched = busy.results.WatchRun(results_pb2.WatchRunRequest(run_id=answer.run.run_id))
    events = {event.WhichOneof("event"): event for response in watched for event in response.events}
    assert events["task_succeeded"].task_succeeded.duration == found.duration
    assert events["task_succeeded"].task_succeeded.queue_time == found.queue_time
    assert events["task_started"].task_started.display_name == "Nap"
    assert events["task_succeeded"].task_succeeded.display_name == "Nap"
