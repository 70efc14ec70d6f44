"""Tasks in the background of a server: it stops when a part of it fails, and a caller gets an answer."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
from lattice.v1 import task_pb2

from lattice_server import app
from lattice_server.config import ServerConfig
from lattice_server.engine.ports import Contact
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.executors import local
from lattice_server.rpc import executions
from lattice_server.tokens import reload_on_change
from tests.server.apps import NoWorkers

TIMEOUT_S = 60.0


def fail(*_: Any) -> NoReturn:
    raise ValueError("a bug")


def play(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario

    asyncio.run(limited())


def test_server_stops_when_the_heartbeats_of_its_sessions_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        with pytest.raises(app.SchedulerError, match="a part of the server failed"):
            await app.serve(ServerConfig(port=0, num_cpus=1, stop_grace_s=0.0), lambda address, _: None)

    async def watch(sessions: Sessions, interval_s: float) -> None:
        fail()

    monkeypatch.setattr(app, "executor_of", lambda *_: NoWorkers())
    monkeypatch.setattr(Sessions, "watch", watch)
    play(scenario())


def test_local_executor_tells_the_server_when_it_starts_no_more_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        told: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        executor = local.LocalExecutor(ServerConfig(num_cpus=1), tmp_path)
        contact = Contact("unix:none", "none", lambda node_id, subject: "", lambda token: None, told.set_result)
        await executor.start(contact, lambda events: None)
        assert str(await told) == "a bug"
        await executor.stop()

    monkeypatch.setattr(local, "worker_command", fail)
    play(scenario())


def test_caller_of_a_stream_is_refused_when_the_answer_to_its_task_is_cancelled() -> None:
    async def scenario() -> None:
        async def run_task(request: task_pb2.RunTaskRequest) -> task_pb2.RunTaskResponse:
            raise asyncio.CancelledError

        refused: list[str] = []
        unused: Any = None
        stream = executions._Stream(unused, unused, run_task, None, unused, refused.append, is_read=False)
        request = executions.workflow_pb2.ExecuteWorkflowsRequest(number=3, task=task_pb2.RunTaskRequest())
        await stream._take(request)
        response = await stream.next()
        assert isinstance(response, executions.Response)
        assert (response.number, response.WhichOneof("message"), refused) == (3, "refused", ["INTERNAL"])
        stream.finish()
        assert await stream.next() is None

    play(scenario())


def test_stream_ends_when_its_requests_can_no_longer_be_read() -> None:
    async def scenario() -> None:
        async def run_task(request: task_pb2.RunTaskRequest) -> task_pb2.RunTaskResponse:
            return await asyncio.get_running_loop().create_future()

        async def requests() -> AsyncIterator[executions.workflow_pb2.ExecuteWorkflowsRequest]:
            yield executions.workflow_pb2.ExecuteWorkflowsRequest(number=1, task=task_pb2.RunTaskRequest())
            fail()

        unused: Any = None
        orchestrator = cast(Any, SimpleNamespace(tethers=None))
        streams = executions.ExecutionStreams(orchestrator, unused, unused, run_task, None, unused)
        with pytest.raises(ValueError, match="a bug"):
            await anext(streams.serve(requests()))

    play(scenario())


def test_file_is_still_watched_when_reading_it_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        path, contents = tmp_path / "file", asyncio.Queue[str]()
        path.write_text("old")

        def read(path: Path) -> str:
            text = path.read_text()
            return fail() if text == "bad" else text

        watching = asyncio.create_task(reload_on_change(path, "--file", read, contents.put_nowait))
        while contents.empty():
            # The watch begins in another thread.
            for text in ("bad", "new"):
                path.write_text(text)
                await asyncio.sleep(0.05)
        assert await contents.get() == "new"
        assert not watching.done()
        watching.cancel()

    play(scenario())
