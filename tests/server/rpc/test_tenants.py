"""Isolation of tenants: another tenant's ids are answered like missing ones, by every RPC."""

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode as Code
from lattice import v1
from lattice.v1 import artifact_pb2, results_pb2, run_pb2, service_pb2, task_pb2, workflow_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, fresh, function, graph, refused, run, task
from tests.server.rpc.tenants import Signed, entry, token_of, write_tokens

MODULES = [importlib.import_module(f"lattice.v1.{path.stem}") for path in Path(v1.__path__[0]).glob("*_pb2.py")]
METHODS = [
    method
    for file in MODULES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if service.full_name != "lattice.v1.WorkerService"  # Workers run the tasks of all tenants.
]
MAX_DEPTH = 6


@dataclass(frozen=True)
class World:
    """A server, its callers, and the ids of one tenant's runs, workflows and artifacts."""

    a: Caller
    b: Caller
    reader: Caller
    admin: Caller
    operator: Caller
    gateway: Caller
    strangers: Mapping[tuple[str, str], Caller]
    names: Mapping[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server of two tenants, one of which has something of each kind."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    write_tokens(
        path,
        entry("a", tenant="a", scopes=["submit"]),
        entry("reader", tenant="a", scopes=["read"]),
        entry("b", tenant="b", scopes=["submit"]),
        entry("admin", tenant="ops", scopes=["admin"]),
        entry("gateway", tenant="*", scopes=["submit"]),
        # A tenant for each method, since a call may create a run or a workflow by the id it names.
        *(entry(method.full_name, tenant=method.full_name, scopes=["submit"]) for method in METHODS),
    )
    with serving_aside(NoWorkers(), token="operator", tokens_file=str(path)) as address, calling(address) as stranger:
        signed = {name: Signed(stranger.channel, token_of(name)) for name in ("a", "b", "reader", "admin", "gateway")}
        callers = {name: Caller(channel) for name, channel in signed.items()}
        operator = Caller(Signed(stranger.channel, "operator"))
        strangers = {
            (way, method.full_name): Caller(Signed(stranger.channel, token, tenant))
            for method in METHODS
            for way, token, tenant in (
                ("token", token_of(method.full_name), ""),
                ("header", token_of("admin"), f"héader of {method.full_name}"),
            )
        }
        yield World(**callers, strangers=strangers, operator=operator, names=furnished(callers["a"]))


def furnished(caller: Caller) -> dict[str, str]:
    """Make one thing of each kind; return their names by those of the fields that name them."""
    chunks = [artifact_pb2.WriteArtifactRequest(data=b"what only its tenant reads")]
    artifact = caller.artifacts.WriteArtifact(iter(chunks)).artifact
    workflow = caller.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task()))).workflow
    own = task("t", function="own", inputs={"x": {"payload": {"artifact": artifact}}})
    spec = workflow_pb2.WorkflowSpec(functions={"own": odd_function()}, tasks=[own])
    request = workflow_pb2.RunWorkflowRequest(run_id=fresh(), workflow=spec, labels={"of": "a"})
    started = caller.workflows.RunWorkflow(request).run
    graph_request = workflow_pb2.GetRunGraphRequest(run_id=started.run_id, view=run_pb2.VIEW_FULL)
    (shown,) = caller.workflows.GetRunGraph(graph_request).tasks
    service = service_pb2.ServiceSpec(name="service-of-a", command={"arguments": ["serve"]})
    caller.services.StartService(service_pb2.StartServiceRequest(spec=service))
    return {
        "name": service.name,
        "run_id": started.run_id,
        "workflow_id": workflow.workflow_id,
        "task_id": "t",
        "artifact_id": artifact.artifact_id,
        "digest": shown.spec.function,
    }


def odd_function() -> task_pb2.Function:
    """Return a function that only this tenant has sent."""
    made = function()
    made.display_name = fresh("function")
    return made


def filled(message: Message, names: Mapping[str, str], depth: int = 0) -> Any:
    """Fill every field whose name is known, in all that the message holds, and name the run's workflow by its id."""
    for field in message.DESCRIPTOR.fields:
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.name == "name" and not field.file.name.endswith(("/service.proto", "/llm.proto")):
            continue  # Not that of a resource, such as the name of a function in its source.
        if field.name in names and field.cpp_type == FieldDescriptor.CPPTYPE_STRING and not field.is_repeated:
            setattr(message, field.name, names[field.name])
        elif field.message_type is None or is_map or field.is_repeated or depth == MAX_DEPTH:
            continue
        elif field.message_type.full_name.startswith("lattice.v1."):
            part = filled(GetMessageClass(field.message_type)(), names, depth + 1)
            if part.ByteSize():
                getattr(message, field.name).CopyFrom(part)
    return message


