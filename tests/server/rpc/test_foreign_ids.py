"""Ids of another tenant: every RPC answers NOT_FOUND for each, and the tenant's own call is not refused like that."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode as Code
from lattice.v1 import artifact_pb2, payload_pb2, results_pb2, task_pb2, workflow_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, fresh, function, graph, run, task
from tests.server.rpc.tenants import Signed, entry, token_of, write_tokens
from tests.server.rpc.test_tenants import METHODS

# Fields that name a thing of the caller's tenant.
IDS = frozenset({"run_id", "workflow_id", "draft_id", "source_draft_id"})
# Fields whose id the call creates, or whose thing need not exist.
CREATED = frozenset(
    {
        "TaskService.RunTask run_id",
        "WorkflowService.AddTasks draft_id",
        "WorkflowService.CreateWorkflow workflow_id",
        "WorkflowService.ExecuteWorkflow run.run_id",
        "WorkflowService.ExecuteWorkflows run.run_id",
        "WorkflowService.ExecuteWorkflows task.run_id",
        "WorkflowService.OpenRun additions.draft_id",
        "WorkflowService.OpenRun additions.run_id",
        "WorkflowService.OpenRun additions.workflow_id",
        "WorkflowService.OpenRun additions.source_draft_id",
        "WorkflowService.OpenRun opening.run.run_id",
        "WorkflowService.RunWorkflow run_id",
    }
)


# Messages in requests that have such fields.
CONTAINERS = frozenset({"WorkflowSpec", "RunWorkflowRequest", "AddTasksRequest", "OpenRunOpening", "RunTaskRequest"})


@dataclass(frozen=True)
class Names:
    """The ids of one tenant's things."""

    run_id: str
    workflow_id: str
    draft_id: str
    artifact: payload_pb2.Artifact

    @property
    def reading(self) -> task_pb2.TaskSpec:
        """A task with the artifact as its input."""
        return task("t", inputs={"x": {"payload": {"media_type": "application/json", "artifact": self.artifact}}})

    @property
    def graph(self) -> workflow_pb2.WorkflowSpec:
        """A graph of that task."""
        return graph(self.reading)

    @property
    def parameters(self) -> Mapping[str, payload_pb2.Payload]:
        """Values of parameters: the artifact."""
        return {"p": payload_pb2.Payload(media_type="application/json", artifact=self.artifact)}


