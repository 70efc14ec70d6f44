"""Questions of attempts and their answers, with a real worker."""

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import errors_pb2, payload_pb2, worker_pb2

from lattice_client import context
from lattice_worker.runner.encoding.values import decode_value
from tests.worker.head import LIMIT_BYTES, Pair, Stream
from tests.worker.shared import SharedWorker

pytestmark = pytest.mark.slow


async def asked(stream: Stream, lease_id: str) -> worker_pb2.Report:
    """Read reports up to the next question of a lease."""
    return await stream.until(lease_id, "asked")


def value_of(report: worker_pb2.Report) -> Any:
    payload = report.asked.payload
    return decode_value(payload.media_type, payload.json.encode() or payload.data)


def answer(stream: Stream, sequence: int, report: worker_pb2.Report, text: str = "", **more: Any) -> None:
    """Answer a question with JSON, or as `more` says."""
    content = more or {"payload": payload_pb2.Payload(json=text)}
    named = {"sequence": sequence, "lease_id": report.lease_id, "number": report.asked.number}
    stream.say(answers=[worker_pb2.Answer(**named, **content)])


def test_questions_are_answered_in_functions_threads_and_coroutines(worker: SharedWorker) -> None:
    def plain() -> Any:
        return [context.ask("sum", [1, number]) for number in range(3)]

    def threads() -> Any:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda number: context.ask("sum", [1, number]), range(8)))

    async def coroutine() -> Any:
        import asyncio

        return list(await asyncio.gather(*(context.ask_async("sum", [1, number]) for number in range(8))))

    async def in_thread() -> Any:
        import asyncio

        return [await asyncio.to_thread(context.ask, "sum", [1, 5]), context.ask("sum", [1, 6])]

    async def scenario(both: Pair) -> None:
        stream, sequence = both.stream, 0
        leases = {"plain": 3, "threads": 8, "coroutine": 8, "in_thread": 2, "run": 8}
        stream.assign("plain", plain)
        stream.assign("threads", threads, slot=2)
        stream.assign("coroutine", coroutine, slot=3, is_async=True)
        stream.assign("in_thread", in_thread, slot=4, is_async=True)
        # A coroutine function that has a process and an event loop of its own.
        stream.assign("run", coroutine, slot=5)
        numbers: dict[str, list[int]] = {name: [] for name in leases}
        results: dict[str, Any] = {}
        while len(results) < len(leases):
            report = await stream.report()
            match report.WhichOneof("fact"):
                case "asked":
                    sequence += 1
                    numbers[report.lease_id].append(report.asked.number)
                    answer(stream, sequence, report, str(sum(value_of(report))))
                case "succeeded":
                    results[report.lease_id] = json.loads(report.succeeded.outputs["out"].json)
                case fact:
                    assert fact == "started", report
        assert results == {
            "plain": [1, 2, 3],
            "threads": list(range(1, 9)),
            "coroutine": list(range(1, 9)),
            "in_thread": [6, 7],
            "run": list(range(1, 9)),
        }
        assert {name: sorted(found) for name, found in numbers.items()} == {
            name: list(range(1, count + 1)) for name, count in leases.items()
        }
        # The process serves other attempts afterwards, which may ask too.
        stream.assign("again", plain)
        answer(stream, sequence + 1, await asked(stream, "again"), "1")
        answer(stream, sequence + 2, await asked(stream, "again"), "2")
        answer(stream, sequence + 3, await asked(stream, "again"), "3")
        assert await stream.value("again") == [1, 2, 3]
        stream.assign("quiet", os.getpid)
        assert await stream.value("quiet")

    worker.play(scenario)


def test_a_question_that_gets_no_value_raises_a_typed_error(worker: SharedWorker) -> None:
    def ask() -> Any:
        import pickle

        try:
            return context.ask("q", {1, 2})
        except context.AnswerError as error:
            same = pickle.loads(pickle.dumps(error))
            return ["answer", str(same), same.type]
        except context.QuestionError as error:
            return ["question", str(error)]

    async def scenario(both: Pair) -> None:
        stream = both.stream
        failure = errors_pb2.Failure(type="KeyError", message="no such key")
        cases: list[tuple[dict[str, Any], Any]] = [
            ({"failure": failure}, ["answer", "KeyError: no such key", "KeyError"]),
            ({"unanswered": "nobody is there"}, ["question", "nobody is there"]),
            ({"payload": payload_pb2.Payload(media_type="application/octet-stream", data=b"x")}, b"x"),
            ({"payload": payload_pb2.Payload(media_type="x/y", data=b"x")}, None),
        ]
        for number, (content, result) in enumerate(cases, 1):
            stream.assign(f"l{number}", ask)
            report = await asked(stream, f"l{number}")
            assert (report.item, report.asked.name, value_of(report)) == (0, "q", {1, 2})
            answer(stream, number, report, **content)
            if result is not None:
                assert await stream.value(f"l{number}") == result
        assert "encoded as 'x/y'" in (await stream.end("l4")).failed.failure.message

    worker.play(scenario)


