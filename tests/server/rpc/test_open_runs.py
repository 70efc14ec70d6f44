"""Runs that a stream holds open: they grow, wait, ask, are closed or left."""

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import cluster_pb2, errors_pb2, results_pb2, run_pb2, workflow_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, fresh, function, graph, json_payload, output, refused, run, task

TIMEOUT_S = 60.0
GRACE_S = 0.3
FINISH = workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT


class Stream:
    """A stream that holds a run, as a caller in any language has it."""

    def __init__(self, caller: Caller, run_id: str = "", after: int = 0, **more: Any) -> None:
        start: dict[str, Any] = {"run_id": run_id} if run_id else {"run": workflow_pb2.RunWorkflowRequest(**more)}
        self._requests: queue.SimpleQueue[workflow_pb2.OpenRunRequest | None] = queue.SimpleQueue()
        self.say(opening=workflow_pb2.OpenRunOpening(after_sequence=after, **start))
        self.call = caller.workflows.OpenRun(iter(self._requests.get, None), timeout=TIMEOUT_S)
        self.heard: list[workflow_pb2.OpenRunResponse] = []
        self.accepted = next(self.call).accepted
        self.run_id = self.accepted.run.run_id

    def say(self, **fields: Any) -> None:
        """Send one message."""
        self._requests.put(workflow_pb2.OpenRunRequest(**fields))

    def add(self, *tasks: Any, **more: Any) -> None:
        """Add tasks."""
        functions = {name: function(name) for name in ("work", "fail", "wait")}
        self.say(additions=[workflow_pb2.AddTasksRequest(tasks=tasks, functions=functions, **more)])

    def hang_up(self) -> None:
        """End this side of the stream."""
        self._requests.put(None)

    def until(self, field: str) -> Any:
        """Read until a message has a field; return that."""
        while True:
            response = next(self.call)
            self.heard.append(response)
            if any(descriptor.name == field for descriptor, _ in response.ListFields()):
                return getattr(response, field)

    def ends(self) -> list[tuple[str, str]]:
        """Return the kinds and the tasks of all events that were heard."""
        events = [event for response in self.heard for event in response.events]
        assert [event.sequence for event in events] == sorted({event.sequence for event in events})
        kinds = [event.WhichOneof("event") or "" for event in events]
        return [(kind, getattr(event, kind).task_id) for kind, event in zip(kinds, events, strict=True)]


@pytest.fixture(scope="module")
def left() -> Iterator[Caller]:
    """A server without workers that cancels open runs soon."""
    with serving_aside(NoWorkers(), open_run_grace_s=GRACE_S) as address, calling(address) as caller:
        yield caller


def result(caller: Caller, run_id: str) -> run_pb2.Run:
    request = results_pb2.GetResultRequest(run_id=run_id, wait=Duration(seconds=60))
    return caller.results.GetResult(request).run


def described(caller: Caller, run_id: str) -> run_pb2.Run:
    return caller.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id)).run


def test_an_open_run_starts_empty_grows_and_ends_when_it_is_closed(busy: Caller) -> None:
    stream = Stream(busy)
    assert stream.accepted.created
    assert stream.accepted.run.open
    stream.add(task("a"), request_id="first")
    (added,) = stream.until("additions")
    assert (added.request_id, added.added.revision) == ("first", 2)
    (event,) = stream.until("events")
    assert event.task_succeeded.outputs["out"].json == "0"
    stream.add(task("b", inputs={"x": output("a")}), task("c", ["b"]))
    while ("task_succeeded", "c") not in stream.ends():
        stream.until("events")
    listed = busy.workflows.ListRuns(workflow_pb2.ListRunsRequest(page_size=1)).runs[0]
    assert (listed.run_id, listed.open, listed.state) == (stream.run_id, True, run_pb2.RUN_STATE_RUNNING)
    stream.say(close=True)
    ended = stream.until("ended")
    assert (ended.state, ended.open) == (run_pb2.RUN_STATE_SUCCEEDED, False)
    assert stream.ends() == [("task_succeeded", name) for name in "abc"]
    stream.hang_up()
    assert next(stream.call, None) is None


