"""Large values that somebody else fetches: whole or not at all, and nobody waits for long."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lattice_worker.courier import Courier

NAME = "0" * 32
BYTES = b"some bytes"
PATIENCE_S = 0.2


class Fetcher:
    """Whoever started the worker, whose every word a test chooses."""

    def __init__(self, courier: Courier, folder: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.courier, self.path = courier, folder / NAME
        self._reader, self._writer = reader, writer

    def ask(self) -> "asyncio.Task[bool]":
        """Have the value brought from node `a`."""
        return asyncio.create_task(self.courier.bring("a", self.path, len(BYTES)))

    async def hear(self) -> dict[str, Any]:
        """Return what was said next."""
        heard: dict[str, Any] = json.loads(await self._reader.readline())
        return heard

    def say(self, **words: Any) -> None:
        """Answer."""
        self._writer.write(json.dumps(words).encode() + b"\n")

    def go(self) -> None:
        """Be gone."""
        self._writer.close()


@asynccontextmanager
async def fetcher(folder: Path) -> AsyncIterator[Fetcher]:
    """A courier and its other end, while the block runs."""
    ours, theirs = socket.socketpair()
    courier = Courier(theirs.detach(), str(folder), PATIENCE_S)
    await courier.start()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        yield Fetcher(courier, folder, reader, writer)
    finally:
        courier.close()
        writer.close()


def play(scenario: Callable[[Fetcher], Coroutine[Any, Any, None]], folder: Path) -> None:
    """Play a scenario; nothing but the value may be left in the folder."""

    async def scene() -> None:
        async with fetcher(folder) as found:
            assert await found.hear() == {"store": str(folder)}
            await scenario(found)

    asyncio.run(scene())
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
def test_what_does_not_come_whole_is_not_there(how: str, tmp_path: Path) -> None:
    async def scenario(other: Fetcher) -> None:
        asked = other.ask()
        wanted = await other.hear()
        Path(wanted["part"]).write_bytes(BYTES[:5])
        match how:
            case "it fails":
                other.say(id=wanted["id"], end="Ray has lost it")
            case "nobody is there":
                other.go()
        assert not await asked
        assert not other.path.exists()

    play(scenario, tmp_path)


def test_whoever_is_gone_is_not_asked(tmp_path: Path) -> None:
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
        assert not await asked
        assert not await other.ask()
        other.say(id=late["id"], end="")
        elsewhere = asyncio.create_task(other.courier.bring("b", other.path, len(BYTES)))
        assert (await other.hear())["node"] == "b"
        other.go()
        assert not await elsewhere

    play(scenario, tmp_path)
