"""Successful calls of the services: pages, workflows step by step, events, artifacts."""

import asyncio
import contextlib
import hashlib
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lattice.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    cluster_pb2,
    errors_pb2,
    payload_pb2,
    results_pb2,
    run_pb2,
    task_pb2,
    workflow_pb2,
)

from lattice_server import __version__
from lattice_server.config import ServerConfig
from lattice_server.engine.ports import Contact
from lattice_server.rpc.server import PortInUseError
from tests.server.apps import NoWorkers, build, serving, serving_aside
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
    walk,
)

WAIT = Duration(seconds=60)


def watch(caller: Caller, run_id: str, **more: object) -> list[results_pb2.WatchRunResponse]:
    request = results_pb2.WatchRunRequest(run_id=run_id, **more)  # type: ignore[arg-type]
    return list(caller.results.WatchRun(request, timeout=60))


def kinds(responses: list[results_pb2.WatchRunResponse]) -> list[str | None]:
    return [event.WhichOneof("event") for response in responses for event in response.events]


def test_runs_are_listed_newest_first_page_by_page(idle: Caller) -> None:
    labels = {"mark": fresh()}
    ids = [run(idle, labels=labels).run.run_id for _ in range(5)]
    run(idle, labels={"mark": "other"})
    pages = walk(idle.workflows.ListRuns, workflow_pb2.ListRunsRequest(labels=labels), "runs", 2)
    assert [[found.run_id for found in page] for page in pages] == [ids[4:2:-1], ids[2:0:-1], ids[:1]]


def test_runs_are_found_by_state(idle: Caller) -> None:
    labels = {"mark": fresh()}
    ids = [run(idle, labels=labels).run.run_id for _ in range(2)]
    idle.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=ids[0]))
    idle.results.GetResult(results_pb2.GetResultRequest(run_id=ids[0], wait=WAIT))
    for state, run_id in ((run_pb2.RUN_STATE_CANCELLED, ids[0]), (run_pb2.RUN_STATE_RUNNING, ids[1])):
        request = workflow_pb2.ListRunsRequest(labels=labels, states=[state])
        assert [found.run_id for found in idle.workflows.ListRuns(request).runs] == [run_id]


def test_tasks_are_listed_as_defined_page_by_page(idle: Caller) -> None:
    names = [f"t{number}" for number in range(5)]
    started = run(idle, *map(task, names)).run
    request = task_pb2.ListTasksRequest(run_id=started.run_id)
    pages = walk(idle.tasks.ListTasks, request, "tasks", 2)
    assert [[found.task_id for found in page] for page in pages] == [names[:2], names[2:4], names[4:]]
    whole = idle.tasks.ListTasks(task_pb2.ListTasksRequest(run_id=started.run_id))
    assert whole.sequence == started.sequence
    assert not whole.next_page_token


def test_large_results_are_split_into_pages_and_messages_of_a_size(busy: Caller) -> None:
    """What this caller takes is what gRPC takes by default."""
    names = [f"t{number}" for number in range(24)]
    large = value('"' + "x" * 240_000 + '"')
    spec = graph(*(task(name, inputs={"x": large}) for name in names), task("last", after=names))
    request = workflow_pb2.RunWorkflowRequest(workflow=spec)
    run_id = busy.workflows.RunWorkflow(request).run.run_id
    watched = watch(busy, run_id)
    sequences = [event.sequence for response in watched for event in response.events]
    assert sequences == list(range(1, watched[-1].sequence + 1))
    assert all(response.sequence == response.events[-1].sequence for response in watched)
    assert [response.complete for response in watched] == [False] * (len(watched) - 1) + [True]
    pages = walk(busy.tasks.ListTasks, task_pb2.ListTasksRequest(run_id=run_id, view=run_pb2.VIEW_FULL), "tasks", 1000)
    assert [found.task_id for page in pages for found in page] == [*names, "last"]