Run = workflow_pb2.RunWorkflowRequest
Spec = workflow_pb2.WorkflowSpec
Add = workflow_pb2.AddTasksRequest
MORE: dict[str, Any] = {"tasks": [task("more")], "functions": {"work": function()}}
REQUESTS: dict[str, Callable[[Names], Message]] = {
    "ArtifactService.ReadArtifact artifact_id": lambda n: artifact_pb2.ReadArtifactRequest(
        artifact_id=n.artifact.artifact_id
    ),
    "ResultsService.GetResult run_id": lambda n: results_pb2.GetResultRequest(run_id=n.run_id),
    "ResultsService.WatchChunks run_id": lambda n: results_pb2.WatchChunksRequest(run_id=n.run_id),
    "ResultsService.WatchRun run_id": lambda n: results_pb2.WatchRunRequest(run_id=n.run_id),
    "TaskService.CancelTask run_id": lambda n: task_pb2.CancelTaskRequest(run_id=n.run_id, task_id="t"),
    "TaskService.ExplainTask run_id": lambda n: task_pb2.ExplainTaskRequest(run_id=n.run_id, task_id="t"),
    "TaskService.GetTask run_id": lambda n: task_pb2.GetTaskRequest(run_id=n.run_id, task_id="t"),
    "TaskService.ListTasks run_id": lambda n: task_pb2.ListTasksRequest(run_id=n.run_id),
    "TaskService.RunTask task.inputs": lambda n: task_pb2.RunTaskRequest(function=function(), task=n.reading),
    "WorkflowService.AddEdges workflow_id": lambda n: workflow_pb2.AddEdgesRequest(workflow_id=n.workflow_id),
    "WorkflowService.AddTasks run_id": lambda n: Add(run_id=n.run_id, **MORE),
    "WorkflowService.AddTasks source_draft_id": lambda n: Add(run_id=n.run_id, source_draft_id=n.draft_id),
    "WorkflowService.AddTasks workflow_id": lambda n: Add(workflow_id=n.workflow_id, **MORE),
    "WorkflowService.AddTasks tasks.inputs": lambda n: Add(
        draft_id=fresh("draft"), tasks=[n.reading], functions={"work": function()}
    ),
    "WorkflowService.CancelRun run_id": lambda n: workflow_pb2.CancelRunRequest(run_id=n.run_id),
    "WorkflowService.CreateWorkflow spec.draft_id": lambda n: workflow_pb2.CreateWorkflowRequest(
        spec=Spec(draft_id=n.draft_id)
    ),
    "WorkflowService.CreateWorkflow spec.tasks.inputs": lambda n: workflow_pb2.CreateWorkflowRequest(spec=n.graph),
    "WorkflowService.DeleteWorkflow workflow_id": lambda n: workflow_pb2.DeleteWorkflowRequest(
        workflow_id=n.workflow_id
    ),
    "WorkflowService.ExecuteWorkflow run.workflow.draft_id": lambda n: workflow_pb2.ExecuteWorkflowRequest(
        run=Run(workflow=Spec(draft_id=n.draft_id))
    ),
    "WorkflowService.ExecuteWorkflow run.workflow.tasks.inputs": lambda n: workflow_pb2.ExecuteWorkflowRequest(
        run=Run(workflow=n.graph)
    ),
    "WorkflowService.ExecuteWorkflow run.workflow_id": lambda n: workflow_pb2.ExecuteWorkflowRequest(
        run=Run(workflow_id=n.workflow_id)
    ),
    "WorkflowService.ExecuteWorkflows run.workflow.draft_id": lambda n: workflow_pb2.ExecuteWorkflowsRequest(
        run=Run(workflow=Spec(draft_id=n.draft_id))
    ),
    "WorkflowService.ExecuteWorkflows run.workflow.tasks.inputs": lambda n: workflow_pb2.ExecuteWorkflowsRequest(
        run=Run(workflow=n.graph)
    ),
    "WorkflowService.ExecuteWorkflows run.workflow_id": lambda n: workflow_pb2.ExecuteWorkflowsRequest(
        run=Run(workflow_id=n.workflow_id)
    ),
    "WorkflowService.ExecuteWorkflows task.task.inputs": lambda n: workflow_pb2.ExecuteWorkflowsRequest(
        task=task_pb2.RunTaskRequest(function=function(), task=n.reading)
    ),
    "WorkflowService.GetRun run_id": lambda n: workflow_pb2.GetRunRequest(run_id=n.run_id),
    "WorkflowService.GetRunGraph run_id": lambda n: workflow_pb2.GetRunGraphRequest(run_id=n.run_id),
    "WorkflowService.GetWorkflow workflow_id": lambda n: workflow_pb2.GetWorkflowRequest(workflow_id=n.workflow_id),
    "WorkflowService.OpenRun opening.run.workflow.draft_id": lambda n: workflow_pb2.OpenRunRequest(
        opening={"run": Run(workflow=Spec(draft_id=n.draft_id))}
    ),
    "WorkflowService.OpenRun opening.run.workflow_id": lambda n: workflow_pb2.OpenRunRequest(
        opening={"run": Run(workflow_id=n.workflow_id)}
    ),
    "WorkflowService.OpenRun opening.run_id": lambda n: workflow_pb2.OpenRunRequest(opening={"run_id": n.run_id}),
    "WorkflowService.RetryRun run_id": lambda n: workflow_pb2.RetryRunRequest(run_id=n.run_id),
    "WorkflowService.DeleteRun run_id": lambda n: workflow_pb2.DeleteRunRequest(run_id=n.run_id),
    "WorkflowService.SignalRun run_id": lambda n: workflow_pb2.SignalRunRequest(
        run_id=n.run_id, name="s", value=payload_pb2.Payload(json="1")
    ),
    "WorkflowService.RunWorkflow parameters": lambda n: Run(
        workflow=graph(task("t", inputs={"x": {"parameter": "p"}})), parameters=n.parameters
    ),
    "WorkflowService.RunWorkflow workflow.draft_id": lambda n: Run(workflow=Spec(draft_id=n.draft_id)),
    "WorkflowService.RunWorkflow workflow.tasks.inputs": lambda n: Run(workflow=n.graph),
    "WorkflowService.RunWorkflow workflow_id": lambda n: Run(workflow_id=n.workflow_id),
}


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Caller, Caller]]:
    """A server without workers, and the callers of two tenants."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    write_tokens(path, *(entry(name, tenant=name, scopes=["submit"]) for name in ("owner", "other")))
    with serving_aside(NoWorkers(), tokens_file=str(path)) as address, calling(address) as stranger:
        owner, other = (Caller(Signed(stranger.channel, token_of(name))) for name in ("owner", "other"))
        yield owner, other


def furnished(owner: Caller) -> Names:
    """Make one thing of each kind."""
    artifact = owner.artifacts.WriteArtifact(iter([artifact_pb2.WriteArtifactRequest(data=b"own")])).artifact
    workflow = owner.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task()))).workflow
    draft_id = fresh("draft")
    owner.workflows.AddTasks(Add(draft_id=draft_id, **MORE))
    return Names(run(owner).run.run_id, workflow.workflow_id, draft_id, artifact)


def status_of(caller: Caller, name: str, request: Message) -> Code:
    """Return the status with which a call ends, or that of its first response: OK unless it is a refusal."""
    method = next(method for method in METHODS if method.full_name == f"lattice.v1.{name}")
    kind = "stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary"
    stub = getattr(caller.channel, "_".join(kind))(
        f"/lattice.v1.{name.replace('.', '/')}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    try:
        response = stub(iter([request]) if method.client_streaming else request, timeout=10)
        if method.server_streaming:
            first = next(iter(response), None)
            response.cancel()
            if first is not None and "refused" in first.DESCRIPTOR.fields_by_name and first.HasField("refused"):
                return next(code for code in Code if code.value[0] == first.refused.code)
    except grpc.RpcError as error:
        found: Any = error
        code: Code = found.code()
        return code
    return Code.OK


def id_fields(message: Descriptor, path: str = "") -> Iterator[str]:
    """Yield the paths of the fields of a request that name a thing of a tenant, but for values of tasks."""
    for field in message.fields:
        if field.name in IDS or (field.name == "artifact_id" and not path):
            yield f"{path}{field.name}"
        elif field.message_type is not None and field.message_type.name in CONTAINERS:
            yield from id_fields(field.message_type, f"{path}{field.name}.")


def test_every_id_field_has_a_request() -> None:
    named = {
        f"{method.full_name.removeprefix('lattice.v1.')} {path}"
        for method in METHODS
        for path in id_fields(method.input_type)
    }
    assert named - CREATED == {name for name in REQUESTS if not name.endswith(("inputs", "parameters"))}


@pytest.mark.parametrize("name", REQUESTS)
def test_call_answers_not_found_when_an_id_is_another_tenants(callers: tuple[Caller, Caller], name: str) -> None:
    owner, other = callers
    names, method = furnished(owner), name.split(maxsplit=1)[0]
    request = REQUESTS[name](names)
    if name.endswith("source_draft_id"):
        request = Add(run_id=run(other).run.run_id, source_draft_id=names.draft_id)
    assert status_of(other, method, request) is Code.NOT_FOUND
    own = REQUESTS[name](names)
    if method == "ResultsService.WatchChunks":  # It ends with the run, which has no chunks.
        owner.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=names.run_id))
    assert status_of(owner, method, own) is not Code.NOT_FOUND
