"""The messages of a worker: reports that share one, and when one is delayed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from lattice.v1 import worker_pb2

from lattice_worker.session import outbox as outbox_module
from lattice_worker.session.lease_machine import LeaseMachine
from lattice_worker.session.limits import Limits
from lattice_worker.session.outbox import PART_BYTES, Outbox

LONG_S = 3600.0
DRAINING = worker_pb2.Draining()
HELLO = worker_pb2.Hello(worker_id="w")


class Idle:
    """An executor whose leases start and never end."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: False


class Scene:
    """A worker whose stream has begun, and is welcome."""

    def __init__(self) -> None:
        self.leases: LeaseMachine[Any, worker_pb2.Report, Any] = LeaseMachine(
            Idle(), self._say, lambda _: worker_pb2.Report()
        )
        self.outbox = Outbox(self.leases, Limits(message_bytes=2 * PART_BYTES))

    async def welcome(self) -> AsyncIterator[worker_pb2.ConnectRequest]:
        """Return the messages of a new stream, after its hello."""
        requests = self.outbox.open(HELLO)
        assert await anext(requests) == worker_pb2.ConnectRequest(hello=HELLO)
        self.outbox.resume(self.leases.welcome("s", False, ()))
        return requests

    def assign(self, *lease_ids: str, slot: int = 1) -> None:
        """Assign leases of one slot."""
        for lease_id in lease_ids:
            self.leases.assign(lease_id, slot, "", self.leases.received + 1, None)

    def end(self, lease_id: str, **fact: Any) -> None:
        """Report the end of a lease."""
        self.leases.report(lease_id, worker_pb2.Report(lease_id=lease_id, **fact or {"succeeded": {}}))
        self.leases.ended(lease_id, None)

    def _say(self, sequence: int, report: worker_pb2.Report) -> None:
        report.sequence = sequence
        self.outbox.report(report)


async def soon(requests: AsyncIterator[worker_pb2.ConnectRequest]) -> worker_pb2.ConnectRequest | None:
    """Return the next message if it is sent without a wait."""
    waiting = asyncio.ensure_future(anext(requests))
    for _ in range(10):
        await asyncio.sleep(0)
    if waiting.done():
        return waiting.result()
    waiting.cancel()
    return None


def reported(request: worker_pb2.ConnectRequest | None) -> list[str]:
    """Return the leases a message reports."""
    assert request is not None
    return [report.lease_id for report in request.reports]


@pytest.fixture(autouse=True)
def endless_coalescing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that waits for more waits visibly."""
    monkeypatch.setattr(outbox_module, "COALESCE_S", LONG_S)


def test_a_report_is_sent_at_once_when_no_lease_waits_behind_another() -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = await scene.welcome()
        scene.assign("long", slot=2)
        for lease_id in "abc":
            scene.assign(lease_id)
            scene.end(lease_id)
            assert reported(await soon(requests)) == [lease_id]

    asyncio.run(scenario())


def test_reports_share_a_message_when_leases_wait_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = await scene.welcome()
        scene.assign(*"abcd")
        scene.end("a")
        assert reported(await anext(requests)) == ["a"], "none was sent shortly before"
        monkeypatch.setattr(outbox_module, "COALESCE_S", 0.2)
        scene.end("b")
        waiting = asyncio.ensure_future(anext(requests))
        await asyncio.sleep(0)
        assert not waiting.done()
        scene.end("c")
        assert reported(await waiting) == ["b", "c"]

    asyncio.run(scenario())


def test_all_that_is_due_shares_one_message() -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = await scene.welcome()
        scene.assign("a")
        scene.assign("b", slot=2)
        scene.end("a")
        scene.outbox.beat()
        scene.outbox.drain(DRAINING)
        request = await soon(requests)
        assert reported(request) == ["a"]
        assert request is not None
        assert sorted(request.heartbeat.held_lease_ids) == ["a", "b"], "the report of a is not acknowledged"
        assert request.heartbeat.assignment_sequence == 2
        assert request.HasField("draining")
        scene.end("b")
        request = await soon(requests)
        assert reported(request) == ["b"]
        assert request is not None
        assert not request.HasField("draining"), "it was said"
        again = await scene.welcome()
        request = await soon(again)
        assert request is not None
        assert request.HasField("draining"), "to whoever may not have heard of it"

    asyncio.run(scenario())


def test_the_heartbeat_comes_last_when_the_reports_take_several_messages() -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = await scene.welcome()
        scene.assign("a", "b", "c")
        for lease_id in "abc":
            scene.end(lease_id, log={"text": "x" * 900_000})
        scene.outbox.beat()
        first, last = await anext(requests), await anext(requests)
        assert (reported(first), reported(last)) == (["a", "b"], ["c"])
        assert not first.HasField("heartbeat")
        assert last.HasField("heartbeat")

    asyncio.run(scenario())


def test_an_overdue_report_is_sent_again_before_later_ones() -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = await scene.welcome()
        scene.assign("a")
        scene.end("a")
        assert reported(await anext(requests)) == ["a"]
        for _ in range(2):
            scene.outbox.beat()
            assert reported(await anext(requests)) == []
        scene.assign("b")
        scene.end("b")
        scene.outbox.beat()
        request = await anext(requests)
        assert [report.sequence for report in request.reports] == [1, 2]

    asyncio.run(scenario())


@pytest.mark.parametrize("is_welcome", [False, True])
def test_the_messages_of_a_stream_end_when_it_has_broken(is_welcome: bool) -> None:
    async def scenario() -> None:
        scene = Scene()
        if is_welcome:
            requests = await scene.welcome()
        else:
            requests = scene.outbox.open(HELLO)
            await anext(requests)
        for ending in (scene.outbox.close, lambda: scene.outbox.open(HELLO)):
            waiting = asyncio.ensure_future(anext(requests, None))
            await asyncio.sleep(0)
            assert not waiting.done()
            ending()
            assert await waiting is None
            requests = scene.outbox.open(HELLO)
            await anext(requests)

    asyncio.run(scenario())