def test_workflows_are_listed_newest_first_page_by_page_without_tasks() -> None:
    with serving_aside(NoWorkers()) as address, calling(address) as caller:
        for name in "abc":
            caller.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(workflow_id=name, spec=graph(task())))
        pages = walk(caller.workflows.ListWorkflows, workflow_pb2.ListWorkflowsRequest(), "workflows", 2)
    assert [[found.workflow_id for found in page] for page in pages] == [["c", "b"], ["a"]]
    assert not any(found.spec.tasks for page in pages for found in page)


@pytest.mark.parametrize(("count", "page_size"), [(0, 1), (2, 2), (2, 3), (3, 1)])
def test_pages_cover_a_list_once_and_end(idle: Caller, count: int, page_size: int) -> None:
    labels = {"mark": fresh()}
    ids = [run(idle, labels=labels).run.run_id for _ in range(count)]
    pages = walk(idle.workflows.ListRuns, workflow_pb2.ListRunsRequest(labels=labels), "runs", page_size)
    assert [found.run_id for page in pages for found in page] == ids[::-1]
    assert len(pages) == max(1, -(-count // page_size))


def test_a_workflow_is_built_step_by_step_and_run(busy: Caller) -> None:
    create = workflow_pb2.CreateWorkflowRequest(workflow_id=fresh("w"))
    workflow = busy.workflows.CreateWorkflow(create).workflow
    assert workflow.revision == 1
    named = {"workflow_id": workflow.workflow_id}
    tasks = workflow_pb2.AddTasksRequest(**named, functions={"work": function()}, tasks=[task("a"), task("b")])
    assert busy.workflows.AddTasks(tasks).revision == 2
    more = workflow_pb2.AddTasksRequest(**named, tasks=[task("c", inputs={"x": output("a")})], expected_revision=2)
    assert busy.workflows.AddTasks(more).revision == 3
    edge = workflow_pb2.Edge(source_task_id="b", target_task_id="a")
    for revision in (4, 5):
        edges = workflow_pb2.AddEdgesRequest(**named, edges=[edge])
        assert busy.workflows.AddEdges(edges).revision == revision
    stored = busy.workflows.GetWorkflow(workflow_pb2.GetWorkflowRequest(**named)).workflow
    assert {found.task_id: list(found.after) for found in stored.spec.tasks} == {"a": ["b"], "b": [], "c": []}
    started = busy.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(**named)).run
    assert started.workflow_id == workflow.workflow_id
    events = [e for response in watch(busy, started.run_id) for e in response.events]
    assert [e.task_succeeded.task_id for e in events if e.HasField("task_succeeded")] == ["b", "a", "c"]
    busy.workflows.DeleteWorkflow(workflow_pb2.DeleteWorkflowRequest(**named))
    assert busy.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=started.run_id)).run.workflow_id


def test_workflow_stays_when_a_change_is_refused(idle: Caller) -> None:
    spec = graph(task("a"), task("b", after=["a"]))
    stored = idle.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=spec)).workflow
    named = {"workflow_id": stored.workflow_id}
    edge = workflow_pb2.Edge(source_task_id="b", target_task_id="a")
    with pytest.raises(grpc.RpcError):
        idle.workflows.AddEdges(workflow_pb2.AddEdgesRequest(**named, edges=[edge]))
    with pytest.raises(grpc.RpcError):
        idle.workflows.AddTasks(workflow_pb2.AddTasksRequest(**named, tasks=[task("a")]))
    assert idle.workflows.GetWorkflow(workflow_pb2.GetWorkflowRequest(**named)).workflow == stored


def test_a_workflow_may_be_only_checked(idle: Caller) -> None:
    request = workflow_pb2.CreateWorkflowRequest(workflow_id=fresh("w"), spec=graph(task()), validate_only=True)
    assert not idle.workflows.CreateWorkflow(request).created
    with pytest.raises(grpc.RpcError):
        idle.workflows.GetWorkflow(workflow_pb2.GetWorkflowRequest(workflow_id=request.workflow_id))


