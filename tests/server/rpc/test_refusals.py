"""Refusals: at least one test for each status code and reason of the server."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode as Code
from lattice.v1 import (
    artifact_pb2,
    cluster_pb2,
    payload_pb2,
    resources_pb2,
    results_pb2,
    run_pb2,
    task_pb2,
    worker_pb2,
    workflow_pb2,
)

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import (
    Caller,
    calling,
    fresh,
    function,
    graph,
    json_payload,
    output,
    refused,
    run,
    task,
    value,
)

Resources = resources_pb2.Resources
Binding = payload_pb2.Binding
PICKLE = "application/vnd.lattice.pickle5"
NOTHING = payload_pb2.Payload()
BARE_BYTES = payload_pb2.Payload(data=b"x")
NESTED = Binding(list=payload_pb2.BindingList(items=[value("1"), Binding()]))
MAPPED = Binding(map=payload_pb2.BindingMap(entries={"k": Binding()}))


def stored(artifact_id: str, size_bytes: int = 1) -> Binding:
    """Return a binding to a large value."""
    artifact = payload_pb2.Artifact(artifact_id=artifact_id, size_bytes=size_bytes, node_id="n")
    return Binding(payload=payload_pb2.Payload(artifact=artifact))


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (task(""), "tasks[0].task_id"),
        (task("two\nlines"), "tasks[0].task_id"),
        (task("x" * 129), "tasks[0].task_id"),
        (task(function="ghost"), "tasks[0].function"),
        (task_pb2.TaskSpec(task_id="t", function="work", outputs=["a", "a"]), "tasks[0].outputs"),
        (task(inputs={"x": Binding()}), 'tasks[0].inputs["x"]'),
        (task(inputs={"x": Binding(payload=NOTHING)}), 'tasks[0].inputs["x"]'),
        (task(inputs={"x": Binding(payload=BARE_BYTES)}), 'tasks[0].inputs["x"].media_type'),
        (task(inputs={"x": stored("")}), 'tasks[0].inputs["x"].artifact.artifact_id'),
        (task(inputs={"x": stored("..")}), 'tasks[0].inputs["x"].artifact.artifact_id'),
        (task(inputs={"x": stored("a/b")}), 'tasks[0].inputs["x"].artifact.artifact_id'),
        (task(inputs={"x": stored("a" * 256)}), 'tasks[0].inputs["x"].artifact.artifact_id'),
        (task(inputs={"x": stored("a", -1)}), 'tasks[0].inputs["x"].artifact.size_bytes'),
        (task(inputs={"x": NESTED}), 'tasks[0].inputs["x"][1]'),
        (task(inputs={"x": MAPPED}), 'tasks[0].inputs["x"]["k"]'),
        (task(resources=Resources(cpu=-1)), "tasks[0].resources"),
        (task(resources=Resources(cpu=float("nan"))), "tasks[0].resources"),
        (task(resources=Resources(memory_bytes=-1)), "tasks[0].resources"),
        (task(resources=Resources(gpu_memory_bytes=-1)), "tasks[0].resources"),
        (task(resources=Resources(gpu=1.5)), "tasks[0].resources.gpu"),
    ],
)
def test_a_malformed_task_is_refused_by_its_field(idle: Caller, bad: task_pb2.TaskSpec, field: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        run(idle, bad)
    assert list(refusal.violations) == [field]
    assert refusal.message.startswith(field)


@pytest.mark.parametrize(
    ("tasks", "field", "text"),
    [
        ((task("a"), task("a")), "tasks[1].task_id", "'a' is used twice"),
        ((task("a", after=["ghost"]),), "tasks[0].after[0]", "no task 'ghost'"),
        ((task("a", inputs={"x": output("ghost")}),), 'tasks[0].inputs["x"]', "no task 'ghost'"),
        ((task("a"), task("b", inputs={"x": output("a", "no")})), 'tasks[1].inputs["x"]', "no output 'no'"),
        ((task("a", inputs={"x": Binding(parameter="p")}),), 'tasks[0].inputs["x"]', "no parameter 'p'"),
    ],
)
def test_graph_is_refused_when_it_names_a_missing_task_output_or_parameter(
    idle: Caller, tasks: tuple[task_pb2.TaskSpec, ...], field: str, text: str
) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_WORKFLOW") as refusal:
        run(idle, *tasks)
    assert list(refusal.violations) == [field]
    assert text in refusal.violations[field]


def test_a_cycle_is_named(idle: Caller) -> None:
    tasks = (task("free"), task("a", after=["c"]), task("b", after=["a"]), task("c", after=["b"]))
    with refused(Code.INVALID_ARGUMENT, "WORKFLOW_CYCLE") as refusal:
        run(idle, *tasks)
    first, *path, last = refusal.metadata["cycle"].split(" -> ")
    assert first == last
    assert {first, *path} == {"a", "b", "c"}
    assert refusal.metadata["cycle"] in refusal.message


def test_a_task_after_itself_is_a_cycle(idle: Caller) -> None:
    with refused(Code.INVALID_ARGUMENT, "WORKFLOW_CYCLE") as refusal:
        run(idle, task("a", after=["a"]))
    assert refusal.metadata["cycle"] == "a -> a"


def test_first_fault_is_named_when_a_graph_has_many(idle: Caller) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_WORKFLOW") as refusal:
        run(idle, task("a", after=[f"ghost-{number}" for number in range(40)]))
    assert refusal.metadata["total_violations"] == "40"
    assert list(refusal.violations) == [f"tasks[0].after[{number}]" for number in range(25)]


def test_many_long_faults_still_arrive(idle: Caller) -> None:
    inputs = {"ü" * 200 + str(number): output("ü" * 128) for number in range(25)}
    with refused(Code.INVALID_ARGUMENT, "INVALID_WORKFLOW"):
        run(idle, task("a", inputs=inputs))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (workflow_pb2.RunWorkflowRequest(), "source"),
        (workflow_pb2.RunWorkflowRequest(workflow=graph(task()), run_id="x" * 129), "run_id"),
        (workflow_pb2.RunWorkflowRequest(workflow=graph(task()), timeout=Duration(seconds=-1)), "timeout"),
        (workflow_pb2.RunWorkflowRequest(workflow=graph(task()), parameters={"p": NOTHING}), 'parameters["p"]'),
        (workflow_pb2.RunWorkflowRequest(workflow=graph(task(), parameters={"p": NOTHING})), 'parameters["p"]'),
        (
            workflow_pb2.RunWorkflowRequest(
                workflow=workflow_pb2.WorkflowSpec(tasks=[task()], functions={"work": task_pb2.Function()})
            ),
            'functions["work"]',
        ),
    ],
)
def test_a_malformed_run_is_refused_by_its_field(
    idle: Caller, request_: workflow_pb2.RunWorkflowRequest, field: str
) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        idle.workflows.RunWorkflow(request_)
    assert list(refusal.violations) == [field]


def test_run_is_refused_when_it_has_no_tasks(idle: Caller) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_WORKFLOW"):
        idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=workflow_pb2.WorkflowSpec()))


@pytest.mark.parametrize(
    ("unserved", "field"),
    [
        (task(isolation=99), "tasks[0].isolation"),
        (task(sandbox={"network": ["a.b:443"]}), "tasks[0].sandbox.network"),
        (task(isolation=3, sandbox={"network": ["a.b:443"] * 65}), "tasks[0].sandbox.network"),
        *(
            (task(isolation=3, sandbox={"network": ["a.b:443", server]}), "tasks[0].sandbox.network[1]")
            for server in (
                *("", "a.b", "a.b:", ":443", "a.b:0", "a.b:65536", "a.b:0443", "a.b:443 ", "a.b:443\n", "a b:443"),
                *("*:443", "*.*.b:443", "a.*.b:443", "*a.b:443", ".a.b:443", "a..b:443", "a.b.:443", "-a.b:443"),
                *("1.2.3.4:443", "1.2.3:443", "16909060:443", "0x7f.1:443", "a.0x7f:443", "a.127:443", "0x:443"),
                *("[::1]:443", "::1:443", "http://a.b:443", "a.b:443/x", "x@a.b:443", "bücher.de:443", "a" * 64 + ":1"),
                f"{'a.' * 127}b:443",
            )
        ),
    ],
)
def test_task_is_refused_when_it_needs_an_unsupported_isolation(
    idle: Caller, unserved: task_pb2.TaskSpec, field: str
) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        run(idle, unserved)
    assert list(refusal.violations) == [field]


@pytest.mark.parametrize(
    "spec", [graph(task(isolation=99)), graph(task(), failure_policy=99)], ids=["isolation", "failure_policy"]
)
def test_an_enum_value_of_a_newer_contract_is_refused(idle: Caller, spec: workflow_pb2.WorkflowSpec) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))


@pytest.mark.parametrize(
    "bad",
    [
        task(retry=task_pb2.RetryPolicy(max_attempts=-1)),
        task(retry=task_pb2.RetryPolicy(max_attempts=9, backoff_multiplier=1e300)),
        task(retry=task_pb2.RetryPolicy(max_attempts=9, backoff_multiplier=float("nan"))),
        task(retry=task_pb2.RetryPolicy(max_attempts=9, initial_backoff=Duration(seconds=-1))),
        task(retry=task_pb2.RetryPolicy(max_attempts=9, initial_backoff=Duration(seconds=3 * 10**11))),
        task(timeout=task_pb2.TimeoutPolicy(attempt=Duration(seconds=-1))),
        task(max_parallel=-1),
        task(inputs={"x": payload_pb2.Binding(output={"task_id": "a", "output": "out", "path": [{}]})}),
        task(inputs={"x": payload_pb2.Binding(output={"task_id": "a", "output": "out", "path": [{"index": 0}] * 33})}),
        task(inputs={"x": payload_pb2.Binding(selection={"value": value("1"), "path": [{"index": 0}]})}),
    ],
    ids=[
        "attempts",
        "multiplier",
        "nan",
        "negative-backoff",
        "endless-backoff",
        "negative-timeout",
        "parallel",
        "empty-step",
        "deep-path",
        "selection",
    ],
)
def test_a_policy_out_of_range_is_refused(idle: Caller, bad: task_pb2.TaskSpec) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        run(idle, bad)


def test_a_bundle_whose_digest_is_not_its_own_is_refused(idle: Caller) -> None:
    bundle = task_pb2.CodeBundle(digest="sha256:../../escaped", zip=b"PK\5\6" + bytes(18))
    code = function()
    code.bundle_digest = bundle.digest
    spec = workflow_pb2.WorkflowSpec(functions={"work": code}, bundles=[bundle], tasks=[task()])
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))


@pytest.mark.parametrize(
    ("call", "request_", "field"),
    [
        ("workflows.ListRuns", workflow_pb2.ListRunsRequest(page_token="soup"), "page_token"),
        ("workflows.ListRuns", workflow_pb2.ListRunsRequest(page_size=-1), "page_size"),
        ("workflows.AddTasks", workflow_pb2.AddTasksRequest(tasks=[task()]), "parent"),
        ("workflows.ListRuns", workflow_pb2.ListRunsRequest(page_size=0), "page_size"),
        ("workflows.ListRuns", workflow_pb2.ListRunsRequest(view=99), "view"),
        ("workflows.ListRuns", workflow_pb2.ListRunsRequest(page_token="\u0661"), "page_token"),
        ("workflows.ListWorkflows", workflow_pb2.ListWorkflowsRequest(page_token="-1"), "page_token"),
        ("workflows.ListWorkflows", workflow_pb2.ListWorkflowsRequest(page_size=0), "page_size"),
        ("cluster.ListNodes", cluster_pb2.ListNodesRequest(page_size=0), "page_size"),
        ("results.WatchRun", results_pb2.WatchRunRequest(run_id="any", after_sequence=-1), "after_sequence"),
        ("artifacts.ReadArtifact", artifact_pb2.ReadArtifactRequest(artifact_id="0" * 32, offset=-1), "offset"),
        ("artifacts.ReadArtifact", artifact_pb2.ReadArtifactRequest(artifact_id="0" * 32, offset=2**63 - 1), "offset"),
    ],
)
def test_a_malformed_question_is_refused_by_its_field(idle: Caller, call: str, request_: Any, field: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        ask(idle, call, request_)
    assert list(refusal.violations) == [field]


def test_a_run_is_refused_by_its_timeout_when_that_is_zero(idle: Caller) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        run(idle, timeout=Duration())
    assert list(refusal.violations) == ["timeout"]


def test_tasks_are_not_added_when_revision_zero_is_expected(idle: Caller) -> None:
    request = workflow_pb2.AddTasksRequest(run_id=run(idle).run.run_id, expected_revision=0)
    request.tasks.append(task("more"))
    request.functions["work"].CopyFrom(function())
    with refused(Code.ABORTED, "REVISION_MISMATCH"):
        idle.workflows.AddTasks(request)
    request.ClearField("expected_revision")
    assert idle.workflows.AddTasks(request).revision == 2


def test_an_endless_page_token_is_refused(idle: Caller) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        idle.workflows.ListRuns(workflow_pb2.ListRunsRequest(page_token="9" * 5000))


def test_a_question_about_a_run_is_refused_by_its_field(idle: Caller) -> None:
    run_id = run(idle).run.run_id
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        idle.tasks.ListTasks(task_pb2.ListTasksRequest(run_id=run_id, page_token="soup"))
    assert list(refusal.violations) == ["page_token"]
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        idle.tasks.GetTask(task_pb2.GetTaskRequest(run_id=run_id, task_id="t", wait=Duration(seconds=-1)))
    assert list(refusal.violations) == ["wait"]


@pytest.mark.parametrize(
    ("call", "request_", "reason"),
    [
        ("workflows.GetRun", workflow_pb2.GetRunRequest(run_id="ghost"), "RUN_NOT_FOUND"),
        ("workflows.CancelRun", workflow_pb2.CancelRunRequest(run_id="ghost"), "RUN_NOT_FOUND"),
        ("results.WatchRun", results_pb2.WatchRunRequest(run_id="ghost"), "RUN_NOT_FOUND"),
        ("results.GetResult", results_pb2.GetResultRequest(run_id="ghost"), "RUN_NOT_FOUND"),
        ("tasks.GetTask", task_pb2.GetTaskRequest(run_id="ghost", task_id="t"), "RUN_NOT_FOUND"),
        ("tasks.ListTasks", task_pb2.ListTasksRequest(run_id="ghost"), "RUN_NOT_FOUND"),
        ("tasks.CancelTask", task_pb2.CancelTaskRequest(run_id="ghost", task_id="t"), "RUN_NOT_FOUND"),
        ("workflows.GetWorkflow", workflow_pb2.GetWorkflowRequest(workflow_id="ghost"), "WORKFLOW_NOT_FOUND"),
        ("workflows.AddTasks", workflow_pb2.AddTasksRequest(workflow_id="ghost"), "WORKFLOW_NOT_FOUND"),
        ("workflows.AddEdges", workflow_pb2.AddEdgesRequest(workflow_id="ghost"), "WORKFLOW_NOT_FOUND"),
        ("workflows.DeleteWorkflow", workflow_pb2.DeleteWorkflowRequest(workflow_id="ghost"), "WORKFLOW_NOT_FOUND"),
        ("workflows.RunWorkflow", workflow_pb2.RunWorkflowRequest(workflow_id="ghost"), "WORKFLOW_NOT_FOUND"),
        ("artifacts.ReadArtifact", artifact_pb2.ReadArtifactRequest(artifact_id="0" * 32), "ARTIFACT_NOT_FOUND"),
        ("artifacts.ReadArtifact", artifact_pb2.ReadArtifactRequest(artifact_id="../secret"), "ARTIFACT_NOT_FOUND"),
        ("cluster.DrainNode", cluster_pb2.DrainNodeRequest(node_id="ghost"), "NODE_NOT_FOUND"),
    ],
)
def test_call_answers_not_found_when_its_id_is_unknown(idle: Caller, call: str, request_: Any, reason: str) -> None:
    with refused(Code.NOT_FOUND, reason):
        ask(idle, call, request_)


@pytest.mark.parametrize("call", ["GetTask", "CancelTask"])
def test_a_task_the_run_does_not_have_is_not_found(idle: Caller, call: str) -> None:
    run_id = run(idle).run.run_id
    request = {"GetTask": task_pb2.GetTaskRequest, "CancelTask": task_pb2.CancelTaskRequest}[call]
    with refused(Code.NOT_FOUND, "TASK_NOT_FOUND"):
        getattr(idle.tasks, call)(request(run_id=run_id, task_id="ghost"))


def test_upload_is_refused_when_its_transfer_is_unknown(idle: Caller) -> None:
    with refused(Code.NOT_FOUND, "TRANSFER_NOT_FOUND"):
        idle.workers.UploadArtifact(iter([worker_pb2.UploadArtifactRequest(transfer_id="x")]))


def test_a_repeated_run_is_the_same_run_and_another_one_a_conflict(idle: Caller) -> None:
    run_id = fresh()
    first = run(idle, run_id=run_id)
    again = run(idle, run_id=run_id)
    assert (first.created, again.created) == (True, False)
    assert first.run.create_time == again.run.create_time
    with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        run(idle, task("other"), run_id=run_id)
    assert run(idle, run_id=run_id, tenant="another one").created, "an id is a name within a tenant"


def test_a_repeated_task_is_the_same_run_and_another_one_a_conflict(idle: Caller) -> None:
    request = task_pb2.RunTaskRequest(run_id=fresh(), task=task("t", function=""), function=function())
    assert [idle.tasks.RunTask(request).created for _ in range(2)] == [True, False]
    request.task.priority = 3
    with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        idle.tasks.RunTask(request)


def named_run(run_id: str, code: bytes, inputs: dict[str, payload_pb2.Payload]) -> workflow_pb2.RunWorkflowRequest:
    spec = graph(task(inputs={name: payload_pb2.Binding(payload=payload) for name, payload in inputs.items()}))
    spec.functions["work"].python.pickle = code
    spec.parameters["p"].CopyFrom(inputs["pickled"])
    return workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=spec)


def test_a_repeated_run_is_the_same_run_though_its_pickles_have_other_bytes(idle: Caller) -> None:
    run_id, json = fresh(), payload_pb2.Payload(json="1")

    def start(code: bytes, pickled: payload_pb2.Payload, json: payload_pb2.Payload, **more: str) -> bool:
        request = named_run(run_id, code, {"pickled": pickled, "json": json})
        request.MergeFrom(workflow_pb2.RunWorkflowRequest(**more))
        return idle.workflows.RunWorkflow(request).created

    first, second = (payload_pb2.Payload(media_type=PICKLE, data=data) for data in (b"one", b"other"))
    assert start(b"code", first, json, request_id="q")
    assert not start(b"other code", second, json)
    with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        start(b"code", first, payload_pb2.Payload(json="2"))
    with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        start(b"code", payload_pb2.Payload(media_type="x/y", data=b"one"), json)
    with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        start(b"code", first, payload_pb2.Payload(json="2"), request_id="other")
    assert not start(b"code", first, payload_pb2.Payload(json="2"), request_id="q")
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        start(b"code", first, json, request_id="q" * 129)


def test_a_repeated_run_names_the_same_entry_points(idle: Caller) -> None:
    run_id = fresh()
    specs = [graph(task()) for _ in range(2)]
    for spec, name in zip(specs, ("package:one", "package:other"), strict=True):
        spec.functions["work"].CopyFrom(task_pb2.Function(entrypoint=name))
    for _ in range(2):
        idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=specs[0]))
    with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=specs[1]))


def test_a_repeated_workflow_is_the_same_workflow_and_another_one_a_conflict(idle: Caller) -> None:
    request = workflow_pb2.CreateWorkflowRequest(workflow_id=fresh("w"), spec=graph(task()))
    assert [idle.workflows.CreateWorkflow(request).created for _ in range(2)] == [True, False]
    request.spec.display_name = "other"
    with refused(Code.ALREADY_EXISTS, "WORKFLOW_ID_CONFLICT"):
        idle.workflows.CreateWorkflow(request)


def test_more_workflows_than_are_stored_are_refused_until_one_is_deleted() -> None:
    def create(caller: Caller, name: str) -> workflow_pb2.CreateWorkflowResponse:
        request = workflow_pb2.CreateWorkflowRequest(workflow_id=name, spec=graph(task()))
        created: workflow_pb2.CreateWorkflowResponse = caller.workflows.CreateWorkflow(request)
        return created

    with serving_aside(NoWorkers(), max_workflows=1) as address, calling(address) as caller:
        assert create(caller, "a").created
        with refused(Code.RESOURCE_EXHAUSTED, "TOO_MANY_WORKFLOWS") as refusal:
            create(caller, "b")
        assert refusal.retry_after_s is None, "waiting does not help"
        caller.workflows.DeleteWorkflow(workflow_pb2.DeleteWorkflowRequest(workflow_id="a"))
        assert create(caller, "b").created


def test_a_function_added_under_a_name_in_use_is_a_conflict(idle: Caller) -> None:
    created = idle.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task())))
    request = workflow_pb2.AddTasksRequest(workflow_id=created.workflow.workflow_id, functions={"work": function()})
    idle.workflows.AddTasks(request)
    request.functions["work"].CopyFrom(function("fail"))
    with refused(Code.ALREADY_EXISTS, "WORKFLOW_ID_CONFLICT"):
        idle.workflows.AddTasks(request)


def test_a_function_named_by_an_unknown_digest_is_missing(idle: Caller) -> None:
    functions = {"work": task_pb2.Function(digest="sha256:unknown")}
    spec = workflow_pb2.WorkflowSpec(functions=functions, tasks=[task()])
    with refused(Code.FAILED_PRECONDITION, "FUNCTION_MISSING") as refusal:
        idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))
    assert refusal.metadata == {"digest": "sha256:unknown"}


def test_code_of_a_python_that_no_node_has_is_refused() -> None:
    code = function()
    code.runtime.language, code.runtime.version = "python", "2.7"
    spec = workflow_pb2.WorkflowSpec(functions={"work": code}, tasks=[task()])
    with serving_aside(num_cpus=1) as address, calling(address) as caller:
        ended = results_pb2.GetResultRequest(run_id=run(caller).run.run_id, wait=Duration(seconds=60))
        caller.results.GetResult(ended)  # so the node is there
        with refused(Code.FAILED_PRECONDITION, "UNSATISFIABLE_RESOURCES") as refusal:
            caller.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))
    assert "it runs python 3" in refusal.message
    assert "the function is for python 2.7" in refusal.message


def test_a_bundle_named_by_an_unknown_digest_is_missing(idle: Caller) -> None:
    code = function()
    code.bundle_digest = "sha256:unknown"
    spec = workflow_pb2.WorkflowSpec(functions={"work": code}, tasks=[task()])
    with refused(Code.FAILED_PRECONDITION, "FUNCTION_MISSING") as refusal:
        idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))
    assert refusal.metadata == {"digest": "sha256:unknown"}


@pytest.mark.parametrize("call", ["AddTasks", "AddEdges"])
def test_a_change_to_a_workflow_that_changed_meanwhile_is_aborted(idle: Caller, call: str) -> None:
    created = idle.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task())))
    request = {"AddTasks": workflow_pb2.AddTasksRequest, "AddEdges": workflow_pb2.AddEdgesRequest}[call]
    expecting = request(workflow_id=created.workflow.workflow_id, expected_revision=1)
    assert getattr(idle.workflows, call)(expecting).revision == 2
    with refused(Code.ABORTED, "REVISION_MISMATCH") as refusal:
        getattr(idle.workflows, call)(expecting)
    assert refusal.metadata == {"revision": "2"}


def test_a_cursor_ahead_of_the_log_is_out_of_range(idle: Caller) -> None:
    started = run(idle).run
    with refused(Code.OUT_OF_RANGE, "CURSOR_AHEAD") as refusal:
        list(idle.results.WatchRun(results_pb2.WatchRunRequest(run_id=started.run_id, after_sequence=99)))
    assert refusal.metadata == {"oldest_sequence": "1", "last_sequence": str(started.sequence)}


def test_a_payload_over_the_limit_is_refused_for_good(idle: Caller) -> None:
    with refused(Code.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE") as refusal:
        run(idle, task(inputs={"x": value('"' + "x" * 256 * 1024 + '"')}))
    assert refusal.metadata == {"field": 'tasks[0].inputs["x"]'}
    assert refusal.retry_after_s is None
    with refused(Code.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE"):
        run(idle, parameters={"p": payload_pb2.Payload(media_type="x/y", data=bytes(256 * 1024 + 1))})


def test_a_payload_is_measured_in_bytes(idle: Caller) -> None:
    with refused(Code.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE"):
        run(idle, parameters={"p": json_payload('"' + "ü" * 200_000 + '"')})


class Lingering(NoWorkers):
    """An executor that takes a caller's word before it stops."""

    def __init__(self, while_stopping: Callable[[], None]) -> None:
        self._while_stopping = while_stopping

    async def stop(self) -> None:
        """Call back from a thread, while the server serves on."""
        import asyncio

        await asyncio.to_thread(self._while_stopping)


