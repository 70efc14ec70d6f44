"""The stream of an open run, over a channel whose messages a test chooses."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from lattice.v1 import errors_pb2, payload_pb2, run_pb2, workflow_pb2

from lattice_client import AbortedError, errors
from lattice_client.runs import task_ends
from lattice_client.runs.open_run_stream import OpenRunStream

Response = workflow_pb2.OpenRunResponse


class FakeStream:
    """One stream: the sent messages, and the answers to return; an answer that is an exception is raised."""

    def __init__(self, answers: list[Any]) -> None:
        self.sent: list[workflow_pb2.OpenRunRequest] = []
        self.answers = deque([Response(accepted={"run": {"run_id": "r"}}), *answers])
        self.is_over = False

    def send(self, message: workflow_pb2.OpenRunRequest) -> None:
        """Record a copy of a message."""
        self.sent.append(workflow_pb2.OpenRunRequest.FromString(message.SerializeToString()))

    async def read(self) -> Any:
        """Return the next answer."""
        found = self.answers.popleft()
        if isinstance(found, Exception):
            raise found
        return found

    def abandon(self) -> None:
        """Record the end."""
        self.is_over = True


class Rpc:
    """A channel that opens these streams, one after the other."""

    def __init__(self, *streams: list[Any]) -> None:
        self.streams = [FakeStream(answers) for answers in streams]
        self._next = iter(self.streams)
        self.target = "server"
        self.workflows = type("Workflows", (), {"OpenRun": None})

    def open_bidi(self, method: Any) -> FakeStream:
        """Return the next stream."""
        return next(self._next)

    def now(self) -> float:
        """Return a constant time."""
        return 0.0

    async def sleep(self, seconds: float) -> None:
        """Do not wait."""


def broken() -> errors.RequestError:
    error = errors.UnavailableError("the stream broke")
    error.code = grpc.StatusCode.UNAVAILABLE
    return error


def stream_of(rpc: Any) -> OpenRunStream:
    return OpenRunStream(rpc, workflow_pb2.OpenRunOpening(run={"run_id": "r"}), 30.0)


def play(rpc: Rpc, *moves: Callable[[OpenRunStream], Any] | int) -> OpenRunStream:
    """Open a run; then, for each move, make that many steps or call it."""
    found = stream_of(rpc)

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


def answer(name: str) -> Callable[[OpenRunStream], None]:
    return lambda found: found.answer(workflow_pb2.QuestionAnswer(question_id=name))


def test_stream_resumes_after_the_last_event_when_it_broke() -> None:
    rpc = Rpc([succeeded(3), Response(sequence=8), broken()], [])
    found = play(rpc, 4)
    first, second = (stream.sent[0].opening for stream in rpc.streams)
    assert (first.run.run_id, first.after_sequence) == ("r", 0)
    assert (second.WhichOneof("start"), second.run_id, second.after_sequence) == ("run_id", "r", 8)
    assert rpc.streams[0].is_over
    ended = found.task_ends.find("r", "t3")
    assert ended is not None
    assert (ended.state, ended.outputs["out"].json) == (run_pb2.TASK_STATE_SUCCEEDED, "1")


def test_stream_repeats_additions_without_a_result_and_the_close_when_it_broke() -> None:
    added = workflow_pb2.AdditionResult(request_id="a", added={"revision": 2})
    rpc = Rpc([Response(additions=[added]), broken()], [])
    requests = [workflow_pb2.AddTasksRequest(request_id=name) for name in "ab"]
    found = play(rpc, *[lambda found, r=request: found.add(r) for request in requests], OpenRunStream.close, 3)  # type: ignore[misc]
    assert found.results.keys() == {"a"}
    again = rpc.streams[1].sent[1:]
    assert [[addition.request_id for addition in message.additions] for message in again] == [["b"], []]
    assert again[1].close


def test_stream_sends_a_lost_answer_again_when_its_question_is_repeated() -> None:
    first = [question("a"), question("b"), question("c"), Response(received_answers=1), broken()]
    rpc = Rpc(first, [question("b"), question("c"), Response(received_answers=1), question("a")])
    asked: list[str] = []
    found = stream_of(rpc)
    found.on_question = lambda message: asked.append(message.question_id)

    async def run() -> None:
        await found.open()
        for _ in range(3):
            await found.step()
        assert [found.answer(workflow_pb2.QuestionAnswer(question_id=name)) for name in "aab"] == [True, False, True]
        for _ in range(7):
            await found.step()

    asyncio.run(run())
    # The third question has no answer yet and is asked once; the server had received the answer to the first.
    assert asked == ["a", "b", "c", "a"]
    sent = [answer.question_id for message in rpc.streams[1].sent for answer in message.answers]
    assert sent == ["b"]


def test_stream_drops_the_oldest_outputs_when_they_exceed_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_ends, "RETAINED_BYTES", 1000)
    rpc = Rpc([succeeded(number, f'"{"x" * 300}"') for number in range(1, 6)])
    found = play(rpc, 5)
    assert all(f"t{number}" in found.task_ends for number in range(1, 6))
    assert [found.task_ends.find("r", f"t{number}") is None for number in range(1, 6)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_step_raises_when_another_stream_took_over_the_run() -> None:
    refusal = errors_pb2.Refusal(
        code=grpc.StatusCode.ABORTED.value[0], reason=errors_pb2.ERROR_REASON_RUN_TAKEN_OVER, message="m"
    )
    with pytest.raises(AbortedError) as caught:
        play(Rpc([Response(stopped=refusal)]), 1)
    assert (caught.value.reason, caught.value.code) == ("RUN_TAKEN_OVER", grpc.StatusCode.ABORTED)