def test_a_stored_workflow_comes_back_without_its_code(idle: Caller) -> None:
    stored = idle.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task()))).workflow
    for found in stored.spec.functions.values():
        assert not found.HasField("python")
        assert found.digest.startswith("sha256:")
    by_digest = workflow_pb2.WorkflowSpec(functions=stored.spec.functions, tasks=stored.spec.tasks)
    assert idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=by_digest)).created


def test_a_stored_workflow_comes_back_whole(idle: Caller) -> None:
    sent = graph(
        task("a", retry=task_pb2.RetryPolicy(max_attempts=3), timeout=task_pb2.TimeoutPolicy(attempt=WAIT)),
        parameters={"p": json_payload("1")},
        failure_policy=workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT,
    )
    spec = idle.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=sent)).workflow.spec
    assert spec.failure_policy == sent.failure_policy
    assert spec.parameters == sent.parameters
    assert spec.tasks[0].retry.max_attempts == 3
    assert spec.tasks[0].timeout == sent.tasks[0].timeout


def test_a_digest_cannot_be_given_to_other_code(busy: Caller) -> None:
    stored = busy.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task()))).workflow
    digest = stored.spec.functions["work"].digest
    other = function("fail")
    other.digest = digest
    with contextlib.suppress(grpc.RpcError):
        busy.tasks.RunTask(task_pb2.RunTaskRequest(task=task(function=""), function=other))
    known = task_pb2.Function(digest=digest)
    request = task_pb2.RunTaskRequest(task=task(function=""), function=known, wait=WAIT)
    assert busy.tasks.RunTask(request).run.state == run_pb2.RUN_STATE_SUCCEEDED


def test_parameters_of_a_run_override_those_of_its_workflow(busy: Caller) -> None:
    bound = task(inputs={"x": payload_pb2.Binding(parameter="p")})
    spec = graph(bound, parameters={"p": json_payload("1")})
    for given, expected in (({}, "1"), ({"p": json_payload("2")}, "2")):
        request = workflow_pb2.RunWorkflowRequest(workflow=spec, parameters=given)
        started = busy.workflows.RunWorkflow(request).run
        result = busy.results.GetResult(results_pb2.GetResultRequest(run_id=started.run_id, wait=WAIT))
        assert result.final_tasks[0].outputs["out"].json == expected


def test_one_call_answers_when_a_run_is_accepted_and_when_it_has_ended(busy: Caller) -> None:
    request = workflow_pb2.RunWorkflowRequest(run_id=fresh(), workflow=graph(task("a"), task("b", after=["a"])))
    for is_new in (True, False):
        execute = workflow_pb2.ExecuteWorkflowRequest(run=request)
        first, last = busy.workflows.ExecuteWorkflow(execute, timeout=60)
        assert first.accepted.run.run_id == request.run_id
        assert first.accepted.created is is_new
        assert last.ended == busy.results.GetResult(results_pb2.GetResultRequest(run_id=request.run_id))
        assert last.ended.run.state == run_pb2.RUN_STATE_SUCCEEDED


def test_one_task_is_run_and_waited_for(busy: Caller) -> None:
    request = task_pb2.RunTaskRequest(task=task_pb2.TaskSpec(inputs={"x": value("4")}), function=function(), wait=WAIT)
    response = busy.tasks.RunTask(request)
    assert response.task.state == run_pb2.TASK_STATE_SUCCEEDED
    assert response.task.outputs["out"].json == "4"
    named = task_pb2.GetTaskRequest(run_id=response.run.run_id, task_id=response.task.task_id)
    assert busy.tasks.GetTask(named).task == response.task


