"""The transfer of large values from their nodes: complete or with an error, and no side waits for a lost one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager

import pytest

from lattice_server.core.errors import NotFoundError, UnavailableError
from lattice_server.core.messages import ForgetSession, SendArtifact, WelcomeWorker
from lattice_server.core.model import Artifact
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.workers.artifact_transfer import AHEAD, Transfers
from lattice_server.engine.workers.outbox import Connection
from lattice_server.engine.workers.sessions import Sessions

OFFSET = 7
ARTIFACT = Artifact("0" * 32, OFFSET + 3 * AHEAD, "n")
TIMEOUT_S = 30.0


class Scene:
    """A store that knows of an artifact on node `n`, and the connection of that node's worker."""

    def __init__(self, store: ArtifactStore) -> None:
        self.sessions = Sessions(TIMEOUT_S)
        self.transfers = Transfers(store, self.sessions)
        store.hold([ARTIFACT])
        self.connection = Connection("w", "n", shares_store=False)
        self.sessions.greet(self.connection)
        self.sessions.perform(WelcomeWorker("w", "s", False, (), self.connection.greeting))

    def read(self, offset: int = 0) -> "asyncio.Task[list[bytes]]":
        """Start to read the artifact."""

        async def reading() -> list[bytes]:
            return [chunk async for chunk in self.transfers.read(ARTIFACT.artifact_id, offset)]

        return asyncio.create_task(reading())

    async def wanted(self) -> SendArtifact:
        """Return the request to the node."""
        while True:
            for effect in await self.connection.next_effects():
                if isinstance(effect, SendArtifact):
                    return effect


@contextmanager
def store() -> Iterator[ArtifactStore]:
    """A store while the block runs."""
    found = ArtifactStore()
    try:
        yield found
    finally:
        found.close()


def play(scenario: Callable[[Scene], Coroutine[None, None, None]]) -> None:
    """Play a scenario; it fails when it waits for ever."""

    async def scene() -> None:
        with store() as found:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario(Scene(found))

    asyncio.run(scene())


async def upload(*chunks: bytes | None) -> AsyncIterator[bytes | None]:
    for chunk in chunks:
        yield chunk


async def broken(*chunks: bytes) -> AsyncIterator[bytes | None]:
    for chunk in chunks:
        yield chunk
    raise ConnectionError


def test_a_reader_gets_the_bytes_from_its_offset_on() -> None:
    async def scenario(scene: Scene) -> None:
        reading = scene.read(offset=OFFSET)
        wanted = await scene.wanted()
        assert (wanted.session_id, wanted.artifact_id, wanted.offset) == ("s", ARTIFACT.artifact_id, OFFSET)
        chunks = [bytes([number]) for number in range(3 * AHEAD)]
        await scene.transfers.take(wanted.transfer_id, None, upload(*chunks))
        assert await reading == chunks
        assert not scene.connection.on_end

    play(scenario)


def test_an_artifact_that_the_node_has_no_longer_is_not_found() -> None:
    async def scenario(scene: Scene) -> None:
        reading = scene.read()
        await scene.transfers.take((await scene.wanted()).transfer_id, None, upload(None))
        with pytest.raises(NotFoundError):
            await reading

    play(scenario)


@pytest.mark.parametrize("size_bytes", [ARTIFACT.size_bytes, None])
def test_a_reader_learns_that_an_upload_ended_too_early(size_bytes: int | None) -> None:
    async def scenario(scene: Scene) -> None:
        reading = scene.read()
        await scene.transfers.take((await scene.wanted()).transfer_id, size_bytes, upload(b"some"))
        with pytest.raises(UnavailableError, match="broke off"):
            await reading

    play(scenario)


def test_a_reader_learns_that_the_node_has_another_value() -> None:
    async def scenario(scene: Scene) -> None:
        reading = scene.read()
        await scene.transfers.take((await scene.wanted()).transfer_id, 4, upload(b"some"))
        with pytest.raises(NotFoundError, match="another number of bytes"):
            await reading

    play(scenario)


def test_a_reader_learns_that_an_upload_broke_off() -> None:
    async def scenario(scene: Scene) -> None:
        reading = scene.read()
        wanted = await scene.wanted()
        with pytest.raises(ConnectionError):
            await scene.transfers.take(wanted.transfer_id, None, broken(b"some"))
        with pytest.raises(UnavailableError):
            await reading

    play(scenario)


def test_a_reader_learns_that_the_node_hung_up_before_it_sent_anything() -> None:
    async def scenario(scene: Scene) -> None:
        reading = scene.read()
        await scene.wanted()
        scene.sessions.leave(scene.connection)
        with pytest.raises(UnavailableError):
            await reading

    play(scenario)


def test_an_artifact_is_not_found_when_its_node_is_gone_and_unavailable_before() -> None:
    async def scenario(scene: Scene) -> None:
        scene.sessions.leave(scene.connection)
        with pytest.raises(UnavailableError):
            await scene.read()
        scene.sessions.perform(ForgetSession("s"))
        with pytest.raises(NotFoundError, match="gone") as gone:
            await scene.read()
        assert gone.value.metadata == {"node_id": "n"}

    play(scenario)


@pytest.mark.parametrize("count", [1, 3 * AHEAD])
def test_an_upload_ends_when_its_reader_does(count: int) -> None:
    async def scenario(scene: Scene) -> None:
        chunks = aiter(scene.transfers.read(ARTIFACT.artifact_id, 0))
        first = asyncio.ensure_future(anext(chunks))
        wanted = await scene.wanted()
        uploading = asyncio.create_task(scene.transfers.take(wanted.transfer_id, None, upload(*[b"x"] * count)))
        await first
        # As far as it comes.
        for _ in range(10):
            await asyncio.sleep(0)
        await chunks.aclose()
        await uploading
        with pytest.raises(NotFoundError):
            await scene.transfers.take(wanted.transfer_id, None, upload(b"x"))

    play(scenario)
