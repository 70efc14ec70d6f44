"""A machine that joins a cluster: the server it belongs to, its Ray node, and how it leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import worker_pb2, worker_pb2_grpc

from lattice_worker import node_join
from lattice_worker.config import WorkerConfig
from lattice_worker.machine.ray_node import RayNode, version
from lattice_worker.node_join import Joiner
from tests.worker.head import Head, Stream

TIMEOUT_S = 30.0
LONG = Duration(seconds=3600)
SOON = Duration(nanos=50_000_000)
FIRST, SECOND = (worker_pb2.RayCluster(address=f"10.0.0.1:{n}", token="t", resource="r") for n in (1, 2))


class Node(RayNode):
    """A Ray node that only notes calls."""

    notes: ClassVar[list[str]] = []

    def start(self) -> None:
        """Note it."""
        self.notes.append(f"start {self._cluster.address}")

    async def stop(self, *, at_once: bool = False) -> None:
        """Note it."""
        self.notes.append(f"stop {self._cluster.address}{' at once' if at_once else ''}")


class Scene:
    """A head and a machine that joins it."""

    def __init__(self, head: Head, target: str, folder: Path) -> None:
        self.head = head
        config = WorkerConfig(target, "w", "m", str(folder), num_cpus=2, num_gpus=0, labels={"zone": "eu"})
        self.joiner = Joiner(config)
        self.running = asyncio.create_task(self.joiner.run())

    async def dialled(self) -> tuple[Stream, worker_pb2.Join]:
        """Wait for the machine's next stream; return it and the offer."""
        stream = await self.head.streams.get()
        return stream, (await stream.requests.get()).join

    async def joined(self, cluster: worker_pb2.RayCluster = FIRST, **more: Duration) -> Stream:
        """Take the machine in, on its next stream."""
        stream, _ = await self.dialled()
        take_in(stream, cluster, **more)
        return stream


def take_in(stream: Stream, cluster: worker_pb2.RayCluster | None, **more: Duration) -> None:
    known = {"heartbeat_interval": LONG, "silence_limit": LONG}
    stream.say(joined=worker_pb2.Joined(ray=cluster, **known | more))


