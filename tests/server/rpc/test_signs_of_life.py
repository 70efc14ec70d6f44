"""Workers and machines that fall silent, forget, or say nonsense, as the head sees them."""

import asyncio

import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import cluster_pb2, run_pb2, worker_pb2

from tests.server.rpc.scripted_worker import Scene, ScriptedWorker, play, succeeded

TTL_S = 0.9


async def until_gone(head: Scene) -> None:
    """Wait until there is no node."""
    while (await head.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes:
        await asyncio.sleep(0.02)


def test_attempts_are_requeued_when_their_worker_falls_silent() -> None:
    async def scenario(head: Scene) -> None:
        silent, welcome = await head.worker()
        assert welcome.silence_limit.ToTimedelta().total_seconds() == pytest.approx(TTL_S * 2 / 3)
        run_id = await head.run("a")
        stale = (await silent.hear("assignments")).assignments[0].lease_id
        await silent.report(1, stale, started={})
        await until_gone(head)
        other, _ = await head.worker(worker_id="other", node_id="other")
        work = (await other.hear("assignments")).assignments[0]
        assert work.attempts[0].number == 2
        await other.report(1, work.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        other.hang_up()

    play(scenario, session_ttl_s=TTL_S)


def test_idle_worker_stays_when_it_sends_heartbeats() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        interval_s = welcome.heartbeat_interval.ToTimedelta().total_seconds()
        for _ in range(int(3 * TTL_S / interval_s)):
            await worker.say(heartbeat={})
            await asyncio.sleep(interval_s)
        await worker.hear("")
        (node,) = (await head.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes
        assert node.state == cluster_pb2.NODE_STATE_READY
        worker.hang_up()

    play(scenario, session_ttl_s=TTL_S)


def test_lost_leases_are_requeued_when_a_heartbeat_does_not_list_them() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        first = (await worker.hear("assignments")).assignments[0]
        assert first.sequence == 1
        await worker.say(heartbeat={"assignment_sequence": 0})
        await worker.say(heartbeat={"assignment_sequence": 1})
        again = (await worker.hear("assignments")).assignments[0]
        assert (again.sequence, again.attempts[0].task_id) == (2, "a")
        assert again.lease_id != first.lease_id
        await worker.say(heartbeat={"held_lease_ids": [again.lease_id, "unheard-of"], "assignment_sequence": 2})
        assert list((await worker.hear("stop_lease_ids")).stop_lease_ids) == ["unheard-of"]
        await worker.report(1, again.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        worker.hang_up()

    play(scenario)


def test_report_is_ignored_when_an_earlier_one_is_missing() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(2, lease_id, failed={"failure": {"message": "too early"}})
        await worker.report(1, lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        worker.hang_up()

    play(scenario)


def test_attempts_are_moved_when_a_drain_reaches_its_deadline() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(1, lease_id, started={})
        await head.until_event(run_id, "task_started")
        await head.cluster.DrainNode(cluster_pb2.DrainNodeRequest(node_id="n", deadline=Duration(nanos=1_000_000)))
        assert (await worker.hear("drain")).deadline.nanos == 1_000_000
        assert (await worker.hear("close")).reason == worker_pb2.CLOSE_REASON_DRAINED
        other, _ = await head.worker(worker_id="other", node_id="other")
        work = (await other.hear("assignments")).assignments[0]
        await other.report(1, work.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        other.hang_up()

    play(scenario)


def test_machine_serves_its_node_itself_when_there_is_no_ray() -> None:
    async def scenario(head: Scene) -> None:
        worker = ScriptedWorker(head.channel)
        await worker.say(join={"node_id": "m", "protocol_version": 1})
        joined = await worker.hear("joined")
        assert not joined.HasField("ray")
        worker.hang_up()
        nameless = ScriptedWorker(head.channel)
        await nameless.say(join={"protocol_version": 1})
        assert (await nameless.hear("close")).reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        nameless.hang_up()

    play(scenario)