def test_open_run_starts_with_the_graph_of_its_opening(busy: Caller) -> None:
    stream = Stream(busy, workflow=graph(task("a")), labels={"k": "v"}, priority=3)
    assert (stream.accepted.run.labels, stream.accepted.run.priority) == ({"k": "v"}, 3)
    stream.until("events")
    stream.say(close=True)
    assert stream.until("ended").task_counts.succeeded == 1


def test_stream_stays_open_when_an_addition_is_refused(idle: Caller) -> None:
    stream = Stream(idle)
    stream.add(task("a", ["nobody"]))
    stream.add()
    stream.add(task("b"), run_id="another")
    stream.add(task("b"))
    results = []
    while len(results) < 4:
        results += stream.until("additions")
    reasons = [errors_pb2.ErrorReason.Name(found.refused.reason) for found in results[:3]]
    assert reasons == ["ERROR_REASON_INVALID_WORKFLOW", "ERROR_REASON_INVALID_FIELD", "ERROR_REASON_INVALID_FIELD"]
    assert [found.refused.code for found in results[:3]] == [grpc.StatusCode.INVALID_ARGUMENT.value[0]] * 3
    assert "nobody" in results[0].refused.message
    assert dict(results[2].refused.violations).keys() == {"run_id"}
    assert results[3].added.revision == 2


def test_addition_is_made_once_when_it_is_repeated(idle: Caller) -> None:
    stream = Stream(idle)
    request_id = fresh("request")
    for _ in range(2):
        stream.add(task("a"), request_id=request_id)
        (found,) = stream.until("additions")
        assert (found.request_id, found.added.revision) == (request_id, 2)
    assert described(idle, stream.run_id).task_counts.total == 1


def test_open_run_ends_when_a_task_fails_and_the_policy_is_fail_fast(busy: Caller) -> None:
    fast = Stream(busy)
    fast.add(task("a", function="fail"), task("b", function="wait"))
    assert fast.until("ended").state == run_pb2.RUN_STATE_FAILED
    assert ("task_failed", "a") in fast.ends()
    fast.hang_up()
    stream = Stream(busy, workflow=workflow_pb2.WorkflowSpec(failure_policy=FINISH))
    stream.add(task("a", function="fail"), task("b", ["a"]))
    while len(stream.ends()) < 2:
        stream.until("events")
    assert stream.ends() == [("task_failed", "a"), ("task_skipped", "b")]
    stream.add(task("c"))
    stream.say(close=True)
    assert stream.until("ended").state == run_pb2.RUN_STATE_FAILED
    assert stream.ends()[-1] == ("task_succeeded", "c")


def test_an_open_run_is_cancelled_when_its_stream_breaks_and_none_comes(left: Caller) -> None:
    info = left.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    assert info.limits.open_run_grace.ToTimedelta().total_seconds() == GRACE_S
    assert "open-run" in info.features
    stream = Stream(left)
    stream.add(task("a"))
    stream.until("additions")
    stream.call.cancel()
    found = result(left, stream.run_id)
    assert (found.state, found.failure.kind) == (run_pb2.RUN_STATE_CANCELLED, errors_pb2.FAILURE_KIND_CANCELLED)
    assert "did not come back within 0.3 s" in found.failure.message


def test_caller_gets_the_end_when_it_ends_its_side_without_close(left: Caller) -> None:
    stream = Stream(left)
    stream.hang_up()
    assert stream.until("ended").state == run_pb2.RUN_STATE_CANCELLED
    assert next(stream.call, None) is None


def test_a_run_that_was_closed_goes_on_when_its_stream_breaks(left: Caller) -> None:
    stream = Stream(left)
    stream.add(task("a"))
    stream.say(close=True)
    stream.until("additions")
    while described(left, stream.run_id).open:
        pass
    stream.call.cancel()
    other = Stream(left)
    other.call.cancel()
    assert result(left, other.run_id).state == run_pb2.RUN_STATE_CANCELLED
    assert described(left, stream.run_id).state == run_pb2.RUN_STATE_RUNNING


