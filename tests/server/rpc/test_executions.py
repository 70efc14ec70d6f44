"""Runs that are started over one stream: each is answered by its number, and the stream outlives refusals."""

import asyncio
import contextlib
import queue
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from lattice.v1 import errors_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_server.rpc import executions
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, fresh, function, graph, refused, task

TIMEOUT_S = 60.0
SUCCEEDED = run_pb2.RUN_STATE_SUCCEEDED
Response = workflow_pb2.ExecuteWorkflowsResponse


class Stream:
    """A stream of runs, as a caller in any language has it."""

    def __init__(self, caller: Caller) -> None:
        self._requests: queue.SimpleQueue[workflow_pb2.ExecuteWorkflowsRequest | None] = queue.SimpleQueue()
        self.call = caller.workflows.ExecuteWorkflows(iter(self._requests.get, None), timeout=TIMEOUT_S)

    def say(self, number: int, **start: Any) -> None:
        """Send a request."""
        self._requests.put(workflow_pb2.ExecuteWorkflowsRequest(number=number, **start))

    def run(self, number: int, name: str = "work", run_id: str = "") -> None:
        """Start a run of one task."""
        spec = graph(task("t", function=name))
        self.say(number, run=workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=spec))

    def hang_up(self) -> None:
        """End this side of the stream."""
        self._requests.put(None)

    def hear(self, *kinds: str) -> list[Response]:
        """Read one response of each kind, in this order."""
        heard = [next(self.call) for _ in kinds]
        assert [response.WhichOneof("message") for response in heard] == list(kinds)
        return heard


def test_a_run_is_accepted_and_ends_on_the_stream(busy: Caller) -> None:
    stream, run_id = Stream(busy), fresh("r")
    for created in (True, False):
        stream.run(7, run_id=run_id)
        accepted, ended = stream.hear("accepted", "ended")
        assert (accepted.number, accepted.accepted.run_id, accepted.accepted.created) == (7, run_id, created)
        assert (ended.number, ended.ended.run.state) == (7, SUCCEEDED)
        assert ended.ended.final_tasks[0].outputs["out"].json == "0"


def test_runs_end_in_any_order(busy: Caller) -> None:
    stream, slow = Stream(busy), fresh("slow")
    stream.run(1, "wait", run_id=slow)
    stream.run(2)
    heard = stream.hear("accepted", "accepted", "ended")
    assert [response.number for response in heard] == [1, 2, 2]
    busy.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=slow))
    (ended,) = stream.hear("ended")
    assert (ended.number, ended.ended.run.state) == (1, run_pb2.RUN_STATE_CANCELLED)


def test_a_large_result_delays_no_other_answer(busy: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    is_slow, make = threading.Event(), executions.result_to_proto

    async def result_to_proto(entry: Any, slices: Any) -> Any:
        while len(entry.run.tasks) > 1 and is_slow.is_set():
            await asyncio.sleep(0.01)
        return await make(entry, slices)

    monkeypatch.setattr(executions, "LARGE_TASKS", 1)
    monkeypatch.setattr(executions, "result_to_proto", result_to_proto)
    is_slow.set()
    stream = Stream(busy)
    for number in (1, 2):
        spec = graph(task("a"), task("b"))
        stream.say(number, run=workflow_pb2.RunWorkflowRequest(workflow=spec))
        stream.hear("accepted")
    for number in (3, 4):
        stream.run(number)
        assert [found.number for found in stream.hear("accepted", "ended")] == [number, number]
    stream.hang_up()
    is_slow.clear()
    ended = stream.hear("ended", "ended")
    assert {found.number for found in ended} == {1, 2}
    assert [[one.task_id for one in found.ended.final_tasks] for found in ended] == [["a", "b"]] * 2
    assert next(stream.call, None) is None


def test_a_task_is_answered_once_when_it_has_ended(busy: Caller) -> None:
    stream = Stream(busy)
    wanted = task_pb2.RunTaskRequest(task=task("t"), function=function(), wait={"seconds": 60})
    stream.say(3, task=wanted)
    (answer,) = stream.hear("task")
    assert (answer.number, answer.task.run.state) == (3, SUCCEEDED)
    assert answer.task.task.outputs["out"].json == "0"


@pytest.mark.parametrize(
    ("start", "reason", "field"),
    [
        ({}, "INVALID_FIELD", "start"),
        ({"run": {}}, "INVALID_FIELD", "source"),
        ({"run": {"workflow": {}}}, "INVALID_WORKFLOW", ""),
        ({"run": {"workflow_id": "nothing"}}, "WORKFLOW_NOT_FOUND", ""),
        ({"task": {}}, "INVALID_FIELD", 'functions["function"]'),
    ],
)
def test_a_refusal_is_a_message_and_the_stream_goes_on(
    busy: Caller, start: dict[str, Any], reason: str, field: str
) -> None:
    stream = Stream(busy)
    stream.say(1, **start)
    (answer,) = stream.hear("refused")
    assert (answer.number, answer.refused.reason) == (1, errors_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}"))
    assert list(answer.refused.violations) == [field] * bool(field)
    stream.run(1)
    stream.hear("accepted", "ended")


def test_a_number_names_one_run_until_it_has_ended(idle: Caller) -> None:
    stream = Stream(idle)
    stream.run(1)
    stream.run(1)
    _, refusal = stream.hear("accepted", "refused")
    assert list(refusal.refused.violations) == ["number"]


def test_a_stream_waits_for_so_many_runs_and_no_more(idle: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executions, "MAX_OPEN", 2)
    stream, first = Stream(idle), fresh("r")
    stream.run(1, run_id=first)
    stream.run(2)
    stream.run(3)
    *_, refusal = stream.hear("accepted", "accepted", "refused")
    assert refusal.refused.reason == errors_pb2.ERROR_REASON_TOO_MANY_OPEN_RUNS
    idle.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=first))
    stream.hear("ended")
    stream.run(3)
    stream.hear("accepted")


