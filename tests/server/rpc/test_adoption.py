"""A worker over two lives of its server: which reports are acknowledged, and which leases continue."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from lattice.v1 import payload_pb2, results_pb2, run_pb2, worker_pb2

from lattice_server.engine.recording.durability import Durability
from tests.server.apps import NoWorkers
from tests.server.rpc.scripted_worker import SESSION_TTL_S, TIMEOUT_S, Scene, ScriptedWorker, on_stage, succeeded

STARTED = worker_pb2.AttemptStarted()
BEAT_S = 0.5  # A heartbeat comes later than an acknowledgement that is due would.


class Gate:
    """Holds back that commits are durable, until it is open."""

    def __init__(self) -> None:
        self.held: list[tuple[Durability, int]] = []
        self._real = Durability.durable
        self._is_open = threading.Event()

    def durable(self, durability: Durability, number: int) -> None:
        if self._is_open.is_set():
            self._real(durability, number)
        else:
            self.held.append((durability, number))

    def method(self) -> Callable[[Durability, int], None]:
        """Return a method of `Durability` in place of its own."""

        def durable(durability: Durability, number: int) -> None:
            self.durable(durability, number)

        return durable

    def open(self) -> None:
        self._is_open.set()
        for held in self.held:
            self._real(*held)


def head(journal: Path, **settings: Any) -> Any:
    """Return a server on a journal, to be used in a `with` statement."""
    limits = {"session_ttl_s": SESSION_TTL_S} | settings
    return on_stage(NoWorkers(), journal=str(journal), stop_grace_s=0.1, **limits)


async def work_of(worker: ScriptedWorker) -> worker_pb2.Assignment:
    (found,) = (await worker.hear("assignments")).assignments
    return found  # type: ignore[no-any-return]


async def acknowledged(worker: ScriptedWorker) -> int:
    found = (await worker.hear("acknowledged_sequence")).acknowledged_sequence
    return int(found)


async def events(scene: Scene, run_id: str) -> list[run_pb2.RunEvent]:
    watch = scene.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
    return [event async for response in watch for event in response.events]


def test_a_report_is_acknowledged_only_when_its_event_is_durable(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(TIMEOUT_S), head(tmp_path, session_ttl_s=6 * BEAT_S) as scene:
            worker, _ = await scene.worker()
            run_id = await scene.run("a")
            lease = await work_of(worker)
            gate = Gate()
            with mock.patch.object(Durability, "durable", gate.method()):
                await worker.report(1, lease.lease_id, succeeded=succeeded())
                assert not (await worker.next()).acknowledged_sequence
                assert gate.held
                # A report that comes again is not acknowledged by that.
                await worker.report(1, lease.lease_id, succeeded=succeeded())
                assert not (await worker.next()).acknowledged_sequence
                gate.open()
                assert await acknowledged(worker) == 1
            assert (await scene.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED

    asyncio.run(scenario())


def test_a_worker_continues_its_leases_with_a_server_that_was_started_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with head(tmp_path) as scene:
            worker, first = await scene.worker(capacity={"cpu": 2, "slots": 2})
            run_id = await scene.run("a", "b")
            leases = {}
            while len(leases) < 2:
                for lease in (await worker.hear("assignments")).assignments:
                    leases[lease.attempts[0].task_id] = lease
                    await worker.report(len(leases), lease.lease_id, started=STARTED)
            while await acknowledged(worker) < 2:
                pass
        async with head(tmp_path) as scene:
            held = [leases[name].lease_id for name in ("a", "b")]
            hello = {
                "session_id": first.session_id,
                "held_lease_ids": [*held, "unknown"],
                "held_leases": [worker_pb2.HeldLease(lease_id=lease_id) for lease_id in held],
                "capacity": {"cpu": 2, "slots": 2},
            }
            worker, second = await scene.worker(**hello)
            assert (second.resumed, list(second.adopted_lease_ids)) == (False, held)
            assert list(second.drop_lease_ids) == ["unknown"]
            assert second.session_id.split("-")[0] != first.session_id.split("-")[0]
            # Its welcome may be lost: it says hello as before, and gets the same answer.
            worker.hang_up()
            worker, again = await scene.worker(**hello)
            assert (again.session_id, list(again.adopted_lease_ids)) == (second.session_id, held)
            await worker.report(1, leases["a"].lease_id, succeeded=succeeded())
            await worker.report(2, leases["a"].lease_id, succeeded=succeeded())
            await worker.report(3, leases["b"].lease_id, succeeded=succeeded())
            assert (await scene.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
            kinds = [(event.WhichOneof("event")) for event in await events(scene, run_id)]
            assert sorted(kinds) == [
                "run_finished",
                "run_started",
                "task_started",
                "task_started",
                "task_succeeded",
                "task_succeeded",
            ]
            worker.hang_up()

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_a_worker_that_cannot_continue_leases_gets_its_task_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with head(tmp_path) as scene:
            worker, first = await scene.worker()
            run_id = await scene.run("a")
            lease = await work_of(worker)
            await worker.report(1, lease.lease_id, started=STARTED)
            await acknowledged(worker)
        async with head(tmp_path) as scene:
            worker, second = await scene.worker(session_id=first.session_id, held_lease_ids=[lease.lease_id])
            assert (list(second.adopted_lease_ids), list(second.drop_lease_ids)) == ([], [lease.lease_id])
            again = await work_of(worker)
            assert again.attempts[0].number == 2
            # The worker ended the older lease; a report about it that it had sent counts for nothing.
            other = payload_pb2.Payload(json="2")
            await worker.report(1, lease.lease_id, succeeded=worker_pb2.AttemptSucceeded(outputs={"out": other}))
            await worker.report(2, again.lease_id, succeeded=succeeded())
            (end,) = [event for event in await events(scene, run_id) if event.HasField("task_succeeded")]
            assert (end.task_succeeded.attempt, end.task_succeeded.outputs["out"].json) == (2, "1")
            worker.hang_up()

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_a_held_lease_with_a_long_name_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with head(tmp_path) as scene:
            worker = ScriptedWorker(scene.channel)
            held = [worker_pb2.HeldLease(lease_id="x" * 300)]
            await worker.say(hello=scene.hello(held_leases=held))
            close = await worker.hear("close")
            assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
            assert close.message.startswith("hello.held_leases[0]: ")

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
