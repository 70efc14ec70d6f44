"""The stop of a server: by itself after a failure, and completely when one part cannot end."""

import asyncio
import threading
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
from lattice.v1 import results_pb2, results_pb2_grpc, workflow_pb2, workflow_pb2_grpc

from lattice_server import app
from lattice_server.config import ServerConfig
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine import scheduler_thread
from lattice_server.security import SecurityError
from tests.server.apps import NoWorkers, build, serving
from tests.server.rpc import callers

TIMEOUT_S = 60.0


def test_a_server_whose_scheduler_fails_ends_and_so_do_the_calls_of_its_readers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise AssertionError("a broken invariant")

    async def read(address: str) -> grpc.StatusCode | None:
        async with grpc.aio.insecure_channel(address) as channel:
            runs, results = workflow_pb2_grpc.WorkflowServiceStub(channel), results_pb2_grpc.ResultsServiceStub(channel)
            graph = callers.graph(callers.task())
            request = workflow_pb2.RunWorkflowRequest(workflow=graph)
            run_id = (await runs.RunWorkflow(request)).run.run_id
            try:
                async for _ in results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id)):
                    monkeypatch.setattr(Scheduler, "tick", fail)
                    await runs.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id))
            except grpc.aio.AioRpcError as error:
                return error.code()
        return None

    async def scenario() -> None:
        reading: list[asyncio.Task[grpc.StatusCode | None]] = []
        config = ServerConfig(port=0, num_cpus=0, stop_grace_s=0.0)
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(app.SchedulerError, match="a part of the server failed"):
                await app.serve(config, lambda address, _: reading.append(asyncio.create_task(read(address))))
            assert await reading[0] is not None

    monkeypatch.setattr(app, "executor_of", lambda *_: NoWorkers())
    monkeypatch.setattr(scheduler_thread, "PAUSES_S", (0.0, 0.0))
    asyncio.run(scenario())


def test_every_part_of_a_server_is_ended_when_another_one_raises() -> None:
    class Broken(NoWorkers):
        """An executor whose `stop` raises."""

        async def stop(self) -> None:
            """Fail."""
            raise OSError("it cannot be ended")

    async def scenario() -> None:
        server = build(Broken())
        await server.start()
        before = {thread.name for thread in threading.enumerate()}
        with pytest.raises(OSError, match="it cannot be ended"):
            await server.stop()
        assert "lattice-scheduler" in before - {thread.name for thread in threading.enumerate()}
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await workflow_pb2_grpc.WorkflowServiceStub(channel).ListRuns(workflow_pb2.ListRunsRequest())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


@pytest.mark.parametrize("setting", ["secrets_file", "tokens_file"])
def test_a_server_that_cannot_be_built_leaves_no_files_and_no_locked_journal(setting: str, short_path: Path) -> None:
    store, journal = short_path / "store", short_path / "journal"
    store.mkdir()

    async def scenario() -> None:
        kept = {"store_folder": str(store), "journal": str(journal)}
        with pytest.raises(SecurityError, match="No such file"):
            build(NoWorkers(), **kept, **{setting: str(short_path / "missing")})
        assert list(store.iterdir()) == []
        async with serving(NoWorkers(), **kept):
            assert len(list(store.iterdir())) == 1

    asyncio.run(scenario())
    assert list(store.iterdir()) == []


def test_a_server_is_stopped_when_its_address_cannot_be_announced(
    monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise BrokenPipeError

    monkeypatch.setattr(app, "executor_of", lambda *_: NoWorkers())
    config = ServerConfig(port=0, num_cpus=0, store_folder=str(short_path))
    with pytest.raises(BrokenPipeError):
        asyncio.run(app.serve(config, fail))
    assert list(short_path.iterdir()) == []
    assert "lattice-scheduler" not in {thread.name for thread in threading.enumerate()}
