"""Ray's driver with a Ray whose answers a test chooses: reservations, hosts, and their release."""

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import ray

from lattice_server.executors import ray_driver
from lattice_server.executors.ray_driver import Driver

TIMEOUT_S = 30.0
BUNDLE = {"CPU": 2.0}


class Host:
    """What Ray placed: a test says when it is there, and how its worker ends."""

    def __init__(self) -> None:
        self.placed: Future[int] = Future()
        self.served: Future[int] = Future()
        self.arguments: tuple[Any, ...] = ()
        self.pid = SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: self.placed))
        self.serve = SimpleNamespace(remote=self._serve)

    def _serve(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return SimpleNamespace(future=lambda: self.served)


class Scene:
    """A driver, its orders, its events, and its calls to Ray."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: list[Host] = []
        self.refusal: Exception | None = None
        self.notes: list[str] = []
        self.killed: list[Host] = []
        self.is_over = asyncio.Event()
        monkeypatch.setattr(ray_driver, "placement_group", self._reserve)
        monkeypatch.setattr(ray_driver, "remove_placement_group", lambda group: self.notes.append(f"remove {group}"))
        monkeypatch.setattr(ray_driver, "_placed", self._place)
        monkeypatch.setattr(ray, "kill", self.killed.append)
        monkeypatch.setattr(os, "_exit", lambda status: self.is_over.set())
        read, write = os.pipe()
        self._orders: BinaryIO = os.fdopen(write, "wb", buffering=0)
        said, saying = os.pipe()
        self._said = os.fdopen(said, "rb")
        self._saying = os.fdopen(saying, "wb", buffering=0)
        self.running = asyncio.create_task(Driver(os.fdopen(read, "rb", buffering=0), self._saying).run(False))

    def _reserve(self, bundles: list[dict[str, float]], strategy: str) -> str:
        self.notes.append(f"reserve {bundles} {strategy}")
        return f"group {len(self.notes)}"

    def _place(self, order: dict[str, Any], group: str) -> Host:
        if self.refusal is not None:
            raise self.refusal
        host = Host()
        self.hosts.append(host)
        return host

    def order(self, do: str, **details: Any) -> None:
        """Order something of the reservation `k`."""
        self._orders.write(json.dumps({"do": do, "key": "k", **details}).encode() + b"\n")

    def serve(self, worker_id: str) -> None:
        """Order a worker."""
        details = {"bundle": BUNDLE, "store": "n", "flags": ["--flag"], "target": "server:1"}
        self.order("serve", worker_id=worker_id, environment={"A": "b"}, follows_node=True, **details)

    async def said(self, event: str) -> dict[str, Any]:
        """Return the next event, which has to be of this kind."""
        found: dict[str, Any] = json.loads(await asyncio.to_thread(self._said.readline))
        assert found.pop("event") == event
        return found

    async def placed(self, worker_id: str) -> Host:
        """Have a worker started."""
        self.serve(worker_id)
        while not self.hosts or self.hosts[-1].placed.done():
            await asyncio.sleep(0.01)
        self.hosts[-1].placed.set_result(7)
        assert await self.said("placed") == {"key": "k", "worker_id": worker_id, "pid": 7}
        return self.hosts[-1]

    async def end(self) -> None:
        """Leave the driver without orders, with which it ends."""
        self._orders.close()
        await self.running
        self._saying.close()
        assert self._said.readline() == b"", "something was said that nobody asked about"

    def close(self) -> None:
        """End the stream of events."""
        for end in (self._orders, self._saying):
            end.close()


def play(scenario: Callable[[Scene], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Play a scenario; return what became of the reservations."""

    async def scene() -> list[str]:
        async with asyncio.timeout(TIMEOUT_S):
            found = Scene(monkeypatch)
            try:
                await scenario(found)
                await found.end()
            finally:
                found.close()
            return found.notes

    return asyncio.run(scene())


@pytest.mark.parametrize("status", [0, 3, None])
def test_the_exit_status_of_a_worker_is_told_and_its_host_ends(
    status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(found: Scene) -> None:
        found.order("reserve", bundle=BUNDLE)
        host = await found.placed("w-1")
        assert host.arguments == (["--flag"], "server:1", {"A": "b"}, True)
        assert not found.killed
        if status is None:
            host.served.set_exception(ray.exceptions.RayActorError(error_msg="it was killed"))
        else:
            host.served.set_result(status)
        told = await found.said("ended")
        assert (told["key"], told["worker_id"], told["status"]) == ("k", "w-1", status)
        assert told["reason"]
        assert found.killed == [host]
        # The reservation stays, for another worker.
        await found.placed("w-2")

    assert play(scenario, monkeypatch) == [f"reserve [{BUNDLE}] STRICT_PACK"]


def test_a_worker_whose_predecessor_is_still_there_is_told_to_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(found: Scene) -> None:
        found.order("reserve", bundle=BUNDLE)
        found.refusal = ValueError("the name is taken")
        found.serve("w-1")
        told = await found.said("ended")
        assert (told["worker_id"], told["status"]) == ("w-1", None)
        found.refusal = None
        await found.placed("w-2")
        assert not found.is_over.is_set()

    play(scenario, monkeypatch)


def test_a_released_reservation_ends_without_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(found: Scene) -> None:
        found.order("reserve", bundle=BUNDLE)
        host = await found.placed("w-1")
        found.order("release")
        found.order("release")
        while not host.served.cancelled():
            await asyncio.sleep(0.01)
        found.order("reserve", bundle=BUNDLE)
        await found.placed("w-2")
        assert found.killed == [host]

    notes = play(scenario, monkeypatch)
    assert [note.split()[0] for note in notes] == ["reserve", "remove", "reserve"]


def test_a_ray_that_fails_otherwise_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(found: Scene) -> None:
        found.order("reserve", bundle=BUNDLE)
        found.refusal = RuntimeError("no head")
        found.serve("w-1")
        assert "no head" in (await found.said("over"))["reason"]
        await found.is_over.wait()

    play(scenario, monkeypatch)
