"""The stream that holds an open run, with a server whose every word a test chooses."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from lattice.v1 import errors_pb2, payload_pb2, run_pb2, workflow_pb2

from lattice_client import AbortedError, errors
from lattice_client.runs import open_stream
from lattice_client.runs.open_stream import Hold

Response = workflow_pb2.OpenRunResponse


class Talk:
    """One stream: what was said on it, and what is answered; an exception is raised."""

    def __init__(self, answers: list[Any]) -> None:
        self.said: list[workflow_pb2.OpenRunRequest] = []
        self.answers = deque([Response(accepted={"run": {"run_id": "r"}}), *answers])
        self.is_over = False

    def send(self, message: workflow_pb2.OpenRunRequest) -> None:
        """Note a message as it is now."""
        self.said.append(workflow_pb2.OpenRunRequest.FromString(message.SerializeToString()))

    async def read(self) -> Any:
        """Return the next answer."""
        found = self.answers.popleft()
        if isinstance(found, Exception):
            raise found
        return found

    def abandon(self) -> None:
        """Note the end."""
        self.is_over = True


class Rpc:
    """A channel whose streams are these, one after the other."""

    def __init__(self, *streams: list[Any]) -> None:
        self.talks = [Talk(answers) for answers in streams]
        self._next = iter(self.talks)
        self.target = "server"
        self.workflows = type("Workflows", (), {"OpenRun": None})

    def converse(self, method: Any) -> Talk:
        """Return the next stream."""
        return next(self._next)

    def now(self) -> float:
        """Return a time that stands still."""
        return 0.0

    async def sleep(self, seconds: float) -> None:
        """Wait for nothing."""


def broken() -> errors.RequestError:
    error = errors.UnavailableError("the stream broke")
    error.code = grpc.StatusCode.UNAVAILABLE
    return error


def hold(rpc: Any) -> Hold:
    return Hold(rpc, workflow_pb2.OpenRunOpening(run={"run_id": "r"}), 30.0)


def play(rpc: Rpc, *moves: Callable[[Hold], Any] | int) -> Hold:
    """Open a run, and make so many steps or do something, in order."""
    found = hold(rpc)

    async def run() -> None:
        await found.open()
        for move in moves:
            if callable(move):
                move(found)
            else:
                for _ in range(move):
                    await found.step()

    asyncio.run(run())
    return found


def succeeded(number: int, text: str = "1") -> Response:
    outputs = {"out": payload_pb2.Payload(json=text)}
    event = run_pb2.RunEvent(sequence=number, task_succeeded={"task_id": f"t{number}", "outputs": outputs})
    return Response(events=[event], sequence=number)


def question(name: str) -> Response:
    return Response(questions=[workflow_pb2.Question(question_id=name, name="q")])


def answer(name: str) -> Callable[[Hold], None]:
    return lambda found: found.answer(workflow_pb2.QuestionAnswer(question_id=name))


def test_a_stream_that_is_opened_again_goes_on_after_the_last_event_seen() -> None:
    rpc = Rpc([succeeded(3), Response(sequence=8), broken()], [])
    found = play(rpc, 4)
    first, second = (talk.said[0].opening for talk in rpc.talks)
    assert (first.run.run_id, first.after_sequence) == ("r", 0)
    assert (second.WhichOneof("start"), second.run_id, second.after_sequence) == ("run_id", "r", 8)
    assert rpc.talks[0].is_over
    ended = found.end_of("t3")
    assert ended is not None
    assert (ended.state, ended.outputs["out"].json) == (run_pb2.TASK_STATE_SUCCEEDED, "1")


def test_an_addition_without_a_result_and_the_closing_are_said_again() -> None:
    added = workflow_pb2.AdditionResult(request_id="a", added={"revision": 2})
    rpc = Rpc([Response(additions=[added]), broken()], [])
    requests = [workflow_pb2.AddTasksRequest(request_id=name) for name in "ab"]
    found = play(rpc, *[lambda found, r=request: found.add(r) for request in requests], Hold.close, 3)  # type: ignore[misc]
    assert found.results.keys() == {"a"}
    again = rpc.talks[1].said[1:]
    assert [[addition.request_id for addition in message.additions] for message in again] == [["b"], []]
    assert again[1].close


def test_an_answer_that_may_be_lost_is_sent_again_when_it_is_asked_for_again() -> None:
    first = [question("a"), question("b"), question("c"), Response(received_answers=1), broken()]
    rpc = Rpc(first, [question("b"), question("c"), Response(received_answers=1), question("a")])
    asked: list[str] = []
    found = hold(rpc)
    found.on_question = lambda message: asked.append(message.question_id)

    async def run() -> None:
        await found.open()
        for _ in range(3):
            await found.step()
        assert [found.answer(workflow_pb2.QuestionAnswer(question_id=name)) for name in "aab"] == [True, False, True]
        for _ in range(7):
            await found.step()

    asyncio.run(run())
    # The third was not answered yet: it is asked once. The first one had arrived.
    assert asked == ["a", "b", "c", "a"]
    said = [answer.question_id for message in rpc.talks[1].said for answer in message.answers]
    assert said == ["b"]


def test_only_the_newest_ends_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_stream, "KEPT_BYTES", 1000)
    rpc = Rpc([succeeded(number, f'"{"x" * 300}"') for number in range(1, 6)])
    found = play(rpc, 5)
    assert all(found.has_ended(f"t{number}") for number in range(1, 6))
    assert [found.end_of(f"t{number}") is None for number in range(1, 6)] == [True, True, False, False, False]


def test_a_run_that_is_taken_over_raises() -> None:
    refusal = errors_pb2.Refusal(
        code=grpc.StatusCode.ABORTED.value[0], reason=errors_pb2.ERROR_REASON_RUN_TAKEN_OVER, message="m"
    )
    with pytest.raises(AbortedError) as caught:
        play(Rpc([Response(stopped=refusal)]), 1)
    assert (caught.value.reason, caught.value.code) == ("RUN_TAKEN_OVER", grpc.StatusCode.ABORTED)
