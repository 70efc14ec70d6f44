"""Limits of one connection: streams, headers, time without a call."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import cluster_pb2, cluster_pb2_grpc, results_pb2, workflow_pb2

from lattice_server.rpc import server
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, run

STREAMS = 8
HELD_S = 60


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with small limits."""
    monkeypatch.setattr(server, "MAX_STREAMS", STREAMS)
    monkeypatch.setattr(server, "IDLE_MS", 500)
    with serving_aside(NoWorkers()) as address:
        yield address


def info(caller: Caller, **more: object) -> cluster_pb2.GetServerInfoResponse:
    found: cluster_pb2.GetServerInfoResponse = caller.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest(), **more)
    return found


def test_calls_wait_when_the_connection_has_its_most_streams(narrow: str) -> None:
    with calling(narrow) as caller:
        run_id = run(caller).run.run_id
        request = results_pb2.GetResultRequest(run_id=run_id, wait=Duration(seconds=HELD_S))
        waits = [caller.results.GetResult.future(request) for _ in range(STREAMS - 1)]
        caller.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id), timeout=HELD_S)
        assert all(wait.result(HELD_S).run.run_id == run_id for wait in waits)


def test_connection_is_served_when_another_has_its_most_streams(narrow: str) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(narrow, options=own) as channel, grpc.insecure_channel(narrow, options=own) as other:
        caller = Caller(channel)
        run_id = run(caller).run.run_id
        request = results_pb2.GetResultRequest(run_id=run_id, wait=Duration(seconds=HELD_S))
        waits = [caller.results.GetResult.future(request) for _ in range(2 * STREAMS)]
        with pytest.raises(grpc.RpcError) as caught:
            info(caller, timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "it waits for a stream"
        assert info(Caller(other), timeout=HELD_S).version
        Caller(other).workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id), timeout=HELD_S)
        # A stream that begins while another is still being closed may be refused, which callers take for a reason to
        # call again.
        ends = [wait.exception(HELD_S) for wait in waits]
        assert {end.code() for end in ends if isinstance(end, grpc.RpcError)} <= {grpc.StatusCode.UNAVAILABLE}
        assert ends.count(None) >= STREAMS
        assert info(caller, timeout=HELD_S, wait_for_ready=True).version


def test_call_is_refused_when_its_headers_are_too_long(idle: Caller) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        info(idle, metadata=(("authorization", "Bearer " + "x" * server.MAX_METADATA_BYTES),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert info(idle).version


def test_connection_is_closed_when_it_has_no_calls(narrow: str) -> None:
    # The asyncio channel: the thread by which the other one watches its state fails when the channel is closed.
    async def watch() -> None:
        async with grpc.aio.insecure_channel(narrow, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
            assert (await cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())).version
            async with asyncio.timeout(HELD_S):
                while (state := channel.get_state()) is not grpc.ChannelConnectivity.IDLE:
                    await channel.wait_for_state_change(state)
            assert (await cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())).version

    asyncio.run(watch())


def test_connection_stays_open_when_it_has_a_call(narrow: str) -> None:
    with grpc.insecure_channel(narrow, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        caller = Caller(channel)
        run_id = run(caller).run.run_id
        request = results_pb2.GetResultRequest(run_id=run_id, wait=Duration(seconds=2))
        assert caller.results.GetResult(request).run.run_id == run_id