def close(stream: Stream, reason: str) -> None:
    stream.say(close=worker_pb2.Close(reason=worker_pb2.CloseReason.Value(f"CLOSE_REASON_{reason}"), message="so"))


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    """A head and a machine while the block runs."""
    head, server = Head(), grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(head, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    found = Scene(head, f"127.0.0.1:{port}", folder)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield found
    finally:
        found.running.cancel()
        await asyncio.wait({found.running})
        await server.stop(None)


def play(
    scenario: Callable[[Scene], Coroutine[Any, Any, None]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Play a scenario; return the calls of Ray nodes."""
    monkeypatch.setattr(node_join, "RayNode", Node)
    # The server that accepted it sets the limit of silence.
    monkeypatch.setattr(node_join, "DIAL_S", 2 * TIMEOUT_S)
    monkeypatch.setattr(Node, "notes", [])

    async def run() -> None:
        async with scene(folder) as found:
            await scenario(found)

    asyncio.run(run())
    return Node.notes


def test_a_machine_starts_ray_when_a_server_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(found: Scene) -> None:
        stream, offer = await found.dialled()
        assert (offer.node_id, offer.node_ip, offer.capacity.cpu) == ("m", "127.0.0.1", 2)
        assert dict(offer.labels) == {"zone": "eu"}
        take_in(stream, FIRST, heartbeat_interval=SOON)
        for _ in range(2):
            assert (await stream.requests.get()) == worker_pb2.ConnectRequest(), "a sign of life"
        assert Node.notes == ["start 10.0.0.1:1"]
        close(stream, "DRAINED")
        await found.running
        assert found.joiner.refusal == ""

    assert play(scenario, tmp_path, monkeypatch) == ["start 10.0.0.1:1", "stop 10.0.0.1:1"]
    assert capsys.readouterr().out.count("as node m") == 1


@pytest.mark.parametrize("how", ["the stream breaks", "nothing is heard", "the cluster starts anew"])
def test_a_machine_keeps_its_ray_node_when_it_reconnects_to_the_same_cluster(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(found: Scene) -> None:
        stream = await found.joined(silence_limit=SOON if how == "nothing is heard" else LONG)
        match how:
            case "the stream breaks":
                stream.drop()
            case "the cluster starts anew":
                close(stream, "SHUTDOWN")
        stream = await found.joined()
        stream.drop()
        await found.joined(SECOND)
        while "start 10.0.0.1:2" not in Node.notes:
            await asyncio.sleep(0.01)

    notes = play(scenario, tmp_path, monkeypatch)
    assert notes == ["start 10.0.0.1:1", "stop 10.0.0.1:1 at once", "start 10.0.0.1:2", "stop 10.0.0.1:2"]
    assert capsys.readouterr().out.count("as node m") == 3


@pytest.mark.parametrize("is_known", [True, False])
def test_a_machine_joins_a_ray_of_its_own_version_only(
    is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(found: Scene) -> None:
        other = worker_pb2.RayCluster(address="10.0.0.1:1", version=version() if is_known else "ray 0.1 on python 2.7")
        stream = await found.joined(other)
        if is_known:
            close(stream, "DRAINED")
        await found.running
        assert ("ray 0.1 on python 2.7" in found.joiner.refusal) is not is_known

    assert bool(play(scenario, tmp_path, monkeypatch)) is is_known


def test_a_machine_that_is_refused_says_why_and_does_not_ask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(found: Scene) -> None:
        stream, _ = await found.dialled()
        close(stream, "PROTOCOL_ERROR")
        await found.running
        assert found.joiner.refusal == "PROTOCOL_ERROR: so"

    assert play(scenario, tmp_path, monkeypatch) == []


def test_a_machine_asks_to_leave_once_on_every_stream_on_which_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(found: Scene) -> None:
        stream, _ = await found.dialled()
        found.joiner.leave(7.5)
        await asyncio.sleep(0.1)
        assert stream.requests.empty(), "it does not belong yet"
        take_in(stream, FIRST, heartbeat_interval=SOON)
        for _ in range(2):
            # A heartbeat may come first: it knows how often only once it belongs.
            heard = [await stream.requests.get() for _ in range(3)]
            wishes = [request.draining for request in heard if request.HasField("draining")]
            assert [wish.deadline.ToTimedelta().total_seconds() for wish in wishes] == [7.5]
            stream.drop()
            stream = await found.joined(heartbeat_interval=SOON)
        close(stream, "DRAINED")
        await found.running

    play(scenario, tmp_path, monkeypatch)


def test_a_machine_that_is_to_serve_its_node_itself_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(found: Scene) -> None:
        stream = await found.joined()
        stream.drop()
        stream, _ = await found.dialled()
        take_in(stream, None)
        served = await found.head.streams.get()
        hello = (await served.requests.get()).hello
        assert hello.node_id == "m"
        assert Node.notes == ["start 10.0.0.1:1", "stop 10.0.0.1:1"]
        await stream.is_over.wait()
        close(served, "UNAUTHENTICATED")
        await found.running
        assert found.joiner.refusal

    play(scenario, tmp_path, monkeypatch)


def test_a_machine_that_is_leaving_does_not_begin_to_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(found: Scene) -> None:
        stream, _ = await found.dialled()
        found.joiner.leave(1.0)
        take_in(stream, None)
        await found.running
        assert found.head.streams.empty()

    assert play(scenario, tmp_path, monkeypatch) == []


def test_an_unreachable_server_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Joiner):
        """Counts how often it dials."""

        dials = 0

        async def _hold_stream(self) -> bool:
            self.dials += 1
            return await super()._hold_stream()

    async def run() -> None:
        # Nothing listens there.
        joiner = Counting(WorkerConfig("unix:" + str(tmp_path / "nobody.sock"), "w", "m", str(tmp_path)))
        running = asyncio.create_task(joiner.run())
        async with asyncio.timeout(TIMEOUT_S):
            while joiner.dials < 3:
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(run())
    assert [record.levelname for record in caplog.records if "cannot be reached" in record.message] == ["WARNING"]


def test_joining_ends_when_it_is_cancelled_while_its_stream_fails(tmp_path: Path) -> None:
    class Swallowing(Joiner):
        """Fails when it is cancelled, as a stream of gRPC may."""

        async def _hold_stream(self) -> bool:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.get_running_loop().create_future()
            return False

    async def run() -> None:
        joining = asyncio.create_task(Swallowing(WorkerConfig("unix:none", "w", "m", str(tmp_path))).run())
        await asyncio.sleep(0)
        joining.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(asyncio.CancelledError):
                await joining

    asyncio.run(run())
