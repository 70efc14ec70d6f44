"""The synchronous client: its calls run in the caller's thread, which reads the answers to its runs too, and calls that
the caller does not wait for leave nothing behind."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from lattice_client import AsyncLatticeClient, LatticeClient, NotFoundError, Run, TaskFailedError, task
from lattice_client.runs import executions
from lattice_client.runs.driver import blocking
from lattice_client.transport.blocking import BlockingChannel
from lattice_client.transport.blocking_calls import BlockingMailbox, MessageStream
from lattice_client.transport.channel import BidiCall, dial
from tests.server.apps import NoWorkers, serving, serving_aside


@task
async def double(x: int) -> int:
    return 2 * x


@task
async def fail() -> None:
    raise KeyError("no")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[MessageStream[Any]]:
    """All streams that are opened from now on."""
    found: list[MessageStream[Any]] = []
    init = MessageStream.__init__

    def noted(self: MessageStream[Any], call: Any) -> None:
        init(self, call)
        found.append(self)

    monkeypatch.setattr(MessageStream, "__init__", noted)
    return found


@contextmanager
def waiting_client() -> Iterator[LatticeClient]:
    """A client of a server whose runs wait for ever."""
    with serving_aside(NoWorkers()) as address, LatticeClient(address) as client:
        yield client


def start(client: LatticeClient, x: int = 1) -> Run:
    workflow = client.create_workflow()
    workflow.add_task(double, {"x": x})
    return workflow.run()


def waiting(client: LatticeClient) -> int:
    """Return how many runs wait on the client's stream."""
    (stream,) = client.twin.api.channel.kept().values()
    return len(stream.waiting)


def test_only_a_caller_with_a_time_limit_has_a_thread_read_the_answers(
    client: LatticeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    begin = threading.Thread.start

    def noted(self: threading.Thread) -> None:
        # The server of this process starts threads of its own.
        if threading.current_thread() is threading.main_thread():
            started.append(self.name)
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", noted)
    with LatticeClient(client.target) as own:
        run = start(own)
        assert run.result() == {"result": 2}
        assert [event.type for event in run.events()][-1] == "run_finished"
        assert started == [], "the first run needs a call only"
        assert [start(own, x).result() for x in range(3)] == [{"result": 2 * x} for x in range(3)]
        assert own.run_task(double, {"x": 2}) == {"result": 4}
        assert started == []
        for x in range(3):
            assert start(own, x).result(timeout=60) == {"result": 2 * x}
        assert started == ["lattice-answers"]
        assert start(own, 4).result() == {"result": 8}
        assert waiting(own) == 0


def test_events_are_released_when_they_were_read_to_the_end(
    client: LatticeClient, streams: list[MessageStream[Any]]
) -> None:
    run = start(client)
    run.result()
    list(run.events())
    start(client).result()
    assert [stream.is_kept for stream in streams] == [False]


def test_refused_runs_raise_and_are_not_waited_for(client: LatticeClient) -> None:
    start(client).result()
    for _ in range(3):
        with pytest.raises(NotFoundError, match="nothing") as caught:
            client.get_workflow("nothing").run()
        assert caught.value.reason == "WORKFLOW_NOT_FOUND"
    assert start(client).result() == {"result": 2}
    assert waiting(client) == 0


def test_dropped_runs_are_waited_for_no_more_and_continue() -> None:
    with waiting_client() as client:
        runs = [start(client) for _ in range(4)]
        with pytest.raises(TimeoutError):
            runs[1].result(timeout=0.05)
        assert waiting(client) == 3, "the first was started by a call"
        run_ids = [str(run) for run in runs]
        del runs
        gc.collect()
        assert waiting(client) == 0
        assert [client.get_run(run_id).status() for run_id in run_ids] == ["running"] * 4


def test_client_that_is_dropped_ends_its_stream_and_its_thread() -> None:
    def reading() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "lattice-answers"}

    with waiting_client() as other:
        before = reading()
        client = LatticeClient(other.target)
        start(client)
        with pytest.raises(TimeoutError):
            start(client).result(timeout=0.05)
        (thread,) = reading() - before
        del client
        gc.collect()
        thread.join(60)
        assert not thread.is_alive()


