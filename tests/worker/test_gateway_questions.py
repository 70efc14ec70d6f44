"""The questions of a gateway: an attempt may have 1,000 without an answer, however many requests there are."""

import asyncio
from typing import Any

import pytest

from lattice_worker import context
from lattice_worker.gateway.permits import Permits
from lattice_worker.gateway.refusals import Refusal
from lattice_worker.gateway.task import MAX_ASKED, Gateway

REQUESTS = 2000


class Server:
    """Answers the questions of a gateway when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.open = self.most = 0
        self.answering = asyncio.Event()
        self.error: Exception | None = None

    async def ask(self, name: str, value: object = None) -> dict[str, Any]:
        self.asked.append(name)
        self.open += 1
        self.most = max(self.most, self.open)
        await self.answering.wait()
        self.open -= 1
        if self.error is not None:
            raise self.error
        return {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server()
    monkeypatch.setattr(context, "ask_async", found.ask)
    return found


async def settle() -> None:
    """Run all tasks as far as they get without waiting."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_all_requests_to_a_model_that_starts_wait_for_one_answer(server: Server) -> None:
    async def run() -> None:
        gateway = Gateway()
        waiting = [asyncio.create_task(gateway._wait("tiny\n")) for _ in range(REQUESTS)]
        await settle()
        # A caller that leaves takes nothing from the others.
        for left in waiting[::2]:
            left.cancel()
        server.answering.set()
        await settle()
        assert not any(one.done() for one in waiting[1::2])  # The routes are on their way.
        gateway._take({"services": {"tiny\n": {"model": "", "key": "", "replicas": {"a": "h:1"}}}, "revoked": []})
        await asyncio.gather(*waiting[1::2])
        # The routes came after the answer, so that it asked again.
        assert server.asked == ["lattice/gateway.wait"] * 2

    asyncio.run(run())


def test_all_requests_to_a_model_that_cannot_start_are_refused(server: Server) -> None:
    async def run() -> None:
        gateway = Gateway()
        server.error = context.AnswerError("it cannot start", "ServiceFailedError")
        waiting = [asyncio.create_task(gateway._wait("tiny\n")) for _ in range(3)]
        await settle()
        server.answering.set()
        for refusal in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(refusal, Refusal)
            assert (refusal.status, refusal.code) == (503, "model_failed")
            assert "it cannot start" in refusal.message

    asyncio.run(run())


def test_guessed_keys_are_asked_for_some_at_a_time(server: Server) -> None:
    async def run() -> None:
        gateway = Gateway()
        asking = [asyncio.create_task(gateway._service_of(f"lk-{number}")) for number in range(REQUESTS)]
        await settle()
        server.answering.set()
        assert await asyncio.gather(*asking) == [None] * REQUESTS
        assert (server.most, len(server.asked)) == (MAX_ASKED, REQUESTS)

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(5))
def test_request_whose_caller_leaves_around_its_permit_ends_once(
    turns: int,
) -> None:
    async def run() -> None:
        permitted: asyncio.Queue[list[str]] = asyncio.Queue()
        ended: list[object] = []

        async def ask(name: str, value: Any = None) -> dict[str, Any]:
            if name == "lattice/gateway.permits":
                return {"permitted": await permitted.get()}
            ended.extend(value["ended"])
            return {"refused": {}}

        permits = Permits(ask)

        async def request() -> None:
            name = await permits.acquire("tiny", 10)
            try:
                await asyncio.Event().wait()
            finally:
                permits.end(name, 7)

        serving, asking = asyncio.create_task(permits.serve()), asyncio.create_task(request())
        await settle()
        permitted.put_nowait(["1"])
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        await settle()
        assert asking.cancelled()
        assert len(ended) == 1
        serving.cancel()

    asyncio.run(run())
