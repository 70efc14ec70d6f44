"""Connections of a worker: which are safe, the credentials they carry, and their absence from tasks."""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from lattice.v1 import artifact_pb2, artifact_pb2_grpc, worker_pb2, worker_pb2_grpc

from lattice_worker.channel import ChannelError, check, opened
from lattice_worker.config import WorkerConfig
from tests.certificates import Certificates, certificates
from tests.worker.head import TIMEOUT_S, Head, pair

TOKEN = "se-cret"
FAR = "10.1.2.3:1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of two authorities."""
    return certificates(tmp_path_factory.mktemp("certificates"))


def config(target: str, **more: object) -> WorkerConfig:
    return WorkerConfig(**{"target": target, "worker_id": "w", "node_id": "n", "store_directory": "", **more})


@pytest.mark.parametrize("target", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/x", "grpc://127.0.0.1:1/"])
def test_a_server_on_this_machine_needs_nothing(target: str) -> None:
    address, credentials = check(config(target))
    assert address == target.removeprefix("grpc://").rstrip("/")
    assert credentials is None


@pytest.mark.parametrize("target", [FAR, "0.0.0.0:1", "example.org:1", "127.0.0.1:1,10.1.2.3:1", "::1:1", "dns:///h:1"])
def test_a_server_elsewhere_needs_both(target: str, made: Certificates) -> None:
    for more, missing in (
        ({}, "without TLS and a token: set LATTICE_TLS_CA.*, and LATTICE_TOKEN"),
        ({"token": TOKEN}, "without TLS: set LATTICE_TLS_CA"),
        ({"tls_ca": str(made.ca)}, "without a token: set LATTICE_TOKEN"),
    ):
        with pytest.raises(ChannelError, match=missing) as caught:
            check(config(target, **more))
        assert TOKEN not in str(caught.value)
    for safe in (config(f"grpcs://{target}", token=TOKEN), config(target, token=TOKEN, tls_ca=str(made.ca))):
        address, credentials = check(safe)
        assert address == target
        assert credentials is not None
        assert TOKEN not in repr(safe)


def test_going_without_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert check(config("10.9.9.9:1", insecure=True)) == ("10.9.9.9:1", None)
    (record,) = caplog.records
    assert "10.9.9.9:1 is dialled without TLS and a token" in record.getMessage()


def test_a_file_is_named_when_it_cannot_be_used(made: Certificates, tmp_path: Path) -> None:
    for more, text in (
        ({"tls_ca": str(tmp_path / "ghost")}, "LATTICE_TLS_CA .*No such file"),
        ({"tls_ca": str(made.key)}, "LATTICE_TLS_CA .*no certificates"),
        ({"tls_cert": str(made.cert), "tls_key": str(made.caller_key)}, "LATTICE_TLS_CERT .*LATTICE_TLS_KEY"),
        ({"tls_cert": str(made.cert)}, "need each other"),
        ({"token": "line\n"}, "LATTICE_TOKEN must be printable"),
    ):
        with pytest.raises(ChannelError, match=text):
            check(config("127.0.0.1:1", **more))


def test_the_command_refuses_a_connection_that_is_not_safe() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LATTICE_")}
    command = [sys.executable, "-m", "lattice_worker", "--addr", FAR, "--worker-id", "w", "--node-id", "n"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"lattice_worker: {FAR} is not this machine")


class Reader(artifact_pb2_grpc.ArtifactServiceServicer):
    """Answers with the metadata it was sent."""

    async def ReadArtifact(self, request: object, context: grpc.aio.ServicerContext) -> object:
        """Answer once."""
        yield artifact_pb2.ReadArtifactResponse(data=str(dict(context.invocation_metadata())["authorization"]).encode())


def test_every_call_is_encrypted_and_carries_the_token(made: Certificates) -> None:
    async def scenario() -> None:
        head, server = Head(), grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(head, server)
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(Reader(), server)
        pairs = [(made.key.read_bytes(), made.cert.read_bytes())]
        credentials = grpc.ssl_server_credentials(pairs, made.ca.read_bytes(), require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        files = {"tls_ca": made.ca, "tls_cert": made.caller_cert, "tls_key": made.caller_key}
        dialled = config(f"127.0.0.1:{port}", token=TOKEN, **{name: str(path) for name, path in files.items()})
        async with asyncio.timeout(TIMEOUT_S), opened(dialled) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Connect()
            await call.write(worker_pb2.ConnectRequest(hello=worker_pb2.Hello(worker_id="w")))
            stream, hello = await head.dialled()
            assert (stream.credentials, hello.worker_id) == (f"Bearer {TOKEN}", "w")
            stream.drop()
            read = artifact_pb2_grpc.ArtifactServiceStub(channel).ReadArtifact(artifact_pb2.ReadArtifactRequest())
            assert [answer.data async for answer in read] == [f"Bearer {TOKEN}".encode()]
        await server.stop(None)

    asyncio.run(scenario())


def test_no_task_finds_how_the_worker_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LATTICE_TLS_CA", "LATTICE_TLS_CERT", "LATTICE_TLS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LATTICE_INSECURE", "1")

    def environment() -> dict[str, str]:
        return dict(os.environ)

    async def scenario() -> None:
        async with pair(tmp_path) as both:
            assert both.stream.credentials == "Bearer secret"
            both.stream.assign("l", environment)
            found = await both.stream.value("l")
            assert {name for name in found if name.startswith("LATTICE_")} <= {"LATTICE_WORKER_ID", "LATTICE_TARGET"}
            assert "secret" not in found.values()

    asyncio.run(scenario())
