"""Large values from the server: what a break of the worker's stream does to one that is on its way."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from lattice.v1 import payload_pb2, results_pb2, results_pb2_grpc, worker_pb2

from lattice_worker.materials import Materials

ARTIFACT = payload_pb2.Artifact(artifact_id="large", size_bytes=3, node_id="other")


class Results(results_pb2_grpc.ResultsServiceServicer):
    """Gives the value to the second who asks."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()

    async def ReadArtifact(
        self, request: results_pb2.ReadArtifactRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[results_pb2.ReadArtifactResponse]:
        """Yield the value, or nothing ever."""
        yield results_pb2.ReadArtifactResponse(data=b"x")
        if not self.is_asked.is_set():
            self.is_asked.set()
            await asyncio.Event().wait()
        yield results_pb2.ReadArtifactResponse(data=b"yz")


def test_a_value_on_its_way_when_the_stream_breaks_comes_by_the_next_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        server, results = grpc.aio.server(), Results()
        results_pb2_grpc.add_ResultsServiceServicer_to_server(results, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}") for _ in range(2)]
        stubs = [results_pb2_grpc.ResultsServiceStub(channel) for channel in channels]
        materials = Materials(str(tmp_path), "here", lambda: stubs[0])
        attempt = worker_pb2.Attempt(inputs={"x": payload_pb2.Binding(payload=payload_pb2.Payload(artifact=ARTIFACT))})
        (fetching,) = materials.missing("", worker_pb2.Assignment(attempts=[attempt]), {})
        await results.is_asked.wait()
        del stubs[0]
        await channels[0].close()
        async with asyncio.timeout(60):
            await fetching
        assert (tmp_path / "large").read_bytes() == b"xyz"
        assert [path.name for path in tmp_path.iterdir()] == ["large"]
        await channels[1].close()
        await server.stop(None)

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["", ".", "..", "spares", "/", "../spares", "nothing"])
def test_nothing_but_a_value_is_deleted(name: str, tmp_path: Path) -> None:
    (tmp_path / "spares").mkdir()
    Materials(str(tmp_path), "here", lambda: None).drop(name)
    assert (tmp_path / "spares").is_dir()
