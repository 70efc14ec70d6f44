"""Calls that wait for the end of a run or a task."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import results_pb2, run_pb2, task_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, fresh, function, run, task

PING_S = 0.2
SILENCE_S = 6  # A caller pings a few times before the server has had enough.


def test_a_run_that_goes_on_is_answered_when_the_wait_is_over(idle: Caller) -> None:
    run_id = run(idle).run.run_id
    request = results_pb2.GetResultRequest(run_id=run_id, wait=Duration(nanos=1_000_000))
    assert idle.results.GetResult(request).run.state == run_pb2.RUN_STATE_RUNNING


def test_run_is_the_same_when_only_the_wait_differs(idle: Caller) -> None:
    run_id = fresh()
    for number in range(3):
        wait = Duration(nanos=number)
        request = task_pb2.RunTaskRequest(run_id=run_id, task=task(function=""), function=function(), wait=wait)
        assert idle.tasks.RunTask(request).created == (number == 0)


def test_connection_with_too_many_pings_is_closed() -> None:
    options = [("grpc.keepalive_time_ms", int(PING_S * 1000)), ("grpc.http2.max_pings_without_data", 0)]
    with (
        serving_aside(NoWorkers(), min_ping_interval_s=100 * PING_S) as address,
        grpc.insecure_channel(address, options=options) as channel,
    ):
        caller = Caller(channel)
        request = results_pb2.GetResultRequest(run_id=run(caller).run.run_id, wait=Duration(seconds=30))
        with pytest.raises(grpc.RpcError, match=r"too_many_pings|Too many pings") as caught:
            caller.results.GetResult(request)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_call_stays_open_when_it_is_silent() -> None:
    """Pings keep it alive; a server that takes them for an attack ends the connection."""
    options = [("grpc.keepalive_time_ms", int(PING_S * 1000)), ("grpc.http2.max_pings_without_data", 0)]
    with (
        serving_aside(NoWorkers(), min_ping_interval_s=PING_S / 4) as address,
        grpc.insecure_channel(address, options=options) as channel,
    ):
        caller = Caller(channel)
        request = results_pb2.GetResultRequest(run_id=run(caller).run.run_id, wait=Duration(seconds=SILENCE_S))
        assert caller.results.GetResult(request).run.state == run_pb2.RUN_STATE_RUNNING