def test_a_failed_run_is_an_answer_and_no_error(busy: Caller) -> None:
    started = run(busy, task("a", function="fail"), task("b", after=["a"])).run
    result = busy.results.GetResult(results_pb2.GetResultRequest(run_id=started.run_id, wait=WAIT))
    assert result.run.state == run_pb2.RUN_STATE_FAILED
    assert result.run.failure.kind == errors_pb2.FAILURE_KIND_USER_ERROR
    assert (result.run.failure.type, result.run.failure.message) == ("ValueError", "broken")
    assert "in fail" in result.run.failure.traceback
    assert [(t.task_id, t.state) for t in result.final_tasks] == [("b", run_pb2.TASK_STATE_SKIPPED)]
    counts = result.run.task_counts
    assert (counts.total, counts.failed, counts.skipped) == (2, 1, 1)


def test_dependent_tasks_are_skipped_when_a_task_is_cancelled(busy: Caller) -> None:
    started = run(busy, task("a", function="wait"), task("b", after=["a"])).run
    call = busy.results.WatchRun(results_pb2.WatchRunRequest(run_id=started.run_id), timeout=60)
    for response in call:
        if any(event.HasField("task_started") for event in response.events):
            busy.tasks.CancelTask(task_pb2.CancelTaskRequest(run_id=started.run_id, task_id="a"))
    tasks = busy.tasks.ListTasks(task_pb2.ListTasksRequest(run_id=started.run_id)).tasks
    states = {found.task_id: found.state for found in tasks}
    assert states == {"a": run_pb2.TASK_STATE_CANCELLED, "b": run_pb2.TASK_STATE_SKIPPED}
    cancelled = busy.tasks.CancelTask(task_pb2.CancelTaskRequest(run_id=started.run_id, task_id="a"))
    assert cancelled.task.state == run_pb2.TASK_STATE_CANCELLED, "a second time changes nothing"


def test_cancellation_may_be_repeated(idle: Caller) -> None:
    run_id = run(idle).run.run_id
    request = workflow_pb2.CancelRunRequest(run_id=run_id, reason="enough")
    idle.workflows.CancelRun(request)
    result = idle.results.GetResult(results_pb2.GetResultRequest(run_id=run_id, wait=WAIT)).run
    assert result.state == run_pb2.RUN_STATE_CANCELLED
    assert result.failure.message == "enough"
    assert idle.workflows.CancelRun(request).run == result


def test_event_of_added_tasks_has_their_names(idle: Caller) -> None:
    run_id = run(idle).run.run_id
    added = [task("named", display_name="a name"), task("unnamed")]
    request = workflow_pb2.AddTasksRequest(run_id=run_id, tasks=added, functions={"work": function()})
    idle.workflows.AddTasks(request)
    call = idle.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
    event = next(e for response in call for e in response.events if e.HasField("tasks_added"))
    call.cancel()
    assert event.tasks_added.task_ids == ["named", "unnamed"]
    assert event.tasks_added.display_names == ["a name", "unnamed"]


def test_watch_resumes_after_any_sequence(busy: Caller) -> None:
    started = run(busy, task("a"), task("b", after=["a"])).run
    every = [event for response in watch(busy, started.run_id) for event in response.events]
    assert [event.sequence for event in every] == list(range(1, len(every) + 1))
    for after in range(len(every) + 1):
        responses = watch(busy, started.run_id, after_sequence=after)
        assert [event for response in responses for event in response.events] == every[after:]
        assert [response.complete for response in responses][-1:] == [True]
        assert responses[-1].sequence == len(every)


def test_a_watch_may_leave_out_logs_and_other_tasks(busy: Caller) -> None:
    started = run(busy, task("a"), task("b", after=["a"])).run
    every = kinds(watch(busy, started.run_id))
    assert every.count("task_log") >= 2
    quiet = watch(busy, started.run_id, exclude_logs=True)
    assert kinds(quiet) == [kind for kind in every if kind != "task_log"]
    assert quiet[-1].sequence == len(every)
    some = watch(busy, started.run_id, exclude_logs=True, task_ids=["b"])
    assert kinds(some) == ["run_started", "task_started", "task_succeeded", "run_finished"]