def test_runs_are_started_by_calls_when_the_stream_breaks(client: LatticeClient) -> None:
    runs = [start(client, x) for x in range(3)]
    (stream,) = client.twin.api.channel.kept().values()
    stream.abandon()
    assert [run.result() for run in runs] == [{"result": 2 * x} for x in range(3)]
    assert [start(client, x).result() for x in range(3)] == [{"result": 2 * x} for x in range(3)]
    assert not next(iter(client.twin.api.channel.kept().values())).is_broken, "there is another one"


def test_result_is_the_same_in_all_waiting_threads(client: LatticeClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        for x in range(20):
            run = start(client, x)
            assert list(pool.map(lambda _, run=run: run.result(timeout=60), range(8))) == [{"result": 2 * x}] * 8


def test_runs_beyond_those_of_a_stream_have_results(client: LatticeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executions, "MAX_WAITING", 3)
    with waiting_client() as idle:
        runs = [start(idle, x) for x in range(8)]
        assert waiting(idle) == 3
        assert [run.status() for run in runs] == ["running"] * 8
    runs = [start(client, x) for x in range(8)]
    assert [run.result() for run in runs] == [{"result": 2 * x} for x in range(8)]


def test_a_failure_comes_by_the_stream_and_by_a_later_call_alike(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(fail)
    run = workflow.run()
    for handle in (run, run, client.get_run(str(run))):
        with pytest.raises(TaskFailedError) as caught:
            handle.result()
        assert isinstance(caught.value.__cause__, KeyError)


def test_result_can_be_read_again_when_a_wait_timed_out(client: LatticeClient, gate: Any) -> None:
    @task
    def wait(path: str) -> str:
        with open(path, encoding="utf-8") as pipe:
            return pipe.read()

    workflow = client.create_workflow()
    workflow.add_task(wait, {"path": str(gate)})
    run = workflow.run()
    for _ in range(2):
        with pytest.raises(TimeoutError, match="it continues"):
            run.result(timeout=0.05)
    gate.write_text("open")
    assert run.result(timeout=60) == {"result": "open"}


def test_time_limit_ends_with_its_block() -> None:
    with waiting_client() as client:
        run = start(client)
        with pytest.raises(TimeoutError):
            run.result(timeout=0.01)
        assert run.status() == "running"
        assert isinstance(client.twin.api.channel, BlockingChannel)


class EndedStream(BidiCall[Any, Any]):
    """A stream that the server has ended."""

    def send(self, message: Any) -> None:
        """Send into nothing."""

    async def read(self) -> None:
        """Return the end."""

    def abandon(self) -> None:
        """Do nothing."""


def test_a_request_that_meets_the_end_of_the_stream_is_answered_by_none() -> None:
    stream = executions._Stream(BlockingChannel(dial("127.0.0.1:1")), EndedStream())
    assert not blocking(stream._step())
    sent = stream.send(executions.Request(), BlockingMailbox(), is_alone=False)
    assert blocking(sent.accepted()) is None


def test_a_run_that_a_stopping_server_refuses_is_started_by_a_call_that_is_repeated() -> None:
    async def scenario() -> None:
        async with serving(NoWorkers()) as app, AsyncLatticeClient(app.address) as client:
            for x in range(2):
                workflow = client.create_workflow()
                workflow.add_task(double, {"x": x})
                await workflow.run()
            app._engine.orchestrator.is_stopping = True
            asyncio.get_running_loop().call_later(0.05, setattr, app._engine.orchestrator, "is_stopping", False)
            workflow = client.create_workflow()
            workflow.add_task(double, {"x": 2})
            assert await (await workflow.run()).status() == "running"

    asyncio.run(asyncio.wait_for(scenario(), 60))
