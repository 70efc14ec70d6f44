"""The streams of machines on which Ray starts the workers."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import cluster_pb2, worker_pb2

from lattice_server.config import ServerConfig
from lattice_server.engine.ports import Machine, Membership, RayCluster
from lattice_server.rpc import callers
from lattice_server.rpc.machines import Machines
from tests.server.apps import NoWorkers
from tests.server.rpc.scripted_worker import Scene, ScriptedWorker, play

TTL_S = 0.9
# Longer than any test: nothing falls silent.
LONG_S = 3600.0
LIMIT_S = 60.0
RAY = RayCluster("10.0.0.1:6379", "token", "resource", "ray 1 on python 3")


class TakesMachines(NoWorkers):
    """An executor with a Ray that machines join, and that starts nothing there."""

    def __init__(self) -> None:
        self.joined: asyncio.Queue[tuple[Machine, Membership]] = asyncio.Queue()
        self.left: asyncio.Queue[str] = asyncio.Queue()

    async def join(self, machine: Machine) -> Membership:
        """Take a machine in."""
        membership = Membership(RAY, asyncio.get_running_loop().create_future())
        self.joined.put_nowait((machine, membership))
        return membership

    def leave(self, node_id: str, membership: Membership) -> None:
        """Note that a machine left."""
        self.left.put_nowait(node_id)


async def join(head: Scene, node_id: str = "m") -> tuple[ScriptedWorker, worker_pb2.Joined]:
    """Have a machine join."""
    worker = ScriptedWorker(head.channel)
    await worker.say(join={"node_id": node_id, "protocol_version": 1, "node_ip": "10.0.0.2", "labels": {"zone": "eu"}})
    return worker, await worker.hear("joined")


def test_machine_belongs_to_the_cluster_while_its_stream_is_open() -> None:
    executor = TakesMachines()

    async def scenario(head: Scene) -> None:
        worker, joined = await join(head)
        assert (joined.ray.address, joined.ray.token, joined.ray.resource) == (RAY.address, RAY.token, RAY.resource)
        assert joined.silence_limit.ToTimedelta().total_seconds() == pytest.approx(LONG_S * 2 / 3)
        machine, _ = await executor.joined.get()
        assert (machine.node_id, machine.node_ip, machine.labels) == ("m", "10.0.0.2", {"zone": "eu"})
        assert executor.left.empty()
        worker.hang_up()
        assert await executor.left.get() == "m"

    play(scenario, executor, session_ttl_s=LONG_S)


def test_machine_leaves_when_it_falls_silent() -> None:
    executor = TakesMachines()

    async def scenario(head: Scene) -> None:
        worker, _ = await join(head)
        assert await executor.left.get() == "m"
        worker.hang_up()

    play(scenario, executor, session_ttl_s=TTL_S)


def test_machine_stays_when_it_sends_heartbeats() -> None:
    executor = TakesMachines()

    async def scenario(head: Scene) -> None:
        worker, joined = await join(head)
        interval_s = joined.heartbeat_interval.ToTimedelta().total_seconds()
        for _ in range(int(3 * TTL_S / interval_s)):
            await worker.say()
            await asyncio.sleep(interval_s)
        await worker.hear("")
        assert executor.left.empty()
        worker.hang_up()
        assert await executor.left.get() == "m"

    play(scenario, executor, session_ttl_s=TTL_S)


@pytest.mark.parametrize("reason", ["DRAINED", "SHUTDOWN"])
def test_stream_of_a_machine_ends_with_a_reason(reason: str) -> None:
    executor = TakesMachines()

    async def scenario(head: Scene) -> None:
        worker, _ = await join(head)
        _, membership = await executor.joined.get()
        membership.over.set_result(reason)
        close = await worker.hear("close")
        assert close.reason == worker_pb2.CloseReason.Value(f"CLOSE_REASON_{reason}")
        assert close.message
        worker.hang_up()
        assert await executor.left.get() == "m"

    play(scenario, executor, session_ttl_s=LONG_S)


def test_machine_is_drained_by_its_own_deadline_when_it_leaves() -> None:
    executor = TakesMachines()

    async def scenario(head: Scene) -> None:
        machine, _ = await join(head)
        worker, _ = await head.worker(node_id="m")
        await head.run("a")
        await worker.hear("assignments")
        other, _ = await head.worker(worker_id="other", node_id="other")
        await machine.say(draining={"deadline": Duration(seconds=7)})
        drain = await worker.hear("drain")
        assert drain.deadline.ToTimedelta().total_seconds() == 7
        await head.until_states(m=cluster_pb2.NODE_STATE_DRAINING, other=cluster_pb2.NODE_STATE_READY)
        for each in (machine, other, worker):
            each.hang_up()

    play(scenario, executor, session_ttl_s=LONG_S)


def test_machine_leaves_at_once_when_it_has_no_worker() -> None:
    executor = TakesMachines()

    async def scenario(head: Scene) -> None:
        other, _ = await head.worker(worker_id="other", node_id="other")
        worker, _ = await join(head)
        await worker.say(draining={})
        assert (await worker.hear("close")).reason == worker_pb2.CLOSE_REASON_DRAINED
        worker.hang_up()
        other.hang_up()
        assert await executor.left.get() == "m"

    play(scenario, executor, session_ttl_s=LONG_S)


def test_machine_does_not_leave_ray_when_it_serves_its_node_itself() -> None:
    class Refers(TakesMachines):
        async def join(self, machine: Machine) -> Membership:
            return Membership(None, asyncio.get_running_loop().create_future())

    executor = Refers()

    async def scenario(head: Scene) -> None:
        worker, joined = await join(head)
        assert not joined.HasField("ray")
        worker.hang_up()
        # A stream that was served later is over as well.
        again, _ = await join(head, "n")
        again.hang_up()
        assert executor.left.empty()

    play(scenario, executor, session_ttl_s=LONG_S)


class Stream:
    """A machine's stream without a network; a test chooses its messages and its end."""

    def __init__(self, *said: worker_pb2.ConnectRequest, session_ttl_s: float = LONG_S) -> None:
        self.executor = TakesMachines()
        self.is_read_no_more = asyncio.Event()
        self._said: asyncio.Queue[worker_pb2.ConnectRequest | None] = asyncio.Queue()
        for request in said:
            self.say(request)
        nobody: Any = SimpleNamespace(nodes=self._nodes)
        machines = Machines(ServerConfig(session_ttl_s=session_ttl_s), self.executor, nobody, nobody)
        self.responses = machines.serve(worker_pb2.Join(node_id="m"), self._requests())

    def say(self, request: worker_pb2.ConnectRequest | None) -> None:
        """Send a message; None ends the machine's side of the stream."""
        self._said.put_nowait(request)

    async def _nodes(self) -> Any:
        return SimpleNamespace(nodes=[])

    async def _requests(self) -> AsyncIterator[worker_pb2.ConnectRequest]:
        try:
            while (request := await self._said.get()) is not None:
                yield request
        finally:
            self.is_read_no_more.set()