def test_a_stopping_server_takes_no_runs_and_says_when_to_come_back() -> None:
    seen = []

    def late() -> None:
        with refused(Code.UNAVAILABLE, "SHUTTING_DOWN") as refusal:
            run(callers[0])
        seen.append(refusal.retry_after_s)
        with refused(Code.UNAVAILABLE, "SHUTTING_DOWN"):
            callers[0].tasks.RunTask(task_pb2.RunTaskRequest(task=task(function=""), function=function()))
        seen.append(callers[0].workflows.GetRun(workflow_pb2.GetRunRequest(run_id="r")).run.state)

    callers: list[Caller] = []
    with serving_aside(Lingering(late)) as address:
        callers.append(Caller(grpc.insecure_channel(address)))
        run(callers[0], run_id="r")
    callers[0].channel.close()
    assert seen == [1.0, run_pb2.RUN_STATE_RUNNING]


class Broken(NoWorkers):
    """An executor with a bug."""

    def ray_address(self) -> str:
        """Raise."""
        raise ZeroDivisionError("a secret of the server")


def test_a_bug_is_internal_and_tells_only_its_id(caplog: pytest.LogCaptureFixture) -> None:
    with serving_aside(Broken()) as address, calling(address) as caller:
        with refused(Code.INTERNAL, "INTERNAL") as refusal:
            caller.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
        assert "secret" not in refusal.message
        assert refusal.metadata["error_id"] in refusal.message
        assert refusal.metadata["error_id"] in {vars(record).get("error_id") for record in caplog.records}
        assert "a secret of the server" in caplog.text
        assert run(caller).created, "the server serves on"


def ask(caller: Caller, call: str, request: Any) -> None:
    """Make a call by its name, reading its stream to the end when it has one."""
    service, _, method = call.partition(".")
    answer = getattr(getattr(caller, service), method)(request)
    if hasattr(answer, "__next__"):
        list(answer)


NOT_A_MESSAGE = b"\xff"
NOT_TEXT = b"\x0a\x01\xff"  # a text in field 1 that is not UTF-8


@pytest.mark.parametrize("data", [NOT_A_MESSAGE, NOT_TEXT])
@pytest.mark.parametrize(
    "method",
    [
        "WorkflowService/GetRun",
        "WorkflowService/ExecuteWorkflow",
        "ResultsService/WatchRun",
        "WorkerService/UploadArtifact",
    ],
)
def test_request_is_refused_without_a_log_line_when_it_cannot_be_decoded(
    idle: Caller, method: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    stub = idle.channel.stream_stream(f"/lattice.v1.{method}")
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        list(stub(iter([data]), timeout=30))
    assert list(refusal.violations) == ["request"]
    assert not caplog.records
