"""Streams that no thread of gRPC's serves: messages in order, every end, and the memory of ended calls."""

import gc
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import psutil
import pytest
from lattice.v1 import workflow_pb2, workflow_pb2_grpc

from lattice_client import errors
from lattice_client.runs.driver import blocking
from lattice_client.transport import blocking_bidi
from lattice_client.transport.blocking import BlockingChannel
from lattice_client.transport.blocking_bidi import BlockingBidiCall, ThreadedCall
from lattice_client.transport.channel import LimitReachedError, dial
from lattice_client.transport.direct_call import DirectCall

Request = workflow_pb2.ExecuteWorkflowsRequest
Response = workflow_pb2.ExecuteWorkflowsResponse
Behaviour = Callable[[Iterator[Request], grpc.ServicerContext], Iterator[Response]]


@contextmanager
def served(behave: Behaviour) -> Iterator[BlockingChannel]:
    """Yield a connection to a server that has one stream."""

    class Servicer(workflow_pb2_grpc.WorkflowServiceServicer):
        def ExecuteWorkflows(self, requests: Iterator[Request], context: grpc.ServicerContext) -> Iterator[Response]:
            return behave(requests, context)

    server = grpc.server(ThreadPoolExecutor(16))
    workflow_pb2_grpc.add_WorkflowServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    channel = BlockingChannel(dial(f"127.0.0.1:{port}"))
    try:
        yield channel
    finally:
        channel.shut()
        server.stop(0).wait()


def opened(channel: BlockingChannel) -> BlockingBidiCall[Request, Response]:
    call = channel.open_bidi(channel.workflows.ExecuteWorkflows)
    assert isinstance(call, BlockingBidiCall)
    return call


def echo(requests: Iterator[Request], context: grpc.ServicerContext) -> Iterator[Response]:
    for request in requests:
        yield Response(number=request.number)


def hold(requests: Iterator[Request], context: grpc.ServicerContext) -> Iterator[Response]:
    """Answer nothing until the caller leaves."""
    ended = threading.Event()
    # The call may have ended before this thread began, and then nothing is called.
    if context.add_callback(ended.set):
        ended.wait()
    yield from ()