def test_machine_leaves_when_its_stream_breaks_before_the_answer() -> None:
    async def scenario() -> None:
        stream = Stream()
        await anext(stream.responses)
        await asyncio.sleep(0)
        await stream.responses.aclose()
        assert stream.executor.left.get_nowait() == "m"
        await asyncio.wait_for(stream.is_read_no_more.wait(), 30)

    callers.enter(callers.TRUSTED)
    asyncio.run(scenario())


def test_machine_stays_when_this_thread_stalls_for_longer_than_it_may_be_silent() -> None:
    async def scenario() -> None:
        stream = Stream(session_ttl_s=TTL_S)

        async def send() -> None:
            async for _ in stream.responses:
                pass

        async def settle() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        sending = asyncio.create_task(send())
        await settle()
        time.sleep(2 * TTL_S)  # That is the point.
        await settle()  # Timers are due first; messages that came meanwhile are read after them.
        assert stream.executor.left.empty()
        stream.say(worker_pb2.ConnectRequest())
        assert await stream.executor.left.get() == "m", "it is silent now"
        await sending

    callers.enter(callers.TRUSTED)
    asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))


def test_machine_has_time_to_read_the_last_message() -> None:
    async def scenario() -> None:
        leaving = worker_pb2.ConnectRequest(draining=worker_pb2.Draining())
        stream = Stream(leaving, leaving)
        joined, closed = [await anext(stream.responses) for _ in range(2)]
        assert joined.HasField("joined")
        assert closed.HasField("close")
        end = asyncio.ensure_future(anext(stream.responses, None))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not end.done()
        stream.say(None)
        assert await end is None
        assert stream.executor.left.get_nowait() == "m"

    callers.enter(callers.TRUSTED)
    asyncio.run(scenario())