def test_an_artifact_is_written_and_read_from_any_offset(idle: Caller) -> None:
    data = bytes(range(256)) * 10_000
    parts = (artifact_pb2.WriteArtifactRequest(data=data[i : i + 700_000]) for i in range(0, len(data), 700_000))
    artifact = idle.artifacts.WriteArtifact(parts).artifact
    assert artifact.size_bytes == len(data)
    for offset in (0, 1, 1_048_576, len(data) - 1, len(data), len(data) + 5):
        request = artifact_pb2.ReadArtifactRequest(artifact_id=artifact.artifact_id, offset=offset)
        assert b"".join(chunk.data for chunk in idle.artifacts.ReadArtifact(request)) == data[offset:]


def test_a_repeated_run_is_the_same_when_equal_large_inputs_are_uploaded_again(idle: Caller) -> None:
    run_id = fresh()

    def start(data: bytes) -> workflow_pb2.RunWorkflowResponse:
        artifact = idle.artifacts.WriteArtifact(iter([artifact_pb2.WriteArtifactRequest(data=data)])).artifact
        payload = payload_pb2.Payload(media_type="application/octet-stream", artifact=artifact)
        return run(idle, task(inputs={"x": payload_pb2.Binding(payload=payload)}), run_id=run_id)

    first, again = start(b"x" * 300_000), start(b"x" * 300_000)
    assert first.run == again.run
    with refused(grpc.StatusCode.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        start(b"y" * 300_000)


def test_artifact_is_not_stored_when_its_upload_breaks() -> None:
    class Beside(NoWorkers):
        async def start(self, contact: Contact, post: object) -> None:
            self.store = Path(contact.local_target.removeprefix("unix:")).parent

        def artifacts(self) -> list[Path]:
            return [path for path in self.store.rglob("*") if len(path.name) >= 32]

    async def scenario() -> None:
        beside = Beside()
        async with (
            asyncio.timeout(60),
            serving(beside) as app,
            grpc.aio.insecure_channel(app.address) as channel,
        ):
            writing = artifact_pb2_grpc.ArtifactServiceStub(channel).WriteArtifact()
            await writing.write(artifact_pb2.WriteArtifactRequest(data=b"x", size_bytes=2))
            while not beside.artifacts():
                await asyncio.sleep(0.01)
            writing.cancel()
            while beside.artifacts():
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [1_000_000, 1, 0])
def test_an_artifact_is_an_input_and_an_output(busy: Caller, size: int) -> None:
    data = bytes(size)
    artifact = busy.artifacts.WriteArtifact(iter([artifact_pb2.WriteArtifactRequest(data=data)])).artifact
    payload = payload_pb2.Payload(media_type="application/octet-stream", artifact=artifact)
    spec = task_pb2.TaskSpec(inputs={"x": payload_pb2.Binding(payload=payload)})
    response = busy.tasks.RunTask(task_pb2.RunTaskRequest(task=spec, function=function(), wait=WAIT))
    assert response.run.state == run_pb2.RUN_STATE_SUCCEEDED, response.task.failure.message
    found = response.task.outputs["out"]
    if found.HasField("artifact"):
        request = artifact_pb2.ReadArtifactRequest(artifact_id=found.artifact.artifact_id)
        found.data = b"".join(chunk.data for chunk in busy.artifacts.ReadArtifact(request))
    assert hashlib.sha256(found.data).digest() == hashlib.sha256(data).digest()


def test_nodes_and_the_cluster_are_described(busy: Caller) -> None:
    run_id = run(busy).run.run_id
    busy.results.GetResult(results_pb2.GetResultRequest(run_id=run_id, wait=WAIT))
    (node,) = busy.cluster.ListNodes(cluster_pb2.ListNodesRequest()).nodes
    assert node.state == cluster_pb2.NODE_STATE_READY
    assert node.capacity.cpu == 2
    info = busy.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    assert (info.executor, info.ray_address, info.active_runs) == ("local", "", 0)


