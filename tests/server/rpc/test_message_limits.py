"""How large one message of a caller may be. A larger one is refused, and nothing of it is read."""

import asyncio
from collections.abc import Iterator
from typing import Any
from unittest import mock

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError
from grpc import StatusCode as Code
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import cluster_pb2, task_pb2, workflow_pb2

from lattice_server.core.errors import ExhaustedError, InvalidError
from lattice_server.engine.slices import Slices
from lattice_server.rpc import request_deserializer
from lattice_server.rpc.request_deserializer import MessageLimits, RequestDeserializer, path_of
from lattice_server.rpc.server import SERVICE_NAMES
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, fresh, function, graph, refused, task

MOST_BYTES, MOST_TASKS = 200_000, 1000
RUN = "/lattice.v1.WorkflowService/RunWorkflow"
BROKEN = b"\xff"  # The beginning of a tag, and no end.


def methods() -> Iterator[tuple[str, Any]]:
    """Yield the calls of callers, by path, whose requests come in one message."""
    for name in SERVICE_NAMES:
        for method in descriptor_pool.Default().FindServiceByName(name).methods:
            if not name.endswith("WorkerService") and not method.client_streaming:
                yield f"/{name}/{method.name}", method


METHODS = dict(methods())
# Those whose requests may have many tasks, or edges.
GRAPHS = {name: path_of(method.input_type) for name, method in METHODS.items() if path_of(method.input_type)}


@pytest.fixture(scope="module")
def small() -> Iterator[Caller]:
    """A server that takes small messages only, and runs nothing."""
    settings = {"message_limit_bytes": MOST_BYTES, "message_limit_tasks": MOST_TASKS}
    with serving_aside(NoWorkers(), **settings) as address, calling(address) as caller:
        yield caller


def send(caller: Caller, name: str, data: bytes) -> Any:
    """Make a call with these bytes as its message; return the answer, or the first one, as bytes."""
    kinds = {False: caller.channel.unary_unary, True: caller.channel.unary_stream}
    call: Any = kinds[METHODS[name].server_streaming](name)
    answer = call(data, timeout=60)
    return next(answer) if METHODS[name].server_streaming else answer


def nested(path: Any, inner: bytes) -> bytes:
    """Return bytes as the message that the fields of a path but the last lead to."""
    for field in reversed(path[:-1]):
        inner = _record(field.number, inner)
    return inner


