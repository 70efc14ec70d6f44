"""The memory of a long-lived client: every call that it stops reading ends, and its caches are bounded."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from lattice.v1 import results_pb2, results_pb2_grpc, run_pb2

from lattice_client import AsyncLatticeClient, PreconditionError, RunError
from lattice_client.runs import known_code
from lattice_client.runs.decoding import decoded
from lattice_client.runs.driver import blocking
from lattice_client.runs.known_code import KnownCode
from lattice_client.runs.sending import Sender
from lattice_client.transport.blocking import BlockingChannel
from lattice_client.transport.channel import dial

WAIT_S = 30.0
READERS = 5


class Unending(results_pb2_grpc.ResultsServiceServicer):
    """A run whose stream of events has one event and does not end; `left` counts the streams that were cancelled."""

    def __init__(self) -> None:
        self.left = asyncio.Semaphore(0)

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[results_pb2.WatchRunResponse]:
        """Yield the event and wait for the cancellation."""
        try:
            event = run_pb2.RunEvent(sequence=1, run_started=run_pb2.RunStarted())
            yield results_pb2.WatchRunResponse(events=[event], sequence=1)
            await asyncio.Event().wait()
        finally:
            self.left.release()


def stream_calls() -> int:
    gc.collect()
    return sum(isinstance(found, grpc.aio.UnaryStreamCall) for found in gc.get_objects())


def test_asyncio_client_cancels_its_call_when_a_reader_leaves() -> None:
    async def scenario() -> None:
        served, server = Unending(), grpc.aio.server()
        results_pb2_grpc.add_ResultsServiceServicer_to_server(served, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        before = stream_calls()
        async with asyncio.timeout(WAIT_S), AsyncLatticeClient(f"127.0.0.1:{port}") as client:
            for _ in range(READERS):
                async for event in client.events("r"):
                    assert event.type == "run_started"
                    break
            for _ in range(READERS):
                await served.left.acquire()
            while stream_calls() > before:
                await asyncio.sleep(0.01)
        await server.stop(None)

    asyncio.run(scenario())


@pytest.fixture
def two_digests(monkeypatch: pytest.MonkeyPatch) -> KnownCode:
    monkeypatch.setattr(known_code, "MAX_DIGESTS", 2)
    found = KnownCode()
    found.add("a")
    found.add("b")
    return found


def test_known_code_drops_the_least_recently_used_digest_when_it_is_full(two_digests: KnownCode) -> None:
    two_digests.add("a")
    two_digests.add("c")
    assert [digest in two_digests for digest in "abc"] == [True, False, True]
    assert len(two_digests) == 2


def test_known_code_is_empty_when_it_was_cleared(two_digests: KnownCode) -> None:
    two_digests.clear()
    assert not two_digests


def test_error_is_freed_without_garbage_collection_when_decoding_raised_it() -> None:
    gc.collect()
    gc.disable()
    try:
        error = RunError("r", "run 'r' failed")
        freed = weakref.ref(error)
        with pytest.raises(RunError):
            raised(error)
        del error
        assert freed() is None
    finally:
        gc.enable()


def raised(error: RunError) -> None:
    try:
        decoded(error)
    finally:
        del error


@pytest.mark.parametrize("by_another_thread", [False, True])
def test_a_call_without_code_that_the_server_lacks_is_repeated_once(by_another_thread: bool) -> None:
    sender = Sender(BlockingChannel(dial("127.0.0.1:1")), 1.0)
    sender.known_code.add("sha256:1")
    calls: list[bool] = []

    async def call() -> str:
        calls.append(len(sender.known_code) > 0)
        if by_another_thread:
            sender.known_code.clear()  # Its call failed a moment before.
        error = PreconditionError("no such function")
        error.reason = "FUNCTION_MISSING"
        raise error

    with pytest.raises(PreconditionError):
        blocking(sender.accepted(call))
    assert calls == [True, False], "without code, and then with all of it"