@pytest.fixture(params=["direct", "threads of gRPC"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class of the streams of a test: that for the installed version of gRPC, and that for other versions."""
    if request.param == "direct":
        return DirectCall

    def differs(method: Any, headers: Any) -> None:
        raise AttributeError("_channel")

    monkeypatch.setattr(blocking_bidi, "DirectCall", differs)
    return ThreadedCall


def test_the_installed_version_of_grpc_supports_direct_calls(kind: type) -> None:
    with served(echo) as channel:
        assert type(opened(channel)._call) is kind


def test_each_message_has_its_answer_in_order(kind: type) -> None:
    with served(echo) as channel:
        call = opened(channel)
        for number in range(1, 200):
            call.send(Request(number=number))
            if number % 3 == 0:
                assert [answer.number for _ in range(3) if (answer := blocking(call.read()))] == [
                    number - 2,
                    number - 1,
                    number,
                ]
        call.abandon()


def test_threads_send_while_another_one_reads(kind: type) -> None:
    threads, each = 8, 200
    with served(echo) as channel, ThreadPoolExecutor(threads) as pool:
        call = opened(channel)

        def send(thread: int) -> None:
            for number in range(each):
                call.send(Request(number=thread * each + number))

        sending = [pool.submit(send, thread) for thread in range(threads)]
        received = [answer.number for _ in range(threads * each) if (answer := blocking(call.read()))]
        for one in sending:
            one.result()
        assert sorted(received) == list(range(threads * each))
        for thread in range(threads):
            own = [number for number in received if number // each == thread]
            assert own == sorted(own), "the messages of a thread keep their order"
        call.abandon()


def test_the_end_of_a_stream_is_none_after_all_its_messages(kind: type) -> None:
    def three(requests: Iterator[Request], context: grpc.ServicerContext) -> Iterator[Response]:
        yield from (Response(number=number) for number in range(3))

    with served(three) as channel:
        call = opened(channel)
        assert [answer.number for _ in range(3) if (answer := blocking(call.read()))] == [0, 1, 2]
        assert blocking(call.read()) is None
        assert blocking(call.read()) is None
        call.send(Request(number=1))  # Is dropped.
        assert not call._call.is_kept


def test_a_status_is_raised_after_all_messages(kind: type) -> None:
    def refuse(requests: Iterator[Request], context: grpc.ServicerContext) -> Iterator[Response]:
        yield Response(number=1)
        context.set_trailing_metadata([("cause", "tests")])
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")

    with served(refuse) as channel:
        call = opened(channel)
        first = blocking(call.read())
        assert first is not None
        assert first.number == 1
        with pytest.raises(errors.PreconditionError, match="not today") as caught:
            blocking(call.read())
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert not call._call.is_kept


def test_a_server_that_is_not_there_is_named() -> None:
    channel = BlockingChannel(dial("127.0.0.1:1"))
    with pytest.raises(errors.UnavailableError, match=r"no Lattice server answers at 127\.0\.0\.1:1"):
        blocking(opened(channel).read())
    channel.shut()


def test_a_message_that_cannot_be_read_ends_the_stream() -> None:
    with served(echo) as channel:
        call = opened(channel)

        def unreadable(data: bytes) -> Response:
            return Response.FromString(b"\xff" + data)

        assert isinstance(call._call, DirectCall)
        call._call._deserialize = unreadable
        call.send(Request(number=1))
        with pytest.raises(errors.InternalError, match="a message of the server cannot be read"):
            blocking(call.read())
        channel._unreleased.release()
        assert not call._call.is_kept


def test_abandoning_ends_a_read_in_another_thread(kind: type) -> None:
    with served(hold) as channel, ThreadPoolExecutor(1) as pool:
        call = opened(channel)
        reading = pool.submit(lambda: blocking(call.read()))
        time.sleep(0.05)  # Let it begin to read; the outcome is the same when it has not.
        call.abandon()
        with pytest.raises(errors.RequestError) as caught:
            reading.result(timeout=10)
        assert caught.value.code is grpc.StatusCode.CANCELLED


def test_closing_the_client_ends_a_read_in_another_thread(kind: type) -> None:
    with served(hold) as channel, ThreadPoolExecutor(1) as pool:
        call = opened(channel)
        reading = pool.submit(lambda: blocking(call.read()))
        time.sleep(0.05)
        channel.shut()
        with pytest.raises(errors.ClientClosedError):
            reading.result(timeout=10)
        call.send(Request(number=1))


def test_a_limit_ends_a_read(kind: type) -> None:
    async def limited() -> None:
        async with channel.limit(0.05):
            await opened(channel).read()

    with served(hold) as channel, pytest.raises(LimitReachedError):
        blocking(limited())


def test_a_signal_handler_that_raises_ends_the_read_and_the_stream() -> None:
    class Signalled(Exception):
        pass

    def handle(number: int, frame: object) -> None:
        raise Signalled

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with served(hold) as channel:
            for _ in range(5):
                call = opened(channel)
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                with pytest.raises(Signalled):
                    blocking(call.read())
                call.send(Request(number=1))  # Is dropped.
                call.abandon()
                channel._unreleased.release()
                assert not call._call.is_kept
    finally:
        signal.signal(signal.SIGALRM, before)


def test_interrupts_at_any_moment_hang_nothing() -> None:
    main, delays = threading.main_thread().ident, random.Random(7)
    assert main is not None
    begun: queue.SimpleQueue[None] = queue.SimpleQueue()
    is_due, raised = False, 0

    def interrupt(after_s: float) -> None:
        begun.get(timeout=10)
        time.sleep(after_s)
        signal.pthread_kill(main, signal.SIGINT)

    def raise_once(number: int, frame: object) -> None:
        nonlocal is_due, raised
        # An interrupt that gRPC's locks delay may come when the `try` below is left.
        if is_due:
            is_due = False
            raised += 1
            raise KeyboardInterrupt

    with served(echo) as channel, ThreadPoolExecutor(2) as pool:
        before = signal.signal(signal.SIGINT, raise_once)
        try:
            for _ in range(200):
                call = opened(channel)
                interrupting = pool.submit(interrupt, delays.uniform(0.0001, 0.004))
                with suppress(KeyboardInterrupt):
                    is_due = True
                    begun.put(None)
                    with suppress(errors.RequestError):
                        while is_due:
                            call.send(Request(number=1))
                            blocking(call.read())
                    is_due = False
                interrupting.result(timeout=10)
                call.abandon()
                # The interrupt must leave no lock held.
                pool.submit(channel._unreleased.release).result(timeout=10)
            assert raised > 100
            time.sleep(0.1)  # Until the delayed interrupts have come.
        finally:
            signal.signal(signal.SIGINT, before)
        fresh = opened(channel)
        fresh.send(Request(number=5))
        answer = blocking(fresh.read())
        assert answer is not None
        assert answer.number == 5


def test_calls_that_end_in_every_way_leave_no_memory() -> None:
    def use(channel: BlockingChannel, how: int) -> None:
        call = opened(channel)
        call.send(Request(number=1))
        if how % 3:
            blocking(call.read())
        if how % 3 == 2:
            call.send(Request(number=2))
        call.abandon()
        channel._unreleased.release()
        assert not call._call.is_kept

    with served(echo) as channel:
        for how in range(300):
            use(channel, how)
        gc.collect()
        before = psutil.Process().memory_info().rss
        for how in range(1500):
            use(channel, how)
        gc.collect()
        # A call that gRPC keeps has 18 KB: 27 MB.
        assert psutil.Process().memory_info().rss - before < 8_000_000


def test_two_threads_that_take_events_at_the_end_take_none_too_many() -> None:
    with served(echo) as channel, ThreadPoolExecutor(2) as pool:
        for _ in range(300):
            call = opened(channel)
            call.send(Request(number=1))
            started: queue.SimpleQueue[None] = queue.SimpleQueue()

            def read(call: Any = call, started: Any = started) -> None:
                with suppress(errors.RequestError):
                    while True:
                        started.put(None)
                        if blocking(call.read()) is None:
                            return

            reading = pool.submit(read)
            started.get()
            call.abandon()
            pool.submit(channel._unreleased.release).result(timeout=10)
            reading.result(timeout=10)
            channel._unreleased.release()
            assert not call._call.is_kept