def _record(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def test_methods_with_graphs_are_found_by_their_requests() -> None:
    found = {name.rpartition("/")[2]: ".".join(field.name for field in path) for name, path in GRAPHS.items()}
    assert found == {
        "CreateWorkflow": "spec.tasks",
        "AddTasks": "tasks",
        "AddEdges": "edges",
        "RunWorkflow": "workflow.tasks",
        "ExecuteWorkflow": "run.workflow.tasks",
    }


@pytest.mark.parametrize("name", METHODS)
def test_message_is_refused_unparsed_when_it_is_over_the_limit(small: Caller, name: str) -> None:
    # No message: it would be refused otherwise if it was parsed.
    with refused(Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE") as refusal:
        send(small, name, BROKEN * (MOST_BYTES + 1))
    assert refusal.metadata == {"limit": "message_bytes", "message_bytes": str(MOST_BYTES)}
    assert f"{MOST_BYTES + 1} bytes" in refusal.message
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        send(small, name, BROKEN * MOST_BYTES)
    assert list(refusal.violations) == ["request"]


@pytest.mark.parametrize("name", GRAPHS)
def test_message_is_refused_unparsed_when_it_has_too_many_tasks(small: Caller, name: str) -> None:
    path = GRAPHS[name]
    one = _record(path[-1].number, b"")
    with refused(Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE") as refusal:
        send(small, name, nested(path, one * (MOST_TASKS + 1) + BROKEN))
    assert refusal.metadata == {"limit": "message_tasks", "message_tasks": str(MOST_TASKS)}
    assert f"more than {MOST_TASKS} {path[-1].name}" in refusal.message
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        send(small, name, nested(path, one * MOST_TASKS + BROKEN))
    assert list(refusal.violations) == ["request"]


def test_tasks_are_counted_over_all_fields_of_a_message(small: Caller) -> None:
    path = GRAPHS[RUN]
    half = nested(path, _record(path[-1].number, b"") * (MOST_TASKS // 2 + 1))
    with refused(Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"):
        send(small, RUN, half + half + BROKEN)


def test_message_is_refused_when_it_has_too_many_other_entries(small: Caller) -> None:
    label = _record(5, b"")
    with refused(Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE") as refusal:
        send(small, RUN, label * (MOST_TASKS + 1) + BROKEN)
    assert "more than 1000 entries" in refusal.message


def test_graph_is_accepted_when_it_is_at_both_limits(small: Caller) -> None:
    tasks = [task(f"t{number}") for number in range(MOST_TASKS)]
    request = workflow_pb2.RunWorkflowRequest(run_id=fresh(), workflow=graph(*tasks), labels={"pad": "x"})
    while (missing := MOST_BYTES - request.ByteSize()) > 0:
        request.labels["pad"] += "x" * max(1, missing - 8)
    data = request.SerializeToString()
    assert len(data) == MOST_BYTES
    answer = workflow_pb2.RunWorkflowResponse.FromString(send(small, RUN, data))
    assert (answer.created, answer.run.task_counts.total) == (True, MOST_TASKS)


def test_limits_are_in_the_server_info(small: Caller) -> None:
    info = small.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    assert (info.limits.message_bytes, info.limits.message_tasks) == (MOST_BYTES, MOST_TASKS)
    assert "drafts" in info.features


def test_upload_is_refused_when_a_message_is_over_the_limit(small: Caller) -> None:
    upload = small.channel.stream_unary("/lattice.v1.ArtifactService/WriteArtifact")
    with refused(Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"):
        upload(iter([BROKEN * (MOST_BYTES + 1)]), timeout=60)


def test_grpc_refuses_a_message_when_it_is_over_the_limit_of_workers() -> None:
    settings = {"worker_message_limit_bytes": 2 * MOST_BYTES, "message_limit_bytes": MOST_BYTES}
    with serving_aside(NoWorkers(), **settings) as address, calling(address) as caller:
        with pytest.raises(grpc.RpcError) as caught:
            send(caller, RUN, bytes(2 * MOST_BYTES + 1))
        error: Any = caught.value
        assert error.code() is Code.RESOURCE_EXHAUSTED


# Parsing in slices.


class CountingSlices(Slices):
    """Counts the slices; nothing else takes slices."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses = 0

    async def pause(self) -> None:
        """Count."""
        self.pauses += 1


def read(data: bytes, name: str = RUN, slices: CountingSlices | None = None) -> Any:
    """Return a request that is parsed in slices, however short it is."""
    limits = MessageLimits(10**6, MOST_TASKS)
    reader = RequestDeserializer(name, limits, slices or CountingSlices())
    return asyncio.run(reader.read(request_deserializer.Unread(data)))


specs = st.builds(
    lambda ids, name, functions: workflow_pb2.WorkflowSpec(
        tasks=[task(task_id, after=ids[:1]) for task_id in ids],
        display_name=name,
        functions={name: function() for name in functions},
    ),
    st.lists(st.text("ab", min_size=1, max_size=200), max_size=9),
    st.text(max_size=3),
    st.lists(st.sampled_from(["work", "fail"]), unique=True),
)
requests = st.one_of(
    st.builds(lambda spec: workflow_pb2.RunWorkflowRequest(workflow=spec), specs),
    st.builds(lambda text: workflow_pb2.RunWorkflowRequest(workflow_id=text), st.text(max_size=3)),
    st.builds(
        lambda text, number: workflow_pb2.RunWorkflowRequest(run_id=text, priority=number, labels={text: text}),
        st.text(max_size=3),
        st.integers(-(2**31), 2**31 - 1),
    ),
)
RECORDS = mock.patch.object(request_deserializer, "SLICE_RECORDS", 2)


@given(st.lists(requests, max_size=6))
def test_request_is_the_same_when_it_is_parsed_in_slices(parts: list[workflow_pb2.RunWorkflowRequest]) -> None:
    data = b"".join(part.SerializeToString() for part in parts)
    with RECORDS:
        found = read(data)
    whole = workflow_pb2.RunWorkflowRequest.FromString(data)
    assert found == whole
    assert found.WhichOneof("source") == whole.WhichOneof("source")


@given(st.lists(requests, max_size=3), st.binary(max_size=12), st.integers(0, 500))
def test_refusal_is_the_same_when_malformed_bytes_are_parsed_in_slices(
    parts: list[workflow_pb2.RunWorkflowRequest], noise: bytes, place: int
) -> None:
    data = b"".join(part.SerializeToString() for part in parts)
    data = data[:place] + noise + data[place:]
    with RECORDS:
        try:
            found = read(data)
        except InvalidError:
            return  # Groups are refused here, which protobuf passes over.
    try:
        whole = workflow_pb2.RunWorkflowRequest.FromString(data)
    except DecodeError as error:
        raise AssertionError("slices hid a fault") from error
    assert found == whole


def test_slice_has_at_most_its_limit_of_tasks() -> None:
    slices = CountingSlices()
    request = workflow_pb2.RunWorkflowRequest(workflow=graph(*(task(f"t{number}") for number in range(900))))
    with mock.patch.object(request_deserializer, "SLICE_RECORDS", 10):
        read(request.SerializeToString(), slices=slices)
    assert slices.pauses >= 90


def test_task_is_never_split_between_slices() -> None:
    long = task_pb2.TaskSpec(task_id="t", display_name="x" * 3 * request_deserializer.SLICE_BYTES)
    request = workflow_pb2.RunWorkflowRequest(workflow={"tasks": [long, long]})
    data = request.SerializeToString()
    limits = MessageLimits(10 * len(data), MOST_TASKS)
    deserializer = RequestDeserializer(RUN, limits, CountingSlices())
    assert asyncio.run(deserializer.read(request_deserializer.Unread(data))) == request


def additions(*counts: int) -> workflow_pb2.OpenRunRequest:
    """Return a message of an open run's stream that adds so many tasks by each of its requests."""
    tasks = [task(f"t{number}") for number in range(max(counts))]
    return workflow_pb2.OpenRunRequest(
        additions=[workflow_pb2.AddTasksRequest(request_id=f"r{count}", tasks=tasks[:count]) for count in counts]
    )


@pytest.mark.parametrize(("counts", "is_taken"), [((500, 500), True), ((600, 401), False), ((1001,), False)])
def test_tasks_are_counted_over_all_additions_in_one_message_of_an_open_run(
    counts: tuple[int, ...], is_taken: bool
) -> None:
    async def scenario() -> None:
        reader = RequestDeserializer(
            "/lattice.v1.WorkflowService/OpenRun", MessageLimits(1024 * 1024, MOST_TASKS), Slices()
        )
        message = additions(*counts)
        found = reader.deserialize(message.SerializeToString())
        if is_taken:
            assert await reader.read(found) == message
            return
        with pytest.raises(ExhaustedError) as caught:
            await reader.read(found)
        assert (caught.value.reason, caught.value.metadata["limit"]) == ("MESSAGE_TOO_LARGE", "message_tasks")

    asyncio.run(scenario())
