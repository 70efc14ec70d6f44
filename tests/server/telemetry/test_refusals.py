"""Refusals are counted by their reasons, whether they end a call or are messages of a stream."""

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from lattice.v1 import cluster_pb2, errors_pb2, worker_pb2, workflow_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc import test_executions, test_open_runs
from tests.server.rpc.callers import Caller, calling, graph, refused, task
from tests.server.telemetry.workload import labelled, samples_of

TIMEOUT_S = 60.0


@pytest.fixture
def counting() -> Iterator[Caller]:
    """A server that counts, without workers."""
    with serving_aside(NoWorkers(), metrics="prometheus") as address, calling(address) as caller:
        yield caller


def counted(caller: Caller) -> dict[str, float]:
    """Return how many errors the server has counted, by reason."""
    info = caller.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    with urlopen(info.metrics_url, timeout=TIMEOUT_S) as response:
        samples = samples_of(response.read().decode())
    return {reason: number for (reason,), number in labelled(samples, "lattice_server_errors_total").items()}


def test_refusals_of_runs_are_counted_alike_by_a_call_and_over_a_stream(counting: Caller) -> None:
    stream = test_executions.Stream(counting)
    missing = workflow_pb2.RunWorkflowRequest(workflow_id="nothing")
    for number in range(2):
        stream.say(number, run=missing)
        stream.say(number, task={})
        stream.hear("refused", "refused")
    assert counted(counting) == {"WORKFLOW_NOT_FOUND": 2, "INVALID_FIELD": 2}
    with refused(grpc.StatusCode.NOT_FOUND, "WORKFLOW_NOT_FOUND"):
        counting.workflows.RunWorkflow(missing)
    assert counted(counting) == {"WORKFLOW_NOT_FOUND": 3, "INVALID_FIELD": 2}


def test_bug_at_the_start_of_a_run_over_a_stream_is_counted(counting: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lattice_server.rpc.run_starter.check_id", broken)
    stream = test_executions.Stream(counting)
    stream.run(1)
    stream.hear("refused")
    assert counted(counting) == {"INTERNAL": 1}


def test_refusals_within_an_open_run_are_counted(counting: Caller) -> None:
    stream = test_open_runs.Stream(counting, run_id="", workflow=graph(task("t")))
    stream.add(task("t"))
    (answer,) = stream.until("additions")
    assert answer.refused.reason == errors_pb2.ERROR_REASON_INVALID_WORKFLOW
    assert counted(counting) == {"INVALID_WORKFLOW": 1}
    later = test_open_runs.Stream(counting, run_id=stream.run_id)
    assert stream.until("stopped").reason == errors_pb2.ERROR_REASON_RUN_TAKEN_OVER
    assert counted(counting) == {"INVALID_WORKFLOW": 1, "RUN_TAKEN_OVER": 1}
    later.hang_up()


def test_refused_stream_of_a_worker_is_counted(counting: Caller) -> None:
    for first, reason in (
        ({}, worker_pb2.CLOSE_REASON_PROTOCOL_ERROR),
        ({"join": {"node_id": "n", "protocol_version": 99}}, worker_pb2.CLOSE_REASON_VERSION),
    ):
        call = counting.workers.Connect(iter([worker_pb2.ConnectRequest(**first)]), timeout=TIMEOUT_S)
        assert next(call).close.reason == reason
        with contextlib.suppress(StopIteration):
            next(call)
    assert counted(counting) == {"PROTOCOL_ERROR": 1, "VERSION": 1}


def test_worker_and_caller_without_a_token_are_counted_alike() -> None:
    with (
        serving_aside(NoWorkers(), metrics="prometheus", token="a-token-of-callers-1234567890") as address,
        calling(address) as stranger,
    ):
        with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
            stranger.workflows.ListRuns(workflow_pb2.ListRunsRequest())
        call = stranger.workers.Connect(iter([worker_pb2.ConnectRequest()]), timeout=TIMEOUT_S)
        assert next(call).close.reason == worker_pb2.CLOSE_REASON_UNAUTHENTICATED
        call.cancel()
        named = (("authorization", "Bearer a-token-of-callers-1234567890"),)
        info = stranger.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest(), metadata=named)
        with urlopen(info.metrics_url, timeout=TIMEOUT_S) as response:
            samples = samples_of(response.read().decode())
    assert labelled(samples, "lattice_server_errors_total") == {("UNAUTHENTICATED",): 2}