def requests_of(method: MethodDescriptor, names: Mapping[str, str]) -> list[Any]:
    """Return requests of a method that name things in each way there is."""
    make = GetMessageClass(method.input_type)
    found = [filled(make(), names)]
    for oneof in method.input_type.oneofs:
        for field in oneof.fields if len(oneof.fields) > 1 else ():
            request = filled(make(), names)
            part = getattr(filled(make(), names), field.name)
            request.ClearField(oneof.name)
            if field.message_type is None:
                setattr(request, field.name, names.get(field.name, ""))
            else:
                getattr(request, field.name).CopyFrom(filled(type(part)(), names))
            found.append(request)
    spec = workflow_pb2.WorkflowSpec(functions={"f": {"digest": names["digest"]}}, tasks=[task("t", function="f")])
    upload = {"artifact": {"artifact_id": names["artifact_id"], "size_bytes": 1, "node_id": "head"}}
    reading = graph(task("t", inputs={"x": {"payload": upload}}))
    for request in list(found):
        for workflow in (spec, reading):
            other = make()
            other.CopyFrom(request)
            if put_workflow(other, workflow):
                found.append(other)
    return found


def put_workflow(request: Any, workflow: workflow_pb2.WorkflowSpec) -> bool:
    """Put a graph where a request may have one; return whether there is such a place."""
    fields = {field.name: field for field in request.DESCRIPTOR.fields}
    if "run" in fields and fields["run"].message_type is not None:
        return put_workflow(request.run, workflow)
    if "opening" in fields:
        return put_workflow(request.opening.run, workflow)
    for name in ("workflow", "spec"):
        if name in fields and fields[name].message_type.full_name == "lattice.v1.WorkflowSpec":
            getattr(request, name).CopyFrom(workflow)
            return True
    if "functions" in fields and "tasks" in fields:
        for name, made in workflow.functions.items():
            request.functions[name].CopyFrom(made)
        request.tasks.extend(workflow.tasks)
        return True
    if "function" in fields and "task" in fields and fields["function"].message_type is not None:
        request.task.CopyFrom(workflow.tasks[0])
        request.function.CopyFrom(workflow.functions[workflow.tasks[0].function])
        return True
    return False