def test_a_bug_at_the_start_of_a_run_is_an_internal_error(
    busy: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream(busy)
    stream.run(1)
    stream.hear("accepted", "ended")

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr("lattice_server.rpc.run_starter.check_id", broken)
        stream.run(2)
        (answer,) = stream.hear("refused")
    assert answer.refused.code == grpc.StatusCode.INTERNAL.value[0]
    assert answer.refused.metadata["error_id"] in str([vars(record) for record in caplog.records])
    stream.run(3)
    stream.hear("accepted", "ended")


def test_the_stream_ends_after_its_last_run_when_the_caller_says_no_more(busy: Caller) -> None:
    stream = Stream(busy)
    stream.run(1)
    stream.hang_up()
    assert [response.WhichOneof("message") for response in stream.call] == ["accepted", "ended"]


def test_runs_continue_when_the_stream_breaks(busy: Caller) -> None:
    stream, run_id = Stream(busy), fresh("r")
    stream.run(1, "wait", run_id=run_id)
    stream.hear("accepted")
    stream.call.cancel()
    assert busy.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id)).run.state == run_pb2.RUN_STATE_RUNNING
    busy.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id))


def test_a_message_that_cannot_be_read_ends_the_stream(busy: Caller) -> None:
    method = busy.channel.stream_stream("/lattice.v1.WorkflowService/ExecuteWorkflows")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        next(method(iter([b"\xff"]), timeout=TIMEOUT_S))


@pytest.mark.parametrize(("has_run", "grace_s"), [(False, TIMEOUT_S), (True, 1.0)])
def test_a_server_that_stops_ends_streams_that_wait_for_nothing_at_once(has_run: bool, grace_s: float) -> None:
    with contextlib.ExitStack() as serving:
        address = serving.enter_context(serving_aside(NoWorkers(), stop_grace_s=grace_s))
        with calling(address) as caller:
            stream = Stream(caller)
            if has_run:
                stream.run(1)
                stream.hear("accepted")
            else:
                stream.say(1)
                stream.hear("refused")
            begun = time.monotonic()
            serving.close()
            # A server waits for the calls that have not ended, to the end of its grace.
            assert (time.monotonic() - begun >= grace_s) is has_run


def test_a_result_that_was_read_from_the_stream_makes_room_for_others() -> None:
    with serving_aside(retained_runs=1) as address, calling(address) as caller:
        stream = Stream(caller)
        for number in range(3):
            stream.run(number, run_id=f"r{number}")
            stream.hear("accepted", "ended")
        stream.hang_up()
        assert list(stream.call) == []
        listed = caller.workflows.ListRuns(workflow_pb2.ListRunsRequest()).runs
        assert [shown.run_id for shown in listed] == ["r2"]


def test_a_run_that_is_only_in_the_journal_is_found_by_the_stream(tmp_path: Path) -> None:
    settings = {"journal": str(tmp_path), "stop_grace_s": 0.1}
    for created in (True, False):
        with serving_aside(NoWorkers(), **settings) as address, calling(address) as caller:
            stream = Stream(caller)
            stream.run(1, run_id="r")
            (accepted,) = stream.hear("accepted")
            assert accepted.accepted.created is created
            caller.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id="r"))
            (ended,) = stream.hear("ended")
            assert ended.ended.run.state == run_pb2.RUN_STATE_CANCELLED
