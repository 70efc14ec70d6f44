"""Owns the scopes that each method needs. Rule: a method without a row is refused to every caller.

The tenant of a run, workflow or artifact is checked where it is looked up.
"""

from collections.abc import Mapping

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from lattice_server.core.errors import AuthorizationError
from lattice_server.tokens import Scope

HEALTH = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
REFLECTION = f"/{reflection_pb2.DESCRIPTOR.services_by_name['ServerReflection'].full_name}/"
ANY = frozenset(Scope)
READ, SUBMIT = frozenset({Scope.READ}), frozenset({Scope.SUBMIT})
WORKER, ADMIN = frozenset({Scope.WORKER}), frozenset({Scope.ADMIN})
# The scopes of which a caller needs one.
NEEDED: Mapping[str, frozenset[Scope]] = {
    "/lattice.v1.ArtifactService/ReadArtifact": READ | WORKER,
    "/lattice.v1.ArtifactService/WriteArtifact": SUBMIT,
    "/lattice.v1.ClusterService/DrainNode": ADMIN,
    "/lattice.v1.ClusterService/GetServerInfo": ANY,
    "/lattice.v1.ClusterService/ListNodes": READ,
    "/lattice.v1.LlmService/StartLlm": SUBMIT,
    "/lattice.v1.ResultsService/GetResult": READ,
    "/lattice.v1.ResultsService/WatchChunks": READ,
    "/lattice.v1.ResultsService/WatchRun": READ,
    "/lattice.v1.ServicesService/GetService": READ,
    "/lattice.v1.ServicesService/ListServices": READ,
    "/lattice.v1.ServicesService/ReadServiceLogs": READ,
    "/lattice.v1.ServicesService/ScaleService": SUBMIT,
    "/lattice.v1.ServicesService/StartService": SUBMIT,
    "/lattice.v1.ServicesService/StopService": SUBMIT,
    "/lattice.v1.TaskService/CancelTask": SUBMIT,
    "/lattice.v1.TaskService/ExplainTask": READ,
    "/lattice.v1.TaskService/GetTask": READ,
    "/lattice.v1.TaskService/ListTasks": READ,
    "/lattice.v1.TaskService/RunTask": SUBMIT,
    "/lattice.v1.WorkerService/Connect": WORKER,
    "/lattice.v1.WorkerService/UploadArtifact": WORKER,
    "/lattice.v1.WorkflowService/AddEdges": SUBMIT,
    "/lattice.v1.WorkflowService/AddTasks": SUBMIT,
    "/lattice.v1.WorkflowService/CancelRun": SUBMIT,
    "/lattice.v1.WorkflowService/CreateWorkflow": SUBMIT,
    "/lattice.v1.WorkflowService/DeleteRun": SUBMIT,
    "/lattice.v1.WorkflowService/DeleteWorkflow": SUBMIT,
    "/lattice.v1.WorkflowService/ExecuteWorkflow": SUBMIT,
    "/lattice.v1.WorkflowService/ExecuteWorkflows": SUBMIT,
    "/lattice.v1.WorkflowService/GetRun": READ,
    "/lattice.v1.WorkflowService/GetRunGraph": READ,
    "/lattice.v1.WorkflowService/GetWorkflow": READ,
    "/lattice.v1.WorkflowService/ListRuns": READ,
    "/lattice.v1.WorkflowService/ListWorkflows": READ,
    "/lattice.v1.WorkflowService/OpenRun": SUBMIT,
    "/lattice.v1.WorkflowService/RetryRun": SUBMIT,
    "/lattice.v1.WorkflowService/RunWorkflow": SUBMIT,
    "/lattice.v1.WorkflowService/SignalRun": SUBMIT,
}


def check(method: str, scopes: frozenset[Scope]) -> None:
    """Let a caller with these scopes call a method. Raises AuthorizationError."""
    needed = ANY if method.startswith((HEALTH, REFLECTION)) else NEEDED.get(method, frozenset())
    if needed.isdisjoint(scopes):
        which = " or ".join(sorted(scope.value for scope in needed)) or "none there is"
        raise AuthorizationError("PERMISSION_DENIED", f"{method} needs a token with the scope {which}")