def answer(caller: Caller, method: MethodDescriptor, request: Any, names: Mapping[str, str]) -> str:
    """Return the status and text of a call, with the ids replaced."""
    service, _, name = method.full_name.rpartition(".")
    kind = "stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary"
    stub = getattr(caller.channel, "_".join(kind))(
        f"/{service}/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    try:
        said = stub(iter([request]) if method.client_streaming else request, timeout=3)
        said = next(iter(said), "") if method.server_streaming else said
        text = f"OK {said}"
    except grpc.RpcError as error:
        found: Any = error
        text = f"{found.code()} {found.details()}"
    for field, value in names.items():
        text = text.replace(value, f"<{field}>") if len(value) > 1 else text
    # Times and new ids differ in each call.
    return re.sub(r"(seconds|nanos): -?\d+|(run|workflow)-[0-9a-f]{32}|[0-9]{2,}", "#", text)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
@pytest.mark.parametrize("way", ["token", "header"])
def test_answer_is_that_of_a_missing_id_when_an_id_is_another_tenants(
    world: World, way: str, method: MethodDescriptor
) -> None:
    # As long as the real ones, and of the same form.
    ghosts = {
        "name": "service-of-x",
        "run_id": fresh(),
        "workflow_id": fresh("workflow"),
        "task_id": "t",
        "artifact_id": "0" * 63 + "1",
        "digest": "sha256:" + "2" * 64,
    }
    before, stranger = state(world), world.strangers[way, method.full_name]
    for real, ghost in zip(requests_of(method, world.names), requests_of(method, ghosts), strict=True):
        assert answer(stranger, method, real, world.names) == answer(stranger, method, ghost, ghosts)
    assert state(world) == before


def state(world: World) -> list[Any]:
    """Return the runs, workflows and artifact of the tenant."""
    results = world.a.results.GetResult(
        results_pb2.GetResultRequest(run_id=world.names["run_id"], wait=Duration(nanos=1))
    )
    listed = world.a.workflows.ListRuns(workflow_pb2.ListRunsRequest(view=run_pb2.VIEW_FULL))
    stored = world.a.workflows.ListWorkflows(workflow_pb2.ListWorkflowsRequest(view=run_pb2.VIEW_FULL))
    services = world.a.services.ListServices(service_pb2.ListServicesRequest())
    return [results, listed, stored, services, read(world.a, world.names["artifact_id"])]


def read(caller: Caller, artifact_id: str) -> bytes:
    request = artifact_pb2.ReadArtifactRequest(artifact_id=artifact_id)
    return b"".join(part.data for part in caller.artifacts.ReadArtifact(request))


def run_ids(caller: Caller, **wanted: Any) -> set[str]:
    return {found.run_id for found in caller.workflows.ListRuns(workflow_pb2.ListRunsRequest(**wanted)).runs}


def workflow_ids(caller: Caller) -> set[str]:
    listed = caller.workflows.ListWorkflows(workflow_pb2.ListWorkflowsRequest())
    return {found.workflow_id for found in listed.workflows}


def test_lists_show_runs_and_workflows_of_the_tenant_only(world: World) -> None:
    own = run(world.b).run
    assert own.tenant == "b"
    assert own.run_id in run_ids(world.b)
    for caller in (world.a, world.reader):
        assert world.names["run_id"] in run_ids(caller)
        assert own.run_id not in run_ids(caller)
        assert world.names["workflow_id"] in workflow_ids(caller)
    assert world.names["run_id"] not in run_ids(world.b)
    assert world.names["workflow_id"] not in workflow_ids(world.b)
    for caller in (world.admin, world.operator, world.gateway):
        assert {own.run_id, world.names["run_id"]} <= run_ids(caller)
        assert run_ids(caller, tenant="a") == run_ids(world.a)
        assert world.names["workflow_id"] in workflow_ids(caller)


def test_a_request_for_another_tenant_is_refused_whether_there_is_one_or_not(world: World) -> None:
    for tenant in ("a", "ghost"):
        with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
            run(world.b, tenant=tenant)
        with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
            run_ids(world.b, tenant=tenant)
        with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
            world.b.tasks.RunTask(
                task_pb2.RunTaskRequest(task=task("t", function=""), function=function(), tenant=tenant)
            )
    assert run(world.b, tenant="b").run.tenant == "b"


def test_header_names_the_tenant_of_a_call(world: World) -> None:
    channel = world.a.channel._channel
    of_b = Caller(Signed(channel, token_of("admin"), "b"))
    started = run(of_b).run
    assert started.tenant == "b"
    assert run_ids(of_b) == run_ids(world.b)
    assert run_ids(of_b, tenant="b") == run_ids(world.b)
    for caller in (of_b, Caller(Signed(channel, token_of("b"), "a"))):
        with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
            run_ids(caller, tenant="a")
    with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
        run_ids(Caller(Signed(channel, token_of("b"), "a")))
    assert run_ids(Caller(Signed(channel, token_of("b"), "b"))) == run_ids(world.b)
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        run_ids(Caller(Signed(channel, "operator", "two\nlines")))
    assert "lattice-tenant: must have" in refusal.message


def test_run_starts_for_any_tenant_when_the_token_reaches_all(world: World) -> None:
    for caller, own in ((world.admin, "ops"), (world.operator, ""), (world.gateway, "")):
        assert run(caller).run.tenant == own
        started = run(caller, tenant="a").run
        assert started.tenant == "a"
        assert started.run_id in run_ids(world.a)
        assert world.a.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=started.run_id)).run.tenant == "a"


def test_two_tenants_may_use_the_same_id(world: World) -> None:
    run_id, workflow_id = fresh(), fresh("w")
    for caller, name in ((world.a, "a"), (world.b, "b")):
        request = workflow_pb2.CreateWorkflowRequest(workflow_id=workflow_id, spec=graph(task(name)))
        assert caller.workflows.CreateWorkflow(request).created
        made = caller.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow_id=workflow_id))
        assert made.created
        assert (made.run.run_id, made.run.tenant) == (run_id, name)
    for caller, name in ((world.a, "a"), (world.b, "b")):
        tasks = caller.tasks.ListTasks(task_pb2.ListTasksRequest(run_id=run_id)).tasks
        assert [(found.run_id, found.task_id) for found in tasks] == [(run_id, name)]
        with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
            run(caller, task("other"), run_id=run_id)
    cancelled = world.a.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id)).run
    assert cancelled.state in {run_pb2.RUN_STATE_CANCELLING, run_pb2.RUN_STATE_CANCELLED}
    spared = world.b.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id)).run
    assert spared.state == run_pb2.RUN_STATE_RUNNING
    late = world.b.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id)).run
    with refused(Code.FAILED_PRECONDITION, "RUN_ENDED") as refusal:
        world.b.workflows.AddTasks(
            workflow_pb2.AddTasksRequest(run_id=run_id, tasks=[task("more")], functions={"work": function()})
        )
    assert f"run '{late.run_id}'" in refusal.message