def test_a_wrong_question_raises_at_once(tmp_path: Path, worker: SharedWorker) -> None:
    def wrong(name: Any, size: int, item: Any = None) -> Any:
        try:
            context.ask(name, "x" * size, item=item)
        except Exception as error:
            return [type(error).__name__, str(error)]

    def forked() -> Any:
        pid = os.fork()
        if not pid:
            try:
                context.ask("q")
            except RuntimeError:
                os._exit(7)
            os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def late() -> None:
        import threading
        import time

        def ask() -> None:
            time.sleep(0.2)
            try:
                context.ask("q")
            except Exception as error:
                path.write_text(f"{type(error).__name__}: {error}")

        threading.Thread(target=ask, daemon=True).start()

    path = tmp_path / "late"

    async def scenario(both: Pair) -> None:
        stream = both.stream
        cases = [
            ({"name": 3, "size": 0}, "QuestionError", "name of a question"),
            ({"name": "", "size": 0}, "QuestionError", "name of a question"),
            ({"name": "q", "size": 0, "item": 0}, "QuestionError", "item is for batched functions"),
            ({"name": "q", "size": LIMIT_BYTES}, "PayloadError", f"may have {LIMIT_BYTES}"),
        ]
        for number, (inputs, kind, text) in enumerate(cases):
            stream.assign(f"l{number}", wrong, inputs=inputs)
            found = await stream.value(f"l{number}")
            assert (found[0], text in found[1]) == (kind, True), found
        stream.assign("forked", forked)
        assert await stream.value("forked") == 7
        stream.assign("late", late)
        await stream.value("late")
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
        assert path.read_text() == "QuestionError: the attempt is over: nothing can be asked any more"
        # A server of an older version, which would not know what is asked.
        stream.drop()
        stream, _ = await both.head.dialled()
        stream.welcome(resumed=True, question_limit_bytes=0)
        stream.assign("old", wrong, inputs={"name": "q", "size": 3})
        found = await stream.value("old")
        assert found == ["QuestionError", "the server is of a version that puts no questions to callers"]

    worker.play(scenario)


def test_the_members_of_a_batch_ask_by_their_position(worker: SharedWorker) -> None:
    def batch(x: list[int]) -> list[Any]:
        with suppress(context.QuestionError):  # who asks?
            context.ask("q")
        return [context.ask("q", value, item=position) for position, value in enumerate(x)]

    async def scenario(both: Pair) -> None:
        payloads = [payload_pb2.Binding(payload=payload_pb2.Payload(json=str(number))) for number in (7, 8)]
        attempts = [
            worker_pb2.Attempt(run_id=f"r{number}", task_id="t", number=1, inputs={"x": payload})
            for number, payload in enumerate(payloads)
        ]
        both.stream.assign("b", batch, attempts=attempts, batched=True)
        for number in range(2):
            report = await asked(both.stream, "b")
            assert (report.item, value_of(report)) == (number, 7 + number)
            answer(both.stream, number + 1, report, f'"{number}"')
        found = [await both.stream.end("b") for _ in range(2)]
        assert [report.succeeded.outputs["out"].json for report in found] == ['"0"', '"1"']

    worker.play(scenario)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_attempt_that_waits_for_an_answer_is_cancelled_and_times_out(is_async: bool, worker: SharedWorker) -> None:
    def plain() -> Any:
        return context.ask("q")

    async def coroutine() -> Any:
        return await context.ask_async("q")

    async def scenario(both: Pair) -> None:
        stream = both.stream
        function: Any = coroutine if is_async else plain
        stream.assign("a", function, is_async=is_async)
        first = await asked(stream, "a")
        stream.say(stop_lease_ids=["a"])
        assert (await stream.end("a")).failed.failure.kind == errors_pb2.FAILURE_KIND_CANCELLED
        stream.assign("b", function, is_async=is_async, timeout=Duration(seconds=1))
        second = await asked(stream, "b")
        assert (await stream.end("b")).failed.failure.kind == errors_pb2.FAILURE_KIND_TIMEOUT
        # Answers that arrive too late, or for an unknown lease, change nothing.
        for number, report in enumerate((first, second, second), 1):
            answer(stream, number, report, "1")
        stream.say(answers=[worker_pb2.Answer(sequence=4, lease_id="nobody", number=1, unanswered="x")])
        stream.assign("c", function, is_async=is_async)
        answer(stream, 5, await asked(stream, "c"), '"fine"')
        assert await stream.value("c") == "fine"
        assert stream.of("a").count("failed") == stream.of("b").count("failed") == 1

    worker.play(scenario)


def test_an_answer_that_a_broken_stream_lost_is_taken_once(worker: SharedWorker) -> None:
    def ask() -> Any:
        return [context.ask("q", number) for number in range(3)]

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("a", ask)
        first = await asked(stream, "a")
        answer(stream, 1, first, "1")
        second = await asked(stream, "a")
        stream.drop()
        stream, hello = await both.head.dialled()
        assert hello.session_id == "s1"
        stream.welcome(resumed=True)
        # The head sends the first answer again, since it was not acknowledged, and then new answers.
        answer(stream, 1, first, "100")
        assert (await asked(stream, "a")).sequence == first.sequence
        answer(stream, 2, second, "2")
        answer(stream, 2, second, "200")
        third = await stream.until("a", "asked")
        while third.asked.number < 3:
            third = await stream.until("a", "asked")
        answer(stream, 3, third, "3")
        assert await stream.value("a") == [1, 2, 3]
        while (request := await stream.requests.get()).acknowledged_answer < 3:
            assert request.acknowledged_answer in {0, 1, 2}

    worker.play(scenario)


def test_a_process_of_little_memory_asks(worker: SharedWorker) -> None:
    def ask() -> Any:
        return context.ask("q")

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("a", ask, resources={"memory_bytes": 1})
        answer(stream, 1, await asked(stream, "a"), "1")
        assert await stream.value("a") == 1

    worker.play(scenario)
