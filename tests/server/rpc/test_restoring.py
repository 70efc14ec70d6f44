"""A server that answers while it still restores the live runs of its journal."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from lattice.v1 import cluster_pb2, errors_pb2, run_pb2, worker_pb2, workflow_pb2

from lattice_server.engine.recording.journal_records import StoredRun
from lattice_server.engine.restoring.run_maker import Recorded
from lattice_server.engine.restoring.run_restorer import RunRestorer
from lattice_server.journal.cells import Cells
from lattice_server.journal.files import Files
from tests.server.apps import NoWorkers, serving
from tests.server.rpc.callers import graph, task
from tests.server.rpc.scripted_worker import SESSION_TTL_S, TIMEOUT_S, Scene, ScriptedWorker, on_stage

RUNS = ("r0", "r1", "r2")


class Gate:
    """Holds back the restoration of all runs but the named ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed: set[str] = set()
        self.is_open = threading.Event()
        self._read = RunRestorer._read

        def read(restorer: RunRestorer, stored: StoredRun) -> Recorded:
            return self.read(restorer, stored)

        monkeypatch.setattr(RunRestorer, "_read", read)

    def read(self, restorer: RunRestorer, stored: StoredRun) -> Recorded:
        if stored.run_id not in self.passed:
            assert self.is_open.wait(TIMEOUT_S)
        return self._read(restorer, stored)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@asynccontextmanager
async def head(journal: Path, **settings: Any) -> AsyncIterator[Scene]:
    async with (
        asyncio.timeout(TIMEOUT_S),
        on_stage(NoWorkers(), journal=str(journal), stop_grace_s=0.1, session_ttl_s=SESSION_TTL_S, **settings) as scene,
    ):
        yield scene


async def start(scene: Scene, run_id: str) -> workflow_pb2.RunWorkflowResponse:
    request = workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=graph(task("a")))
    return await scene.workflows.RunWorkflow(request)  # type: ignore[no-any-return]


async def state_of(scene: Scene, run_id: str) -> run_pb2.RunState.ValueType:
    found = await scene.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id))
    return found.run.state  # type: ignore[no-any-return]


async def listed(scene: Scene) -> list[str]:
    return [found.run_id for found in (await scene.workflows.ListRuns(workflow_pb2.ListRunsRequest())).runs]


async def active(scene: Scene) -> int:
    found = await scene.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    return int(found.active_runs)


async def recorded(journal: Path) -> None:
    async with head(journal) as scene:
        for run_id in RUNS:
            await start(scene, run_id)


def test_a_run_that_a_call_names_is_restored_before_the_others(tmp_path: Path, gate: Gate) -> None:
    async def scenario() -> None:
        await recorded(tmp_path)
        gate.passed.add("r2")
        async with head(tmp_path) as scene:
            assert await active(scene) == 3
            assert await state_of(scene, "r2") == run_pb2.RUN_STATE_RUNNING
            assert not (await start(scene, "r2")).created
            waiting = asyncio.ensure_future(state_of(scene, "r0"))
            await asyncio.sleep(0)
            assert await active(scene) == 3
            assert not waiting.done()
            gate.is_open.set()
            assert await waiting == run_pb2.RUN_STATE_RUNNING

    asyncio.run(scenario())


def test_calls_that_need_all_runs_wait_until_these_are_restored(tmp_path: Path, gate: Gate) -> None:
    async def scenario() -> None:
        await recorded(tmp_path)
        async with head(tmp_path) as scene:
            listing = asyncio.ensure_future(listed(scene))
            starting = asyncio.ensure_future(start(scene, "r3"))
            deleting = asyncio.ensure_future(
                scene.workflows.DeleteRun(workflow_pb2.DeleteRunRequest(run_id="r1")).code()
            )
            for _ in range(20):
                assert await active(scene) == 3
            assert not any(call.done() for call in (listing, starting, deleting))
            gate.is_open.set()
            assert (await starting).created
            assert await deleting is grpc.StatusCode.FAILED_PRECONDITION
            assert {"r0", "r1", "r2"} <= set(await listing)
            assert await active(scene) == 4

    asyncio.run(scenario())


