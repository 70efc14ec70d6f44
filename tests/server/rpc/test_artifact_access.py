"""Artifacts that a worker's token reads: the inputs of the leases its subject's workers hold, and no others."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from grpc import StatusCode as Code
from lattice.v1 import artifact_pb2, payload_pb2, resources_pb2, worker_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, fresh, refused, run, task
from tests.server.rpc.tenants import Signed, entry, token_of, write_tokens

WITHIN_S = 20.0


class Worker:
    """A worker of one CPU that speaks when a test says so."""

    def __init__(self, caller: Caller, node_id: str) -> None:
        self._requests: SimpleQueue[worker_pb2.ConnectRequest | None] = SimpleQueue()
        hello = worker_pb2.Hello(
            worker_id=f"w-{node_id}",
            node_id=node_id,
            capacity=resources_pb2.Capacity(cpu=1, slots=1),
            isolations=[resources_pb2.ISOLATION_NONE],
            protocol_version=1,
        )
        self.say(hello=hello)
        self._call = caller.workers.Connect(iter(self._requests.get, None))
        assert next(self._call).HasField("welcome")

    def say(self, **message: Any) -> None:
        """Send one message."""
        self._requests.put(worker_pb2.ConnectRequest(**message))

    def assignment(self) -> worker_pb2.Assignment:
        """Return the next lease."""
        return next(response.assignments[0] for response in self._call if response.assignments)

    def leave(self) -> None:
        """End the stream."""
        self._call.cancel()
        self._requests.put(None)


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Caller]]:
    """A server that a tenant, two subjects with workers, and one that also reads for a tenant call."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    write_tokens(
        Path(path),
        entry("a", tenant="a", scopes=["submit"]),
        entry("one", scopes=["worker"]),
        entry("two", scopes=["worker"], tenant="a"),
        entry("both", scopes=["worker", "read"], tenant="a"),
    )
    with serving_aside(NoWorkers(), tokens_file=str(path)) as address, calling(address) as stranger:
        yield {name: Caller(Signed(stranger.channel, token_of(name))) for name in ("a", "one", "two", "both")}


@contextmanager
def working(caller: Caller) -> Iterator[Worker]:
    """A connected worker while the block runs."""
    worker = Worker(caller, fresh("node"))
    try:
        yield worker
    finally:
        worker.leave()


def upload(caller: Caller) -> payload_pb2.Artifact:
    """Store an artifact."""
    written = caller.artifacts.WriteArtifact(iter([artifact_pb2.WriteArtifactRequest(data=fresh("data").encode())]))
    return written.artifact


def read(caller: Caller, artifact: payload_pb2.Artifact) -> int:
    """Return how many bytes a caller reads of an artifact."""
    request = artifact_pb2.ReadArtifactRequest(artifact_id=artifact.artifact_id)
    return sum(len(part.data) for part in caller.artifacts.ReadArtifact(request))


def binding(artifact: payload_pb2.Artifact, *, is_nested: bool) -> payload_pb2.Binding:
    """Return a binding to an artifact, directly or inside a list."""
    found = payload_pb2.Binding(payload={"media_type": "application/json", "artifact": artifact})
    return payload_pb2.Binding(list={"items": [found]}) if is_nested else found


@pytest.mark.parametrize("is_nested", [False, True])
def test_worker_token_reads_inputs_of_its_leases_only(callers: dict[str, Caller], is_nested: bool) -> None:
    used, unused = upload(callers["a"]), upload(callers["a"])
    for worker_token in ("one", "two"):
        with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
            read(callers[worker_token], used)
    with working(callers["one"]) as worker:
        run(callers["a"], task("t", inputs={"x": binding(used, is_nested=is_nested)}))
        lease = worker.assignment()
        assert read(callers["one"], used) == used.size_bytes
        with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
            read(callers["one"], unused)
        with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
            read(callers["two"], used)
        worker.say(heartbeat={"held_lease_ids": [lease.lease_id], "assignment_sequence": lease.sequence})
        succeeded = {"outputs": {"out": payload_pb2.Payload(json="1")}}
        worker.say(reports=[{"sequence": 1, "lease_id": lease.lease_id, "succeeded": succeeded}])
        assert read(callers["one"], used) == used.size_bytes
        worker.say(heartbeat={"assignment_sequence": lease.sequence})
        deadline = time.monotonic() + WITHIN_S
        while (is_readable := can_read(callers["one"], used)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_readable, "the lease has ended"


def can_read(caller: Caller, artifact: payload_pb2.Artifact) -> bool:
    """Whether a caller may read an artifact."""
    try:
        with refused(Code.NOT_FOUND, "ARTIFACT_NOT_FOUND"):
            read(caller, artifact)
    except pytest.fail.Exception:
        return True
    return False


def test_token_with_scopes_worker_and_read_reads_artifacts_of_its_tenant(callers: dict[str, Caller]) -> None:
    artifact = upload(callers["a"])
    assert read(callers["both"], artifact) == artifact.size_bytes
