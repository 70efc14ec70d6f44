"""Questions of attempts on their way to the caller that holds the run, and the answers on their way back."""

import asyncio
from typing import Any

import grpc
from lattice.v1 import errors_pb2, payload_pb2, worker_pb2, workflow_pb2, workflow_pb2_grpc

from lattice_server.core.run.open_run import MAX_QUESTIONS, NOT_HELD, NOT_OPEN
from tests.server.rpc.callers import function, json_payload, task
from tests.server.rpc.scripted_worker import Scene, ScriptedWorker, play, succeeded

LIMIT_BYTES = 1000
FINISH = workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT


class Holder:
    """A stream that holds a run."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = workflow_pb2_grpc.WorkflowServiceStub(channel).OpenRun()
        self.run_id = ""
        self._heard: list[workflow_pb2.OpenRunResponse] = []

    async def open(self, run_id: str = "") -> "Holder":
        """Open a run, or take one over."""
        spec = workflow_pb2.WorkflowSpec(failure_policy=FINISH)
        start = {"run_id": run_id} if run_id else {"run": workflow_pb2.RunWorkflowRequest(workflow=spec)}
        await self.say(opening=workflow_pb2.OpenRunOpening(**start))  # type: ignore[arg-type]
        self.run_id = (await self.call.read()).accepted.run.run_id
        return self

    async def say(self, **fields: Any) -> None:
        """Send one message."""
        await self.call.write(workflow_pb2.OpenRunRequest(**fields))

    async def add(self, *names: str, **more: Any) -> None:
        """Add tasks."""
        functions = {"work": function("work")}
        addition = workflow_pb2.AddTasksRequest(tasks=[task(name, **more) for name in names], functions=functions)
        await self.say(additions=[addition])

    async def until(self, field: str) -> Any:
        """Read until a message has a field; return that."""
        while True:
            response = await self.call.read()
            assert isinstance(response, workflow_pb2.OpenRunResponse), "the stream ended"
            if any(known.name == field for known, _ in response.ListFields()):
                return getattr(response, field)

    async def answer(self, question_id: str, text: str = "1", **more: Any) -> None:
        """Answer a question."""
        content = more or {"payload": json_payload(text)}
        await self.say(answers=[workflow_pb2.QuestionAnswer(question_id=question_id, **content)])


def asked(number: int = 1, text: str = "1") -> worker_pb2.AttemptAsked:
    return worker_pb2.AttemptAsked(number=number, name="q", payload=json_payload(text))


async def answers(worker: ScriptedWorker) -> list[worker_pb2.Answer]:
    return list((await worker.hear("answers")).answers)


async def assigned(worker: ScriptedWorker) -> str:
    return str((await worker.hear("assignments")).assignments[0].lease_id)


def test_question_reaches_the_caller_and_its_answer_the_worker_once() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        assert welcome.question_limit_bytes == LIMIT_BYTES
        holder = await Holder(head.channel).open()
        await holder.add("a")
        lease = await assigned(worker)
        await worker.report(1, lease, asked=asked(1, '"first"'))
        (first,) = await holder.until("questions")
        await worker.report(2, lease, asked=asked(2, '"second"'))
        assert (first.run_id, first.task_id, first.attempt, first.name) == (holder.run_id, "a", 1, "q")
        assert first.payload.json == '"first"'
        await holder.answer(first.question_id, "11")
        (answer,) = await answers(worker)
        assert (answer.sequence, answer.lease_id, answer.number, answer.payload.json) == (1, lease, 1, "11")
        (second,) = await holder.until("questions")
        failure = errors_pb2.Failure(type="KeyError", message="none", kind=errors_pb2.FAILURE_KIND_USER_ERROR)
        await holder.answer(second.question_id, failure=failure)
        (answer,) = await answers(worker)
        assert (answer.sequence, answer.number, answer.failure) == (2, 2, failure)
        await holder.answer(first.question_id, "12")
        assert list(await holder.until("refused_question_ids")) == [first.question_id]
        await worker.report(3, lease, succeeded=succeeded())
        await holder.until("events")
        holder.call.cancel()

    play(scenario, question_limit_bytes=LIMIT_BYTES)


def test_answers_are_sent_again_when_the_stream_breaks_before_acknowledgement() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        holder = await Holder(head.channel).open()
        await holder.add("a")
        lease = await assigned(worker)
        for number in (1, 2, 3, 4):
            await worker.report(number, lease, asked=asked(number))
            (question,) = await holder.until("questions")
            await holder.answer(question.question_id, str(number))
            await answers(worker)
            if number == 3:  # The server has read these once it has read the next report.
                await worker.say(acknowledged_answer=1)
                await worker.say(acknowledged_answer=0)
        worker.hang_up()
        worker, welcome = await head.worker(session_id=welcome.session_id, held_lease_ids=[lease])
        assert welcome.resumed
        again = await answers(worker)
        assert [(answer.sequence, answer.payload.json) for answer in again] == [(2, "2"), (3, "3"), (4, "4")]
        holder.call.cancel()

    play(scenario)


def test_a_question_is_withdrawn_when_its_attempt_is_over() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        holder = await Holder(head.channel).open()
        await holder.add("a", retry={"max_attempts": 2, "initial_backoff": {}})
        lease = await assigned(worker)
        await worker.report(1, lease, asked=asked())
        (first,) = await holder.until("questions")
        failure = errors_pb2.Failure(kind=errors_pb2.FAILURE_KIND_USER_ERROR, message="m")
        await worker.report(2, lease, failed=worker_pb2.AttemptFailed(failure=failure))
        assert list(await holder.until("withdrawn_question_ids")) == [first.question_id]
        await holder.answer(first.question_id)
        assert list(await holder.until("refused_question_ids")) == [first.question_id]
        # The next attempt asks again.
        await worker.report(3, await assigned(worker), asked=asked())
        (second,) = await holder.until("questions")
        assert (second.attempt, second.question_id != first.question_id) == (2, True)
        holder.call.cancel()

    play(scenario)


def test_question_is_refused_at_once_when_no_caller_can_answer_it() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        await head.run("plain")
        plain = await assigned(worker)
        await worker.report(1, plain, asked=asked())
        (answer,) = await answers(worker)
        assert answer.unanswered == NOT_OPEN
        holder = await Holder(head.channel).open()
        await holder.add("a")
        await worker.report(2, plain, succeeded=succeeded())
        lease = await assigned(worker)
        cases = [
            (asked(1, f'"{"x" * LIMIT_BYTES}"'), "may have 1000 bytes"),
            (worker_pb2.AttemptAsked(number=2, name="q"), "a payload needs json, data or artifact"),
            (
                worker_pb2.AttemptAsked(number=3, payload=payload_pb2.Payload(artifact={"artifact_id": "x"})),
                "it is an artifact",
            ),
        ]
        for number, (question, text) in enumerate(cases, 3):
            await worker.report(number, lease, asked=question)
            (answer,) = await answers(worker)
            assert (answer.number, text in answer.unanswered) == (number - 2, True), answer
        # One that the caller answers with too much, or with nothing.
        too_much = {"payload": json_payload(f'"{"x" * LIMIT_BYTES}"')}
        for number, content in ((6, too_much), (7, {})):
            await worker.report(number, lease, asked=asked(number))
            (question,) = await holder.until("questions")
            message = workflow_pb2.QuestionAnswer(question_id=question.question_id, **content)
            await holder.say(answers=[message])
            assert list(await holder.until("refused_question_ids")) == [question.question_id]
            (answer,) = await answers(worker)
            assert "the caller's answer" in answer.unanswered
        # And one whose caller has closed the run and ended its side of the stream.
        await holder.say(close=True)
        await holder.call.done_writing()
        await worker.report(8, lease, asked=asked(8))
        (answer,) = await answers(worker)
        assert answer.unanswered == NOT_HELD
        await worker.report(9, lease, asked=asked(9))
        (answer,) = await answers(worker)
        assert (answer.number, answer.unanswered) == (9, NOT_HELD)
        await worker.report(10, lease, succeeded=succeeded())
        await holder.until("ended")

    play(scenario, question_limit_bytes=LIMIT_BYTES, open_run_grace_s=0.2)


def test_question_waits_when_the_run_has_no_stream() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        holder = await Holder(head.channel).open()
        await holder.add("a")
        lease = await assigned(worker)
        await worker.report(1, lease, asked=asked(1))
        (first,) = await holder.until("questions")
        holder.call.cancel()
        await asyncio.sleep(0.1)
        await worker.report(2, lease, asked=asked(2))
        other = await Holder(head.channel).open(holder.run_id)
        questions = list(await other.until("questions"))
        while len(questions) < 2:
            questions += await other.until("questions")
        assert questions[0] == first
        for question in questions:
            await other.answer(question.question_id)
        found = await answers(worker)
        while len(found) < 2:
            found += await answers(worker)
        assert [answer.number for answer in found] == [1, 2]
        other.call.cancel()

    play(scenario)


def test_question_is_refused_when_the_run_has_its_most_unanswered_questions() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        holder = await Holder(head.channel).open()
        await holder.add("a")
        lease = await assigned(worker)
        reports = [
            worker_pb2.Report(sequence=number, lease_id=lease, asked=asked(number))
            for number in range(1, MAX_QUESTIONS + 3)
        ]
        await worker.say(reports=reports)
        found = await answers(worker)
        assert [answer.number for answer in found] == [MAX_QUESTIONS + 1, MAX_QUESTIONS + 2]
        assert all("more than 1000 questions" in answer.unanswered for answer in found)
        holder.call.cancel()

    play(scenario)
