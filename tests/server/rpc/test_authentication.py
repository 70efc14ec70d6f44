"""Authentication and authorisation: every method, with every kind of wrong token."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode as Code
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lattice import v1
from lattice.v1 import artifact_pb2, cluster_pb2, results_pb2, worker_pb2
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lattice_server.core.errors import AuthorizationError
from lattice_server.core.messages import SchedulerEvent
from lattice_server.engine.ports import Contact
from lattice_server.rpc import authorization
from lattice_server.tokens import Scope
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, fresh, refused, run
from tests.server.rpc.tenants import bearer, entry, token_of, write_tokens

TOKEN = "se-cret"
MODULES = [importlib.import_module(f"lattice.v1.{path.stem}") for path in Path(v1.__path__[0]).glob("*_pb2.py")]
METHODS = [m for file in MODULES for s in file.DESCRIPTOR.services_by_name.values() for m in s.methods]
CONNECT = "lattice.v1.WorkerService.Connect"
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].methods
GUARDED = [method for method in (*METHODS, *REFLECTION) if method.full_name != CONNECT]
# The subjects with a token each, and its scope.
SCOPES = {"reader": ["read"], "submitter": ["submit"], "worker": ["worker"], "admin": ["admin"]}
READERS, SUBMITTERS = {"reader", "submitter", "admin", "operator"}, {"submitter", "admin", "operator"}
ADMINS, WORKERS = {"admin", "operator"}, {"worker", "the server's worker", "operator"}
# The subjects that may call each RPC by the network. `test_tenants` has the limits between tenants.
MAY_CALL = {
    "lattice.v1.ArtifactService.ReadArtifact": READERS | WORKERS,
    "lattice.v1.ArtifactService.WriteArtifact": SUBMITTERS,
    "lattice.v1.ClusterService.DrainNode": ADMINS,
    "lattice.v1.ClusterService.GetServerInfo": READERS | WORKERS,
    "lattice.v1.ClusterService.ListNodes": READERS,
    "lattice.v1.LlmService.StartLlm": SUBMITTERS,
    "lattice.v1.ResultsService.GetResult": READERS,
    "lattice.v1.ResultsService.WatchChunks": READERS,
    "lattice.v1.ResultsService.WatchRun": READERS,
    "lattice.v1.ServicesService.GetService": READERS,
    "lattice.v1.ServicesService.ListServices": READERS,
    "lattice.v1.ServicesService.ReadServiceLogs": READERS,
    "lattice.v1.ServicesService.ScaleService": SUBMITTERS,
    "lattice.v1.ServicesService.StartService": SUBMITTERS,
    "lattice.v1.ServicesService.StopService": SUBMITTERS,
    "lattice.v1.TaskService.CancelTask": SUBMITTERS,
    "lattice.v1.TaskService.ExplainTask": READERS,
    "lattice.v1.TaskService.GetTask": READERS,
    "lattice.v1.TaskService.ListTasks": READERS,
    "lattice.v1.TaskService.RunTask": SUBMITTERS,
    "lattice.v1.WorkerService.Connect": WORKERS,
    "lattice.v1.WorkerService.UploadArtifact": WORKERS,
    "lattice.v1.WorkflowService.AddEdges": SUBMITTERS,
    "lattice.v1.WorkflowService.AddTasks": SUBMITTERS,
    "lattice.v1.WorkflowService.CancelRun": SUBMITTERS,
    "lattice.v1.WorkflowService.RetryRun": SUBMITTERS,
    "lattice.v1.WorkflowService.CreateWorkflow": SUBMITTERS,
    "lattice.v1.WorkflowService.DeleteRun": SUBMITTERS,
    "lattice.v1.WorkflowService.DeleteWorkflow": SUBMITTERS,
    "lattice.v1.WorkflowService.ExecuteWorkflow": SUBMITTERS,
    "lattice.v1.WorkflowService.ExecuteWorkflows": SUBMITTERS,
    "lattice.v1.WorkflowService.GetRun": READERS,
    "lattice.v1.WorkflowService.GetRunGraph": READERS,
    "lattice.v1.WorkflowService.GetWorkflow": READERS,
    "lattice.v1.WorkflowService.ListRuns": READERS,
    "lattice.v1.WorkflowService.ListWorkflows": READERS,
    "lattice.v1.WorkflowService.OpenRun": SUBMITTERS,
    "lattice.v1.WorkflowService.RunWorkflow": SUBMITTERS,
    "lattice.v1.WorkflowService.SignalRun": SUBMITTERS,
}
SUBJECTS = ["nobody", *SCOPES, "operator", "the server's worker"]
# The answers to an empty request that passed authorisation.
PASSES = {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND}

Metadata = Sequence[tuple[str, str]]


class Witness(NoWorkers):
    """Starts nothing, and remembers how workers would reach the server."""

    def __init__(self) -> None:
        self.contact: Contact | None = None

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Remember."""
        self.contact = contact