def test_a_worker_is_welcome_once_all_runs_are_restored(tmp_path: Path, gate: Gate) -> None:
    async def scenario() -> None:
        gate.is_open.set()
        async with head(tmp_path) as scene:
            await start(scene, "r0")
            worker, first = await scene.worker()
            (lease,) = (await worker.hear("assignments")).assignments
            await worker.report(1, lease.lease_id, started=worker_pb2.AttemptStarted())
            await scene.until_event("r0", "task_started")
        gate.is_open.clear()
        async with head(tmp_path) as scene:
            worker = ScriptedWorker(scene.channel)
            held = worker_pb2.HeldLease(lease_id=lease.lease_id)
            hello = scene.hello(session_id=first.session_id, held_lease_ids=[lease.lease_id], held_leases=[held])
            await worker.say(hello=hello)
            welcome = asyncio.ensure_future(worker.hear("welcome"))
            for _ in range(20):
                assert await active(scene) == 1
            assert not welcome.done()
            gate.is_open.set()
            assert list((await welcome).adopted_lease_ids) == [lease.lease_id]

    asyncio.run(scenario())


def test_a_server_that_stops_while_it_restores_loses_no_run(tmp_path: Path, gate: Gate) -> None:
    async def scenario() -> None:
        await recorded(tmp_path)
        async with asyncio.timeout(TIMEOUT_S):
            async with serving(NoWorkers(), journal=str(tmp_path), stop_grace_s=5.0) as app:
                channel = grpc.aio.insecure_channel(app.address)
                scene = Scene(channel)
                waiting = asyncio.ensure_future(scene.workflows.GetRun(workflow_pb2.GetRunRequest(run_id="r0")).code())
                assert await active(scene) == 3
            assert await waiting is grpc.StatusCode.UNAVAILABLE
            await channel.close()
            gate.is_open.set()
            async with head(tmp_path) as scene:
                assert sorted(await listed(scene)) == list(RUNS)

    asyncio.run(scenario())


def test_an_open_run_is_taken_over_before_other_runs_are_restored(tmp_path: Path, gate: Gate) -> None:
    async def opened(scene: Scene, **opening: Any) -> workflow_pb2.RunWorkflowResponse:
        call = scene.workflows.OpenRun()
        await call.write(workflow_pb2.OpenRunRequest(opening=workflow_pb2.OpenRunOpening(**opening)))
        return (await call.read()).accepted  # type: ignore[no-any-return]

    async def scenario() -> None:
        await recorded(tmp_path)
        gate.passed.add("open")
        async with head(tmp_path) as scene:
            gate.is_open.set()
            run = workflow_pb2.RunWorkflowRequest(run_id="open", workflow=graph(task("a")))
            assert (await opened(scene, run=run)).created
        gate.is_open.clear()
        async with head(tmp_path) as scene:
            for opening in ({"run_id": "open"}, {"run": run}):
                accepted = await opened(scene, **opening)
                assert (accepted.created, accepted.run.run_id) == (False, "open")
            gate.is_open.set()

    asyncio.run(scenario())


def test_a_time_limit_holds_when_the_clock_was_set_back_before_a_restart(tmp_path: Path, gate: Gate) -> None:
    async def scenario() -> None:
        gate.is_open.set()
        async with head(tmp_path) as scene:
            request = workflow_pb2.RunWorkflowRequest(run_id="r", workflow=graph(task("a")))
            request.timeout.FromMilliseconds(500)
            await scene.workflows.RunWorkflow(request)
        with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database, database:
            database.execute("UPDATE runs SET accepted_s = accepted_s + 86400 WHERE ended_s IS NULL")
        async with head(tmp_path) as scene:
            assert (await scene.result("r")).failure.kind == errors_pb2.FAILURE_KIND_TIMEOUT

    asyncio.run(scenario())


def test_a_live_run_with_unreadable_settings_is_refused_while_others_are_restored(tmp_path: Path, gate: Gate) -> None:
    async def scenario() -> None:
        await recorded(tmp_path)
        # The checksum is right, and the bytes are no message.
        cell, _ = Cells(Files(tmp_path / "values")).pack(b"\xff")
        with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database, database:
            database.execute("UPDATE runs SET settings = ? WHERE run_id = 'r1'", (cell,))
        gate.passed.add("r1")
        for _ in range(2):
            async with head(tmp_path) as scene:
                call = scene.workflows.GetRun(workflow_pb2.GetRunRequest(run_id="r1"))
                assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
                gate.is_open.set()
                assert sorted(await listed(scene)) == ["r0", "r2"]

    asyncio.run(scenario())