def test_equal_uploads_and_code_belong_to_each_tenant(world: World) -> None:
    data = fresh("content").encode()

    def upload(caller: Caller) -> str:
        written = caller.artifacts.WriteArtifact(iter([artifact_pb2.WriteArtifactRequest(data=data)]))
        found: str = written.artifact.artifact_id
        return found

    artifact_id = upload(world.a)
    with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
        read(world.b, artifact_id)
    assert upload(world.b) == artifact_id
    assert read(world.b, artifact_id) == read(world.a, artifact_id) == data
    assert read(world.admin, artifact_id) == data
    made = odd_function()
    spec = workflow_pb2.WorkflowSpec(functions={"f": made}, tasks=[task("t", function="f")])
    started = world.a.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec)).run
    request = workflow_pb2.GetRunGraphRequest(run_id=started.run_id, view=run_pb2.VIEW_FULL)
    digest = world.a.workflows.GetRunGraph(request).tasks[0].spec.function
    named = workflow_pb2.WorkflowSpec(functions={"f": {"digest": digest}}, tasks=[task("t", function="f")])
    by_digest = workflow_pb2.RunWorkflowRequest(workflow=named)
    assert world.a.workflows.RunWorkflow(by_digest).created
    with refused(Code.FAILED_PRECONDITION, "FUNCTION_MISSING"):
        world.b.workflows.RunWorkflow(by_digest)
    assert world.b.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec)).created
    assert world.b.workflows.RunWorkflow(by_digest).created


def test_added_task_is_refused_when_it_names_another_tenants_artifact(world: World) -> None:
    artifact = {"artifact_id": world.names["artifact_id"], "size_bytes": 1, "node_id": "head"}
    reading = task("more", inputs={"x": {"payload": {"artifact": artifact}}})
    for caller, is_own in ((world.a, True), (world.b, False)):
        parents = [{"run_id": run(caller).run.run_id}]
        stored = caller.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task()))).workflow
        parents.append({"workflow_id": stored.workflow_id})
        for parent in parents:
            request = workflow_pb2.AddTasksRequest(**parent, tasks=[reading], functions={"work": function()})
            if is_own:
                assert caller.workflows.AddTasks(request).revision == 2
            else:
                with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
                    caller.workflows.AddTasks(request)


def test_request_id_belongs_to_its_subject(world: World) -> None:
    request_id = fresh("request")
    for caller in (world.a, world.b):
        run_id = run(caller).run.run_id
        request = workflow_pb2.CancelRunRequest(run_id=run_id, request_id=request_id)
        assert caller.workflows.CancelRun(request).run.run_id == run_id


def test_a_token_for_reading_changes_nothing(world: World) -> None:
    for call in (
        lambda: run(world.reader),
        lambda: world.reader.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=world.names["run_id"])),
        lambda: world.reader.artifacts.WriteArtifact(iter([artifact_pb2.WriteArtifactRequest(data=b"x")])),
    ):
        with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
            call()
    assert read(world.reader, world.names["artifact_id"]) == b"what only its tenant reads"


def test_a_draft_belongs_to_the_tenant_that_sent_it(world: World) -> None:
    draft_id = fresh("draft")
    part = workflow_pb2.AddTasksRequest(draft_id=draft_id, tasks=[task("t")], functions={"work": function()})
    world.a.workflows.AddTasks(part)
    request = workflow_pb2.RunWorkflowRequest(workflow=workflow_pb2.WorkflowSpec(draft_id=draft_id))
    with refused(Code.NOT_FOUND, "DRAFT_NOT_FOUND") as of_other:
        world.b.workflows.RunWorkflow(request)
    request.workflow.draft_id = never = fresh("draft")
    with refused(Code.NOT_FOUND, "DRAFT_NOT_FOUND") as of_none:
        world.b.workflows.RunWorkflow(request)
    assert of_other.message.replace(draft_id, never) == of_none.message
    assert world.b.workflows.AddTasks(part).revision == 1, "its own draft of that id"
    request.workflow.draft_id = draft_id
    assert world.a.workflows.RunWorkflow(request).run.tenant == "a"


@pytest.mark.parametrize("where", ["input", "parameter", "run of one task", "stored workflow", "draft"])
def test_request_is_refused_when_it_names_another_tenants_artifact(world: World, where: str) -> None:
    def ask(caller: Caller) -> object:
        payload = {"artifact": {"artifact_id": world.names["artifact_id"], "size_bytes": 27, "node_id": "head"}}
        reading = graph(task("t", inputs={"x": {"payload": payload}}))
        match where:
            case "input":
                return caller.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=reading))
            case "parameter":
                given = graph(task("t", inputs={"x": {"parameter": "p"}}))
                request = workflow_pb2.RunWorkflowRequest(workflow=given, parameters={"p": payload})
                return caller.workflows.RunWorkflow(request)
            case "run of one task":
                request = task_pb2.RunTaskRequest(function=function(), task=reading.tasks[0])
                request.task.function = ""
                return caller.tasks.RunTask(request)
            case "stored workflow":
                return caller.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=reading))
            case _:
                part = {"draft_id": fresh("draft"), "tasks": reading.tasks, "functions": reading.functions}
                return caller.workflows.AddTasks(workflow_pb2.AddTasksRequest(**part))

    ask(world.a)
    with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
        ask(world.b)
