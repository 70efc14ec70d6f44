"""Calls that wait: for the end of what they started, and in silence."""

import grpc
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import run_pb2, task_pb2, workflow_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, fresh, function, graph, task

PING_S = 0.2
SILENCE_S = 6  # A caller pings a few times before the server has had enough.


def test_a_run_is_started_and_waited_for_in_one_call(busy: Caller) -> None:
    request = workflow_pb2.RunWorkflowRequest(run_id=fresh(), workflow=graph(task()), wait=Duration(seconds=60))
    response = busy.workflows.RunWorkflow(request)
    assert (response.run.state, response.created) == (run_pb2.RUN_STATE_SUCCEEDED, True)
    assert [found.task_id for found in response.final_tasks] == ["t"]


def test_a_run_that_goes_on_is_answered_when_the_wait_is_over(idle: Caller) -> None:
    request = workflow_pb2.RunWorkflowRequest(workflow=graph(task()), wait=Duration(nanos=1_000_000))
    response = idle.workflows.RunWorkflow(request)
    assert response.run.state == run_pb2.RUN_STATE_RUNNING
    assert not response.final_tasks


def test_how_long_a_caller_waits_makes_it_no_other_run(idle: Caller) -> None:
    run_id, other = fresh(), fresh()
    for number in range(3):
        wait = Duration(nanos=number)
        run = idle.workflows.RunWorkflow(
            workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=graph(task()), wait=wait)
        )
        single = idle.tasks.RunTask(
            task_pb2.RunTaskRequest(run_id=other, task=task(function=""), function=function(), wait=wait)
        )
        assert run.created == single.created == (number == 0)


def test_a_silent_call_may_be_as_long_as_it_likes() -> None:
    """Pings keep it alive; a server that takes them for an attack ends the connection."""
    options = [("grpc.keepalive_time_ms", int(PING_S * 1000)), ("grpc.http2.max_pings_without_data", 0)]
    with (
        serving_aside(NoWorkers(), min_ping_interval_s=PING_S / 4) as address,
        grpc.insecure_channel(address, options=options) as channel,
    ):
        request = workflow_pb2.RunWorkflowRequest(workflow=graph(task()), wait=Duration(seconds=SILENCE_S))
        assert Caller(channel).workflows.RunWorkflow(request).run.state == run_pb2.RUN_STATE_RUNNING
