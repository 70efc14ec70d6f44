"""Artifacts that the parent process fetches: whole or not at all, and within a limit of time."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lattice_worker.store.peer_fetch import AT_A_TIME, SKIP_NODE_S, PeerFetcher

NAME = "0" * 32
BYTES = b"some bytes"
# So long that it ends only when a test lets the time pass.
PATIENCE_S = 1000.0

pytestmark = pytest.mark.timeout(20)


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time a test lets pass."""

    passed_s = 0.0

    def time(self) -> float:
        """Return the time."""
        return super().time() + self.passed_s


class Fetcher:
    """The parent process of the worker; a test chooses its messages."""

    def __init__(self, fetcher: PeerFetcher, folder: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.fetcher, self.path = fetcher, folder / NAME
        self._reader, self._writer = reader, writer

    def ask(self, node: str = "a") -> "asyncio.Task[bool]":
        """Have the value brought from a node."""
        return asyncio.create_task(self.fetcher.bring(node, self.path, len(BYTES)))

    async def hear(self) -> dict[str, Any]:
        """Return the next message of the worker."""
        heard: dict[str, Any] = json.loads(await self._reader.readline())
        return heard

    def say(self, **words: Any) -> None:
        """Answer."""
        self._writer.write(json.dumps(words).encode() + b"\n")

    async def bring(self, wanted: dict[str, Any]) -> None:
        """Write the artifact, and report its end."""
        Path(wanted["part"]).write_bytes(BYTES)
        self.say(id=wanted["id"], end="")

    async def let_pass(self, seconds: float) -> None:
        """Let time pass after all messages have arrived."""
        await settle()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Clock)
        loop.passed_s += seconds
        await settle()

    def go(self) -> None:
        """Close the socket."""
        self._writer.close()


async def settle() -> None:
    """Run all tasks as far as they get without waiting."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[Fetcher]:
    """A fetcher and its other end, while the block runs."""
    ours, theirs = socket.socketpair()
    fetcher = PeerFetcher(theirs.detach(), str(folder), folder, PATIENCE_S)
    await fetcher.start()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        yield Fetcher(fetcher, folder, reader, writer)
    finally:
        fetcher.close()
        writer.close()


def play(scenario: Callable[[Fetcher], Coroutine[Any, Any, None]], folder: Path) -> None:
    """Play a scenario; nothing but the value may be left in the folder."""

    async def scene() -> None:
        async with connected(folder) as found:
            assert await found.hear() == {"store": str(folder)}
            await scenario(found)

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(scene())
    assert {entry.name for entry in folder.iterdir()} <= {NAME}


def test_a_value_is_there_when_all_of_it_came(tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        asked = other.ask()
        wanted = await other.hear()
        assert (wanted["node"], wanted["artifact"], wanted["size"]) == ("a", NAME, len(BYTES))
        Path(wanted["part"]).write_bytes(BYTES)
        other.say(id=wanted["id"])
        assert not other.path.exists()
        other.say(id=wanted["id"], end="")
        assert await asked
        assert other.path.read_bytes() == BYTES

    play(scenario, tmp_path)


@pytest.mark.parametrize("how", ["it fails", "nothing is said", "nobody is there"])
def test_an_artifact_is_absent_when_it_was_not_fetched_whole(how: str, tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        asked = other.ask()
        wanted = await other.hear()
        Path(wanted["part"]).write_bytes(BYTES[:5])
        match how:
            case "it fails":
                other.say(id=wanted["id"], end="Ray has lost it")
            case "nothing is said":
                await other.let_pass(PATIENCE_S)
            case "nobody is there":
                other.go()
        assert not await asked
        assert not other.path.exists()

    play(scenario, tmp_path)


def test_nothing_is_fetched_when_the_parent_process_is_gone(tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        asked = other.ask()
        await other.hear()
        other.go()
        assert not await asked
        assert not await other.ask()

    play(scenario, tmp_path)


def test_a_node_from_which_nothing_came_is_not_asked_again_soon(tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        asked = other.ask()
        late = await other.hear()
        await other.let_pass(PATIENCE_S)
        assert not await asked
        assert not await other.ask()
        other.say(id=late["id"], end="")
        elsewhere = other.ask("b")
        assert (await other.hear())["node"] == "b"
        other.go()
        assert not await elsewhere

    play(scenario, tmp_path)


@pytest.mark.parametrize("how", ["it has lost a value", "something else came from it", "a while is over"])
def test_a_node_is_asked_again_when(how: str, tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        first, second = other.ask(), other.ask()
        lost, late = await other.hear(), await other.hear()
        match how:
            case "it has lost a value":
                other.say(id=lost["id"], end="there is no such file")
                other.say(id=late["id"], end="there is no such file")
            case "something else came from it":
                await other.let_pass(PATIENCE_S / 2)
                other.say(id=late["id"])
                await other.let_pass(PATIENCE_S / 2)
                assert first.done()
                await other.bring(late)
            case "a while is over":
                await other.let_pass(PATIENCE_S)
                await other.let_pass(SKIP_NODE_S)
        assert not await first
        assert await second is (how == "something else came from it")
        again = other.ask()
        await other.bring(await other.hear())
        assert await again

    play(scenario, tmp_path)


def test_an_artifact_is_fetched_when_it_arrives_slowly(tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        asked = other.ask()
        wanted = await other.hear()
        for _ in range(3):
            await other.let_pass(PATIENCE_S * 0.9)
            other.say(id=wanted["id"])
        await other.bring(wanted)
        assert await asked

    play(scenario, tmp_path)


def test_only_some_are_on_their_way_at_a_time(tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        asked = [other.ask() for _ in range(AT_A_TIME + 1)]
        first = [await other.hear() for _ in range(AT_A_TIME)]
        last = asyncio.create_task(other.hear())
        await settle()
        assert not last.done()
        for wanted in first:
            await other.bring(wanted)
        await other.bring(await last)
        assert all(await asyncio.gather(*asked))

    play(scenario, tmp_path)


def test_the_socket_is_not_inherited_by_child_processes(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    # As the worker inherits it from its parent process.
    theirs.set_inheritable(True)
    descriptor = theirs.detach()
    fetcher = PeerFetcher(descriptor, str(tmp_path), tmp_path)
    assert not os.get_inheritable(descriptor)
    fetcher.close()
    ours.close()