def test_newest_stream_gets_every_event_when_it_takes_a_run_over(busy: Caller) -> None:
    first = Stream(busy)
    first.add(task("a"))
    first.until("events")
    seen = first.heard[-1].sequence
    second = Stream(busy, first.run_id, seen)
    assert not second.accepted.created
    stopped = first.until("stopped")
    assert (stopped.reason, stopped.code) == (errors_pb2.ERROR_REASON_RUN_TAKEN_OVER, grpc.StatusCode.ABORTED.value[0])
    second.add(task("b", ["a"]))
    second.until("events")
    third = Stream(busy, first.run_id)
    third.until("events")
    third.say(close=True)
    third.until("ended")
    assert second.ends() == [("task_succeeded", "b")]
    assert third.ends() == [("task_succeeded", "a"), ("task_succeeded", "b")]
    # One that comes after the end is told the same.
    fourth = Stream(busy, first.run_id, seen)
    assert fourth.until("ended").state == run_pb2.RUN_STATE_SUCCEEDED
    assert fourth.ends() == [("task_succeeded", "b")]


def test_run_is_taken_over_when_its_opening_is_repeated(idle: Caller) -> None:
    run_id = fresh()
    first = Stream(idle, run_id=None, **{"labels": {"a": "b"}})  # type: ignore[arg-type]  # the server names it
    assert first.accepted.created
    named = workflow_pb2.RunWorkflowRequest(run_id=run_id)
    opening = workflow_pb2.OpenRunRequest(opening=workflow_pb2.OpenRunOpening(run=named))
    created = [next(idle.workflows.OpenRun(iter([opening]), timeout=TIMEOUT_S)).accepted.created for _ in range(2)]
    assert created == [True, False]
    with refused(grpc.StatusCode.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        run(idle, run_id=run_id)


@pytest.mark.parametrize(
    ("opening", "code", "reason"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"opening": {}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"opening": {"run": {}, "after_sequence": -1}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"opening": {"run": {}, "after_sequence": 9}}, grpc.StatusCode.OUT_OF_RANGE, "CURSOR_AHEAD"),
        ({"opening": {"run": {"timeout": {"seconds": -1}}}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"opening": {"run_id": "nobody"}}, grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),
    ],
)
def test_a_wrong_opening_is_refused(idle: Caller, opening: Any, code: grpc.StatusCode, reason: str) -> None:
    with refused(code, reason):
        next(idle.workflows.OpenRun(iter([workflow_pb2.OpenRunRequest(**opening)]), timeout=TIMEOUT_S))


def test_takeover_is_refused_when_the_run_is_not_open(idle: Caller) -> None:
    run_id = run(idle).run.run_id
    opening = workflow_pb2.OpenRunOpening(run_id=run_id)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "RUN_NOT_OPEN"):
        next(idle.workflows.OpenRun(iter([workflow_pb2.OpenRunRequest(opening=opening)]), timeout=TIMEOUT_S))


def test_answer_is_refused_in_the_stream_when_its_question_is_unknown(idle: Caller) -> None:
    stream = Stream(idle)
    answer = workflow_pb2.QuestionAnswer(question_id="nobody/1", payload=json_payload("1"))
    stream.say(answers=[answer, workflow_pb2.QuestionAnswer(question_id="empty/1")])
    assert list(stream.until("refused_question_ids")) == ["nobody/1", "empty/1"]
    assert stream.heard[-1].received_answers == 2


def test_tasks_are_added_when_another_caller_opened_the_run(idle: Caller) -> None:
    stream = Stream(idle)
    functions = {"work": function("work")}
    request = workflow_pb2.AddTasksRequest(run_id=stream.run_id, tasks=[task("a")], functions=functions)
    assert idle.workflows.AddTasks(request).revision == 2
    assert result_is_running(idle, stream.run_id)


def result_is_running(caller: Caller, run_id: str) -> bool:
    return described(caller, run_id).state == run_pb2.RUN_STATE_RUNNING
