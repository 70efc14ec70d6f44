"""Workers' streams: admission, replacement by newer streams, drain and close."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import (
    cluster_pb2,
    run_pb2,
    worker_pb2,
)

from lattice_server import __version__
from tests.server.apps import NoWorkers, serving
from tests.server.rpc.scripted_worker import TIMEOUT_S, Scene, ScriptedWorker, play, succeeded


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"hello": {"node_id": "n", "protocol_version": 1}}, "PROTOCOL_ERROR"),
        ({"hello": {"worker_id": "w", "protocol_version": 1}}, "PROTOCOL_ERROR"),
        ({"heartbeat": {}}, "PROTOCOL_ERROR"),
        ({"reports": [{}]}, "PROTOCOL_ERROR"),
        ({}, "PROTOCOL_ERROR"),
        ({"hello": {"worker_id": "lost", "node_id": "n", "protocol_version": 1}}, "LOST"),
    ],
)
def test_stream_is_closed_with_a_reason_when_the_opening_is_refused(message: dict[str, Any], reason: str) -> None:
    async def scenario(head: Scene) -> None:
        worker = ScriptedWorker(head.channel)
        await worker.say(**message)
        assert (await worker.hear("close")).reason == worker_pb2.CloseReason.Value(f"CLOSE_REASON_{reason}")
        assert not (await head.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes
        worker.hang_up()

    play(scenario)


@pytest.mark.parametrize("kind", ["hello", "join"])
def test_stream_is_closed_when_a_worker_has_another_protocol_version(kind: str) -> None:
    async def scenario(head: Scene) -> None:
        worker = ScriptedWorker(head.channel)
        named = {"node_id": "n"} | ({"worker_id": "w"} if kind == "hello" else {})
        await worker.say(**{kind: {"version": "9.8.7", "protocol_version": 2, **named}})
        close = await worker.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_VERSION
        assert "version 9.8.7 and speaks protocol 2" in close.message
        assert f"version {__version__} and speaks protocol 1" in close.message
        worker.hang_up()

    play(scenario)


@pytest.mark.parametrize("is_welcome", [False, True])
def test_stream_is_closed_with_a_reason_when_a_message_cannot_be_decoded(
    is_welcome: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(head: Scene) -> None:
        call = head.channel.stream_stream("/lattice.v1.WorkerService/Connect")()
        if is_welcome:
            await call.write(worker_pb2.ConnectRequest(hello=head.hello()).SerializeToString())
            assert worker_pb2.ConnectResponse.FromString(await call.read()).HasField("welcome")
        await call.write(b"\xff")
        close = worker_pb2.ConnectResponse.FromString(await call.read()).close
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert "ConnectRequest" in close.message
        call.cancel()

    play(scenario)
    assert not caplog.records


NAN = float("nan")
GPUS = {"gpus": [{"index": 0}, {"index": 0}]}


@pytest.mark.parametrize(
    ("offer", "field"),
    [
        ({"node_id": "n" * 129}, "node_id"),
        ({"node_id": "a\nb"}, "node_id"),
        ({"node_id": "\x1b[2J"}, "node_id"),
        ({"node_id": "head"}, "node_id"),
        ({"node_id": "local"}, "node_id"),
        ({"capacity": {"cpu": NAN}}, "capacity.cpu"),
        ({"capacity": {"cpu": float("inf")}}, "capacity.cpu"),
        ({"capacity": {"cpu": -1}}, "capacity.cpu"),
        ({"capacity": {"memory_bytes": -1}}, "capacity.memory_bytes"),
        ({"capacity": {"slots": -1}}, "capacity.slots"),
        ({"capacity": {"async_slots": -1}}, "capacity.async_slots"),
        ({"capacity": GPUS}, "capacity.gpus[1].index"),
        ({"capacity": {"gpus": [{"index": -1}]}}, "capacity.gpus[0].index"),
        ({"capacity": {"gpus": [{"memory_bytes": -1}]}}, "capacity.gpus[0].memory_bytes"),
        ({"capacity": {"gpus": [{"model": "m" * 257}]}}, "capacity.gpus[0].model"),
        ({"capacity": {"gpus": [{"index": index} for index in range(1025)]}}, "capacity.gpus"),
        ({"capacity": {"cpu": 1e6}}, "capacity.cpu"),
        ({"capacity": {"memory_bytes": (1 << 60) + 1}}, "capacity.memory_bytes"),
        ({"capacity": {"slots": (1 << 23) + 1}}, "capacity.slots"),
        ({"labels": {str(number): "" for number in range(257)}}, "labels"),
        ({"labels": {"a": "v" * 257}}, "labels"),
        ({"labels": {"\x1b[2J": "v"}}, "labels"),
        ({"hostname": "h" * 257}, "hostname"),
        ({"node_ip": "\n"}, "node_ip"),
    ],
)
@pytest.mark.parametrize("kind", ["hello", "join"])
def test_offer_is_refused_by_its_field_when_it_is_malformed(kind: str, offer: dict[str, Any], field: str) -> None:
    async def scenario(head: Scene) -> None:
        worker = ScriptedWorker(head.channel)
        named = {"node_id": "n", "protocol_version": 1} | ({"worker_id": "w"} if kind == "hello" else {})
        await worker.say(**{kind: named | offer})
        close = await worker.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert close.message.startswith(f"{kind}.{field}: ")
        assert not (await head.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes
        worker.hang_up()

    play(scenario)


@pytest.mark.parametrize(
    ("claim", "field"),
    [
        ({"entrypoints": [f"e{number}" for number in range(10_001)]}, "entrypoints"),
        ({"entrypoints": ["e" * 257]}, "entrypoints[0]"),
        ({"stored_artifact_ids": ["", "a" * 257]}, "stored_artifact_ids[1]"),
        ({"reported_artifact_ids": ["a"] * 1_000_001}, "reported_artifact_ids"),
        ({"held_lease_ids": ["l" * 257]}, "held_lease_ids[0]"),
        ({"session_id": "s" * 257}, "session_id"),
        ({"runtime": {"language": "p" * 257}}, "runtime.language"),
        ({"worker_id": "a\nb"}, "worker_id"),
    ],
)
def test_offer_is_refused_by_its_field_when_it_exceeds_a_limit(claim: dict[str, Any], field: str) -> None:
    async def scenario(head: Scene) -> None:
        worker = ScriptedWorker(head.channel)
        await worker.say(hello={"node_id": "n", "protocol_version": 1, "worker_id": "w"} | claim)
        close = await worker.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert close.message.startswith(f"hello.{field}: ")
        worker.hang_up()

    play(scenario)


def test_stream_ends_when_a_heartbeat_exceeds_a_limit() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        await worker.say(heartbeat={"held_lease_ids": ["l" * 257]})
        close = await worker.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert close.message.startswith("heartbeat.held_lease_ids[0]: ")
        worker.hang_up()

    play(scenario)


def test_stream_is_closed_when_a_drain_deadline_is_negative() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        await worker.say(draining={"deadline": Duration(seconds=-1)})
        close = await worker.hear("close")
        assert (close.reason, close.message) == (
            worker_pb2.CLOSE_REASON_PROTOCOL_ERROR,
            "deadline: must not be negative",
        )
        worker.hang_up()

    play(scenario)


def test_drain_deadline_is_at_most_a_month() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        await head.run("a")
        await worker.hear("assignments")
        ages = Duration(seconds=2**63 - 1)
        await head.cluster.DrainNode(cluster_pb2.DrainNodeRequest(node_id="n", deadline=ages))
        assert (await worker.hear("drain")).deadline == Duration(seconds=30 * 24 * 3600)
        await worker.say(draining={"deadline": ages})
        assert (await worker.hear("drain")).deadline == Duration(seconds=30 * 24 * 3600)
        worker.hang_up()

    play(scenario)


def test_older_stream_is_closed_when_a_worker_connects_again() -> None:
    async def scenario(head: Scene) -> None:
        older, _ = await head.worker()
        run_id = await head.run("a")
        stale = (await older.hear("assignments")).assignments[0].lease_id
        await older.report(1, stale, started={})
        await head.until_event(run_id, "task_started")
        newer, _ = await head.worker()
        work = (await newer.hear("assignments")).assignments[0]
        assert work.attempts[0].number == 2
        await older.report(2, stale, succeeded=succeeded())
        await newer.report(1, work.lease_id, failed={"failure": {"kind": "FAILURE_KIND_USER_ERROR"}})
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_FAILED, "the older one's word does not count"
        older.hang_up()
        newer.hang_up()

    play(scenario)


def test_close_names_the_other_worker_when_it_takes_the_node() -> None:
    async def scenario(head: Scene) -> None:
        older, _ = await head.worker()
        newer, _ = await head.worker(worker_id="other", hostname="elsewhere")
        close = await older.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_SUPERSEDED
        assert close.message == "worker 'other' on host 'elsewhere' serves node 'n' now"
        older.hang_up()
        newer.hang_up()

    play(scenario)


def test_drained_worker_finishes_its_leases_and_is_closed() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a", "b")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        drained = await head.cluster.DrainNode(cluster_pb2.DrainNodeRequest(node_id="n"))
        assert drained.node.state == cluster_pb2.NODE_STATE_DRAINING
        await worker.report(1, lease_id, succeeded=succeeded())
        assert (await worker.hear("close")).reason == worker_pb2.CLOSE_REASON_DRAINED
        worker.hang_up()
        other, _ = await head.worker(worker_id="other", node_id="other")
        work = (await other.hear("assignments")).assignments[0]
        assert work.attempts[0].task_id == "b"
        await other.report(1, work.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        other.hang_up()

    play(scenario)


def test_worker_is_closed_when_it_drains_itself() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        await worker.say(draining={})
        assert (await worker.hear("close")).reason == worker_pb2.CLOSE_REASON_DRAINED
        worker.hang_up()

    play(scenario)


def test_streams_are_closed_when_the_server_stops() -> None:
    workers: list[ScriptedWorker] = []

    class Last(NoWorkers):
        async def stop(self) -> None:
            assert (await workers[0].hear("close")).reason == worker_pb2.CLOSE_REASON_SHUTDOWN
            workers[0].hang_up()

    async def scenario() -> None:
        doors = Last()
        async with asyncio.timeout(TIMEOUT_S), serving(doors) as app:
            # Open beyond the server's end: the worker still reads the last word.
            channel = grpc.aio.insecure_channel(app.address)
            worker, _ = await Scene(channel).worker()
            workers.append(worker)
        await channel.close()

    asyncio.run(scenario())
