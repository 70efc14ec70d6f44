"""The synchronous client's calls run in the caller's thread, and leave nothing behind when they are not read to their
end."""

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from lattice_client import LatticeClient, NotFoundError, Run, TaskFailedError, task
from lattice_client.runs.submission import MAX_OPEN_CALLS
from lattice_client.transport.blocking import BlockingChannel
from lattice_client.transport.blocking_calls import MessageStream
from tests.server.apps import NoWorkers, serving_aside


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


def test_calls_start_no_thread(client: LatticeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    begin = threading.Thread.start

    def noted(self: threading.Thread) -> None:
        # The server of this process starts threads of its own.
        if threading.current_thread() is threading.main_thread():
            started.append(self)
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", noted)
    run = start(client)
    assert run.result() == {"result": 2}
    assert [event.type for event in run.events()][-1] == "run_finished"
    assert client.run_task(double, {"x": 2}) == {"result": 4}
    assert started == []


def test_calls_are_released_when_they_were_read_to_the_end(
    client: LatticeClient, streams: list[MessageStream[Any]]
) -> None:
    run = start(client)
    run.result()
    list(run.events())
    other = start(client)
    assert [stream.is_kept for stream in streams] == [False, False, True]
    assert other.result() == {"result": 2}


def test_calls_of_refused_runs_are_released(client: LatticeClient, streams: list[MessageStream[Any]]) -> None:
    for _ in range(3):
        with pytest.raises(NotFoundError):
            client.get_workflow("nothing").run()
    other = start(client)
    assert [stream.is_kept for stream in streams] == [False] * 3 + [True]
    assert other.result() == {"result": 2}


def test_calls_of_dropped_runs_are_released_with_the_next_call(streams: list[MessageStream[Any]]) -> None:
    with waiting_client() as client:
        runs = [start(client) for _ in range(3)]
        next(runs[0].events())
        with pytest.raises(TimeoutError):
            runs[1].result(timeout=0.05)
        assert all(stream.is_kept for stream in streams)
        run_ids = [str(run) for run in runs]
        del runs
        gc.collect()
        other = start(client)
        assert [stream.is_kept for stream in streams] == [False] * 4 + [True]
        assert [client.get_run(run_id).status() for run_id in [*run_ids, other]] == ["running"] * 4


def test_result_is_the_same_in_all_waiting_threads(client: LatticeClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        for x in range(20):
            run = start(client, x)
            assert list(pool.map(lambda _, run=run: run.result(timeout=60), range(8))) == [{"result": 2 * x}] * 8


def test_runs_beyond_the_open_streams_have_results(client: LatticeClient, streams: list[MessageStream[Any]]) -> None:
    runs = [start(client, x) for x in range(MAX_OPEN_CALLS + 6)]
    assert len(streams) == MAX_OPEN_CALLS
    assert [run.result() for run in runs] == [{"result": 2 * x} for x in range(len(runs))]
    start(client).result()
    assert len(streams) == MAX_OPEN_CALLS + 1


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