@pytest.fixture(scope="module")
def witness() -> Witness:
    """The executor of the server."""
    return Witness()


@pytest.fixture(scope="module")
def guarded(witness: Witness, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A caller, without a token, of a server that has some."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    write_tokens(path, *(entry(subject, tenant="t", scopes=scopes) for subject, scopes in SCOPES.items()))
    with serving_aside(witness, token=TOKEN, tokens_file=str(path)) as address, calling(address) as caller:
        yield caller


def call(channel: grpc.Channel, method: MethodDescriptor, metadata: Metadata) -> None:
    """Call a method with an empty request and read the answer to its end."""
    service, _, name = method.full_name.rpartition(".")
    kind = "stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary"
    make: Any = getattr(channel, "_".join(kind))
    response = GetMessageClass(method.output_type)
    stub = make(
        f"/{service}/{name}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=response.FromString,
    )
    request = GetMessageClass(method.input_type)()
    answer = stub(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=30)
    if method.server_streaming:
        for _ in answer:
            pass


def outcome(channel: grpc.Channel, method: MethodDescriptor, metadata: Metadata) -> Code:
    """Return the status a call ends with."""
    try:
        call(channel, method, metadata)
    except grpc.RpcError as error:
        found: Any = error
        return found.code()
    return Code.OK


@pytest.mark.parametrize("method", GUARDED, ids=lambda method: method.full_name)
@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ((), "needs a token"),
        (bearer("wrong"), "not valid"),
        (bearer(""), "not valid"),
        (bearer(TOKEN[:-1]), "not valid"),
        ((("authorization", TOKEN),), "not valid"),
        ((("authorization", f"Basic {TOKEN}"),), "not valid"),
        ((("token", TOKEN),), "needs a token"),
    ],
)
def test_every_method_is_refused_when_the_token_is_missing(
    guarded: Caller, method: MethodDescriptor, metadata: Metadata, text: str
) -> None:
    with refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED") as refusal:
        call(guarded.channel, method, metadata)
    assert text in refusal.message
    assert TOKEN not in refusal.message


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_rpc_ends_as_the_table_says_when_called_by(
    guarded: Caller, witness: Witness, method: MethodDescriptor, subject: str
) -> None:
    assert witness.contact is not None
    tokens = {name: token_of(name) for name in SCOPES}
    tokens |= {"operator": TOKEN, "the server's worker": witness.contact.issue("n", "s")}
    assert method.full_name in MAY_CALL, "an RPC needs a row that says which subjects may call it"
    refusal = Code.UNAUTHENTICATED if subject == "nobody" else Code.PERMISSION_DENIED
    if method.full_name == CONNECT:
        refusal = Code.OK  # said in band
    found = outcome(guarded.channel, method, bearer(tokens[subject]) if subject in tokens else ())
    assert found in (PASSES if subject in MAY_CALL[method.full_name] else {refusal})


def test_method_is_refused_when_it_has_no_row() -> None:
    with pytest.raises(AuthorizationError):
        authorization.check("/lattice.v1.WorkflowService/Forgotten", frozenset(Scope))


@pytest.mark.parametrize("subject", ["reader", "submitter", "admin"])
def test_worker_stream_is_closed_when_the_token_lacks_the_scope(guarded: Caller, subject: str) -> None:
    answer = first_answer(guarded, bearer(token_of(subject)))
    assert answer.close.reason == worker_pb2.CLOSE_REASON_UNAUTHENTICATED
    assert "the scope worker" in answer.close.message


def test_call_needs_no_token_when_it_comes_by_the_servers_own_socket(guarded: Caller, witness: Witness) -> None:
    assert witness.contact is not None
    with calling(witness.contact.local_target) as beside:
        created = run(beside, run_id=fresh()).run
        request = results_pb2.GetResultRequest(run_id=created.run_id, wait=Duration(nanos=1))
        assert beside.results.GetResult(request).run.run_id == created.run_id
        list(reflected(beside.channel, ()))
        with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
            list(beside.artifacts.ReadArtifact(artifact_pb2.ReadArtifactRequest(artifact_id="sha256:0")))
        assert first_answer(beside, ()).HasField("welcome")


def test_health_needs_no_token(guarded: Caller) -> None:
    health = health_pb2_grpc.HealthStub(guarded.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def reflected(channel: grpc.Channel, metadata: Metadata) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="*")
    (answer,) = stub.ServerReflectionInfo(iter([asked]), metadata=metadata)
    return [service.name for service in answer.list_services_response.service]


def test_reflection_answers_when_the_token_is_valid(guarded: Caller) -> None:
    assert "lattice.v1.WorkflowService" in reflected(guarded.channel, bearer(TOKEN))


