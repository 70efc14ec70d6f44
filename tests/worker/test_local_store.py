"""What attempts need before they start: whole or not there, fetched once, and tried again only where that may help."""

import asyncio
import errno
import os
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from lattice.v1 import artifact_pb2, artifact_pb2_grpc, payload_pb2, task_pb2, worker_pb2

from lattice_worker.session import artifact_upload
from lattice_worker.store import local_store as store_module
from lattice_worker.store.artifact_staging import PREFIX, ArtifactStaging
from lattice_worker.store.local_store import LocalStore, MissingError
from lattice_worker.store.peer_fetch import PeerFetcher

BYTES = b"some bytes"
DIGEST = "sha256:code"
ELSEWHERE = payload_pb2.Artifact(artifact_id="value", size_bytes=len(BYTES), node_id="a")
LARGE = payload_pb2.Artifact(artifact_id="large", size_bytes=3, node_id="a")
HERE = payload_pb2.Artifact(artifact_id="value", size_bytes=len(BYTES), node_id="b")

Answer = bytes | grpc.StatusCode
StatusCode = grpc.StatusCode


class Server:
    """The server's results service: answers each question with the next of these, the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def ReadArtifact(
        self, request: artifact_pb2.ReadArtifactRequest
    ) -> AsyncIterator[artifact_pb2.ReadArtifactResponse]:
        """Send bytes, in two pieces, or end with a status."""
        self.asked.append(request.artifact_id)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, grpc.StatusCode):
            raise grpc.aio.AioRpcError(answer, grpc.aio.Metadata(), grpc.aio.Metadata(), "a reason")
        for data in (answer[:4], answer[4:]):
            yield artifact_pb2.ReadArtifactResponse(data=data)


class Bringer(PeerFetcher):
    """A fetcher that always, or never, fetches."""

    def __init__(self, *, brings: bool) -> None:
        self.brings = brings

    async def bring(self, node_id: str, path: Path, size_bytes: int) -> bool:
        """Bring it, or not."""
        assert (node_id, size_bytes) == (ELSEWHERE.node_id, len(BYTES))
        if self.brings:
            path.write_bytes(BYTES)
        return self.brings


class Scene:
    """The local_store of node `b`, and the server; `is_connected` is whether that can be asked."""

    def __init__(self, folder: Path, *answers: Answer, fetcher: PeerFetcher | None = None) -> None:
        self.server = Server(*answers)
        self.connected: list[bool] = []
        self.local_store = LocalStore(str(folder), "b", staging(folder), self._connect, fetcher)

    def _connect(self) -> Any:
        return self.server if not self.connected or self.connected.pop(0) else None

    async def fetch(self, *bindings: payload_pb2.Binding) -> int:
        """Fetch all that attempts with these inputs need; return how many transfers that took."""
        attempts = [worker_pb2.Attempt(inputs={"x": binding}) for binding in bindings or (value(ELSEWHERE),)]
        upstream = {"out": payload_pb2.Payload(artifact=ELSEWHERE)}
        waits = self.local_store.missing("", worker_pb2.Assignment(attempts=attempts), upstream)
        await asyncio.gather(*waits)
        return len(waits)


@pytest.fixture(autouse=True)
def is_hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "RETRY_S", 0.0)


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def value(artifact: payload_pb2.Artifact) -> payload_pb2.Binding:
    """Return a binding to a large value."""
    return payload_pb2.Binding(payload=payload_pb2.Payload(artifact=artifact))


def bundle(data: bytes) -> task_pb2.CodeBundle:
    return task_pb2.CodeBundle(digest=DIGEST, zip=data)


def zipped() -> bytes:
    """Return an archive of one module."""
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("module.py", "x = 1")
    return data.getvalue()


def staging(folder: Path) -> ArtifactStaging:
    """Return staging for what arrives in a folder."""
    made = ArtifactStaging(str(folder))
    made.incoming.mkdir(parents=True)
    return made


def names(folder: Path) -> set[str]:
    """Return the names of the artifacts in a folder, and of incomplete ones."""
    there = {entry.name for entry in folder.iterdir() if not entry.name.startswith(PREFIX)}
    return there | {entry.name for entry in folder.glob(f"{PREFIX}*/*/*")}


def test_an_artifact_is_fetched_once_when_several_attempts_need_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path, BYTES)
        await asyncio.gather(scene.fetch(value(ELSEWHERE), value(ELSEWHERE)), scene.fetch())
        assert scene.server.asked == ["value"]
        assert await scene.fetch() == 0, "it is there"
        with scene.local_store.open("value") as file:
            assert file.read() == BYTES
        assert names(tmp_path) == {"value"}

    play(scenario)


@pytest.mark.parametrize(
    ("binding", "count"),
    [
        (payload_pb2.Binding(list=payload_pb2.BindingList(items=[value(ELSEWHERE)])), 1),
        (payload_pb2.Binding(map=payload_pb2.BindingMap(entries={"a": value(ELSEWHERE)})), 1),
        (payload_pb2.Binding(output=payload_pb2.OutputRef(output="out")), 1),
        (payload_pb2.Binding(payload=payload_pb2.Payload(json="1")), 0),
        (value(HERE), 0),
    ],
)
def test_it_is_found_wherever_an_input_has_it(binding: payload_pb2.Binding, count: int, tmp_path: Path) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path, BYTES)
        assert await scene.fetch(binding) == count
        assert len(scene.server.asked) == count

    play(scenario)


@pytest.mark.parametrize("answer", [BYTES[:5], BYTES + b"!", StatusCode.UNAVAILABLE, StatusCode.CANCELLED])
def test_a_fetch_is_retried_when_the_error_may_pass(answer: Answer, tmp_path: Path) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path, answer, BYTES)
        scene.connected = [False, True]
        await scene.fetch()
        assert len(scene.server.asked) == 2
        assert (tmp_path / "value").read_bytes() == BYTES

    play(scenario)


@pytest.mark.parametrize(
    ("answer", "count"),
    [(StatusCode.NOT_FOUND, 1), (StatusCode.UNAVAILABLE, store_module.RETRIES), (BYTES[:5], store_module.RETRIES)],
)
def test_a_fetch_that_fails_raises_and_leaves_no_file(answer: Answer, count: int, tmp_path: Path) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path, answer)
        with pytest.raises(MissingError, match="node 'a'"):
            await scene.fetch()
        assert len(scene.server.asked) == count
        assert not names(tmp_path)
        # A later attempt may succeed.
        scene.server.answers = [BYTES]
        assert await scene.fetch() == 1
        assert names(tmp_path) == {"value"}

    play(scenario)


@pytest.mark.parametrize("brings", [True, False])
def test_the_server_is_asked_when_the_fetcher_brings_nothing(brings: bool, tmp_path: Path) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path, BYTES, fetcher=Bringer(brings=brings))
        await scene.fetch()
        assert len(scene.server.asked) == (0 if brings else 1)
        assert names(tmp_path) == {"value"}

    play(scenario)


def test_values_are_dropped_and_code_stays(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()

    async def scenario() -> None:
        found = Scene(store).local_store
        found.bundles.learn([bundle(zipped())])
        await asyncio.gather(*found.missing(DIGEST, worker_pb2.Assignment(), {}))
        for name in ("store/one", "store/two", "store/three", "beside"):
            (tmp_path / name).write_bytes(BYTES)
        found.drop(["one"])
        found.drop(["one"])
        found.drop(["../beside"])
        assert names(store) == {"two", "three", "bundles"}
        assert set(found.stored()) == {"two", "three"}
        found.drop(["two", "three"])
        assert names(store) == {"bundles"}
        assert names(tmp_path) == {"store", "beside"}

    play(scenario)


def test_code_is_waited_for_until_it_is_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = Scene(tmp_path).local_store
        assert found.bundles.path("") == ""
        found.bundles.learn([bundle(zipped())])
        (wait,) = found.missing(DIGEST, worker_pb2.Assignment(), {})
        await wait
        assert not found.missing(DIGEST, worker_pb2.Assignment(), {})
        assert names(Path(found.bundles.path(DIGEST))) == {"module.py"}

    play(scenario)


def test_nothing_starts_with_code_that_cannot_be_unpacked(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = Scene(tmp_path).local_store
        found.bundles.learn([bundle(b"no archive")])
        for _ in range(2):
            (wait,) = found.missing(DIGEST, worker_pb2.Assignment(), {})
            with pytest.raises(zipfile.BadZipFile):
                await wait

    play(scenario)


def test_code_that_is_there_is_left_alone_when_it_comes_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = Scene(tmp_path).local_store
        folder = Path(found.bundles.path(DIGEST))
        # Twice at once, and again later, as after each reconnect.
        waits = []
        for _ in range(2):
            found.bundles.learn([bundle(zipped())])
            waits += found.missing(DIGEST, worker_pb2.Assignment(), {})
        await asyncio.gather(*waits)
        file = os.stat(folder / "module.py")
        found.bundles.learn([bundle(zipped())])
        await asyncio.gather(*found.missing(DIGEST, worker_pb2.Assignment(), {}))
        assert os.stat(folder / "module.py").st_ino == file.st_ino
        assert names(folder.parent) == {folder.name}

    play(scenario)


def test_code_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("first.py", "x = 1")
        archive.writestr("second.py", "y = 'to be damaged'")
    damaged = data.getvalue().replace(b"to be damaged", b"damaged since")

    async def scenario() -> None:
        found = Scene(tmp_path).local_store
        found.bundles.learn([bundle(damaged)])
        (wait,) = found.missing(DIGEST, worker_pb2.Assignment(), {})
        with pytest.raises(zipfile.BadZipFile):
            await wait
        assert names(tmp_path / "bundles") == set()
        found.bundles.learn([bundle(data.getvalue())])
        await asyncio.gather(*found.missing(DIGEST, worker_pb2.Assignment(), {}))
        assert names(Path(found.bundles.path(DIGEST))) == {"first.py", "second.py"}

    play(scenario)


class Results(artifact_pb2_grpc.ArtifactServiceServicer):
    """Gives the value to the second who asks."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()

    async def ReadArtifact(
        self, request: artifact_pb2.ReadArtifactRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[artifact_pb2.ReadArtifactResponse]:
        """Yield the value, or nothing ever."""
        yield artifact_pb2.ReadArtifactResponse(data=b"x")
        if not self.is_asked.is_set():
            self.is_asked.set()
            await asyncio.Event().wait()
        yield artifact_pb2.ReadArtifactResponse(data=b"yz")


def test_a_value_on_its_way_when_the_stream_breaks_comes_by_the_next_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        server, results = grpc.aio.server(), Results()
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(results, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}") for _ in range(2)]
        stubs = [artifact_pb2_grpc.ArtifactServiceStub(channel) for channel in channels]
        local_store = LocalStore(str(tmp_path), "here", staging(tmp_path), lambda: stubs[0])
        attempt = worker_pb2.Attempt(inputs={"x": value(LARGE)})
        (fetching,) = local_store.missing("", worker_pb2.Assignment(attempts=[attempt]), {})
        await results.is_asked.wait()
        del stubs[0]
        await channels[0].close()
        async with asyncio.timeout(60):
            await fetching
        assert (tmp_path / "large").read_bytes() == b"xyz"
        assert names(tmp_path) == {"large"}
        await channels[1].close()
        await server.stop(None)

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["", ".", "..", "spares", "/", "../spares", "nothing"])
def test_nothing_but_a_value_is_deleted(name: str, tmp_path: Path) -> None:
    (tmp_path / "spares").mkdir()
    LocalStore(str(tmp_path), "here", ArtifactStaging(str(tmp_path)), lambda: None).drop([name])
    assert (tmp_path / "spares").is_dir()


class Receiving:
    """Takes uploads as the server does, and keeps them."""

    def __init__(self) -> None:
        self.messages: list[worker_pb2.UploadArtifactRequest] = []

    async def UploadArtifact(self, messages: AsyncIterator[worker_pb2.UploadArtifactRequest]) -> None:
        """Take one."""
        self.messages = [message async for message in messages]


class Unreadable:
    """Values that cannot be opened."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def open(self, artifact_id: str) -> None:
        """Fail."""
        raise self._error


@pytest.mark.parametrize(
    ("error", "is_lost"), [(FileNotFoundError(), True), (OSError(errno.EMFILE, "too many files"), False)]
)
def test_the_server_hears_of_a_value_that_cannot_be_read(error: OSError, is_lost: bool) -> None:
    receiving: Any = Receiving()
    wanted = worker_pb2.SendArtifact(transfer_id="t", artifact_id="a")
    asyncio.run(artifact_upload.send(receiving, wanted, cast(Any, Unreadable(error))))
    first, *others = receiving.messages
    assert (first.transfer_id, first.HasField("size_bytes")) == ("t", False)
    assert [message.not_found for message in others] == [True] * is_lost