def test_server_info_tells_version_epoch_and_limits(idle: Caller) -> None:
    info = idle.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    assert (info.version, info.protocol_version) == (__version__, 1)
    assert info.server_epoch
    assert 0 < info.start_time.ToSeconds() <= time.time()
    assert abs(info.current_time.ToNanoseconds() / 1e9 - time.time()) < 60
    config, limits = ServerConfig(), info.limits
    assert limits.inline_payload_bytes == config.inline_limit_bytes
    assert limits.run_tasks == config.max_run_tasks
    assert limits.max_wait.ToSeconds() == 300
    comment = (Path(__file__).parents[3] / "proto" / "lattice" / "v1" / "cluster.proto").read_text()
    assert all(f"`{feature}` (" in comment for feature in info.features)
    assert set(info.features) == {"drafts", "output-path", "request-id", "run-graph", "open-run"}
    unset = [field.name for field in limits.DESCRIPTOR.fields if not getattr(limits, field.name)]
    assert not unset


@pytest.mark.parametrize("size_bytes", [0, 5, 7])
def test_an_upload_is_refused_when_its_size_is_another_than_it_said(idle: Caller, size_bytes: int) -> None:
    first = artifact_pb2.WriteArtifactRequest(data=b"abc", size_bytes=size_bytes)
    last = artifact_pb2.WriteArtifactRequest(data=b"def")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        idle.artifacts.WriteArtifact(iter([first, last]))
    assert list(refusal.violations) == ["size_bytes"]
    first.size_bytes = 6
    assert idle.artifacts.WriteArtifact(iter([first, last])).artifact.size_bytes == 6


def test_an_upload_is_refused_when_one_of_its_parts_is_over_the_limit(idle: Caller) -> None:
    limits = idle.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest()).limits
    part = artifact_pb2.WriteArtifactRequest(data=bytes(limits.upload_chunk_bytes))
    assert idle.artifacts.WriteArtifact(iter([part])).artifact.size_bytes == limits.upload_chunk_bytes
    part.data += b"x"
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE") as refusal:
        idle.artifacts.WriteArtifact(iter([part]))
    assert refusal.metadata == {"field": "data"}


def test_health_answers_for_the_server_and_each_service(idle: Caller) -> None:
    health = health_pb2_grpc.HealthStub(idle.channel)
    for name in (
        "",
        "lattice.v1.WorkflowService",
        "lattice.v1.TaskService",
        "lattice.v1.ResultsService",
        "lattice.v1.ClusterService",
    ):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services_and_their_files(idle: Caller) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(idle.channel)
    ask = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="lattice.v1.WorkflowService"),
    ]
    listed, file = stub.ServerReflectionInfo(iter(ask))
    names = {service.name for service in listed.list_services_response.service}
    expected = {f"lattice.v1.{name}Service" for name in ("Workflow", "Task", "Results", "Worker")}
    assert names >= expected | {"grpc.health.v1.Health"}
    assert file.file_descriptor_response.file_descriptor_proto


def test_a_port_belongs_to_one_server() -> None:
    async def second() -> None:
        async with serving(NoWorkers()) as first:
            refused = build(NoWorkers(), port=int(first.address.rpartition(":")[2]))
            with pytest.raises(PortInUseError, match=first.address):
                await refused.start()

    asyncio.run(second())


def test_nothing_is_logged_when_a_reader_disconnects(caplog: pytest.LogCaptureFixture) -> None:
    chunk = artifact_pb2.WriteArtifactRequest(data=bytes(2**20))
    with serving_aside(NoWorkers()) as address, calling(address) as caller:
        # More than fits on the way to a reader: the server comes to wait until it can write.
        artifact = caller.artifacts.WriteArtifact(iter([chunk] * 50)).artifact
        request = artifact_pb2.ReadArtifactRequest(artifact_id=artifact.artifact_id)
        with calling(address) as leaving:
            readings = [leaving.artifacts.ReadArtifact(request) for _ in range(5)]
            for reading in readings:
                next(reading)
            for _ in range(100):
                caller.cluster.ListNodes(cluster_pb2.ListNodesRequest())
            for reading in readings:
                reading.cancel()
    assert not caplog.records