def first_answer(caller: Caller, metadata: Metadata, node_id: str = "") -> worker_pb2.ConnectResponse:
    """Return the first response to a worker, and cancel the stream."""
    hello = worker_pb2.Hello(worker_id=fresh("w"), node_id=node_id or fresh("n"), protocol_version=1)
    return said_first(caller, worker_pb2.ConnectRequest(hello=hello), metadata)


def said_first(
    caller: Caller, message: worker_pb2.ConnectRequest | None, metadata: Metadata
) -> worker_pb2.ConnectResponse:
    """Return the first thing the server says on a stream that begins with a message, or without any."""
    said: SimpleQueue[worker_pb2.ConnectRequest | None] = SimpleQueue()
    if message is not None:
        said.put(message)
    # The stream stays open: a worker that ends its side at once gets no response.
    call = caller.workers.Connect(iter(said.get, None), metadata=metadata)
    answer: worker_pb2.ConnectResponse = next(call)
    said.put(None)
    call.cancel()
    return answer


@pytest.mark.parametrize("metadata", [(), bearer("wrong")])
@pytest.mark.parametrize("first", ["hello", "join", ""])
def test_worker_stream_is_closed_when_the_token_is_missing(guarded: Caller, metadata: Metadata, first: str) -> None:
    messages = {
        "hello": worker_pb2.ConnectRequest(hello=worker_pb2.Hello(worker_id="w", node_id="n")),
        "join": worker_pb2.ConnectRequest(join=worker_pb2.Join(node_id="n")),
        "": worker_pb2.ConnectRequest(),
    }
    answer = said_first(guarded, messages[first], metadata)
    assert answer.close.reason == worker_pb2.CLOSE_REASON_UNAUTHENTICATED
    assert TOKEN not in answer.close.message
    nodes = guarded.cluster.ListNodes(cluster_pb2.ListNodesRequest(), metadata=bearer(TOKEN)).nodes
    assert "n" not in {node.node_id for node in nodes}


def test_worker_stream_is_closed_before_its_first_message_when_the_token_is_wrong(guarded: Caller) -> None:
    answer = said_first(guarded, None, bearer("wrong"))
    assert answer.close.reason == worker_pb2.CLOSE_REASON_UNAUTHENTICATED


NOT_A_MESSAGE = b"\xff"


@pytest.mark.parametrize("method", GUARDED, ids=lambda method: method.full_name)
def test_request_is_not_decoded_when_the_token_is_missing(guarded: Caller, method: MethodDescriptor) -> None:
    service, _, name = method.full_name.rpartition(".")
    stub = guarded.channel.stream_stream(f"/{service}/{name}")
    with refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED"):
        list(stub(iter([NOT_A_MESSAGE]), timeout=30))


def test_health_of_the_whole_server_is_shown_when_the_token_is_missing(guarded: Caller) -> None:
    check = guarded.channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    assert check(NOT_A_MESSAGE, timeout=30).status == health_pb2.HealthCheckResponse.SERVING
    request = health_pb2.HealthCheckRequest(service="nothing")
    health = health_pb2_grpc.HealthStub(guarded.channel)
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(request, metadata=bearer(TOKEN))
    assert caught.value.code() is Code.NOT_FOUND


def test_worker_is_admitted_when_its_token_is_configured_or_issued(guarded: Caller, witness: Witness) -> None:
    assert witness.contact is not None
    node_id = fresh("n")
    issued = witness.contact.issue(node_id, "its owner")
    assert first_answer(guarded, bearer(TOKEN)).HasField("welcome")
    assert first_answer(guarded, bearer(issued), node_id).HasField("welcome")
    assert "not for node" in first_answer(guarded, bearer(issued), "another").close.message
    witness.contact.revoke(issued)
    assert first_answer(guarded, bearer(issued), node_id).close.reason == worker_pb2.CLOSE_REASON_UNAUTHENTICATED


def test_scheme_is_accepted_when_it_is_in_lower_case(guarded: Caller) -> None:
    metadata = (("authorization", f"bearer {TOKEN}"),)
    assert guarded.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest(), metadata=metadata).executor == "none"


@pytest.mark.parametrize("metadata", [(), bearer(TOKEN)])
@pytest.mark.parametrize("method", ["/lattice.v1.WorkflowService/Nothing", "/grpc.health.v1.Health/List"])
def test_call_is_unimplemented_when_its_method_is_unknown(
    guarded: Caller, method: str, metadata: Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        guarded.channel.unary_unary(method)(b"", metadata=metadata)
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert not caplog.records


def test_refused_calls_are_traced_with_their_status(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with (
        serving_aside(NoWorkers(), token=TOKEN) as address,
        calling(address) as caller,
        refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    ):
        caller.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    codes = [(span.attributes or {}).get("rpc.grpc.status_code") for span in exporter.get_finished_spans()]
    assert codes == [Code.UNAUTHENTICATED.value[0]]
