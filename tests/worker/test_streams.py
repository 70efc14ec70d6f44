"""Chunks of attempts and the window of unacknowledged chunks, with a real worker."""

import asyncio
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lattice.v1 import errors_pb2, worker_pb2

from lattice_client import context
from lattice_worker.attempts.streams import WINDOW_CHUNKS, Streams
from lattice_worker.session.limits import Limits
from tests.worker.head import Pair, Stream
from tests.worker.shared import SharedWorker

CHUNKS = 3 * WINDOW_CHUNKS


@pytest.mark.slow
class TestWithWorker:
    """With a real worker, and a head that acknowledges the chunks that a test names."""

    def test_chunks_come_before_the_end_of_functions_threads_and_coroutines(self, worker: SharedWorker) -> None:
        def plain() -> Any:
            yield from range(20)
            return "whole"

        def emits() -> Any:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(context.emit, range(20)))

        async def coroutine() -> Any:
            await asyncio.gather(*(context.emit_async(number) for number in range(20)))
            await asyncio.to_thread(context.emit, 20)

        async def generator() -> Any:
            for number in range(20):
                yield number

        async def scenario(both: Pair) -> None:
            stream = both.stream
            stream.assign("plain", plain)
            stream.assign("emits", emits, slot=2)
            stream.assign("coroutine", coroutine, slot=3, is_async=True)
            stream.assign("generator", generator, slot=4, is_async=True)
            stream.assign("alone", generator, slot=5)
            found: dict[str, list[Any]] = {}
            ended: dict[str, Any] = {}
            while len(ended) < 5:
                report = await stream.report()
                match report.WhichOneof("fact"):
                    case "streamed":
                        assert report.lease_id not in ended, "a chunk after the end"
                        values = [json.loads(chunk.json) for chunk in report.streamed.chunks]
                        found.setdefault(report.lease_id, []).extend(values)
                    case "succeeded":
                        ended[report.lease_id] = json.loads(report.succeeded.outputs["out"].json)
                    case fact:
                        assert fact == "started", report
            whole = list(range(20))
            assert ended == {
                "plain": "whole",
                "emits": None,
                "coroutine": None,
                "generator": whole,
                "alone": whole,
            }
            assert {name: sorted(values) for name, values in found.items()} == {
                "plain": whole,
                "emits": whole,
                "coroutine": [*whole, 20],
                "generator": whole,
                "alone": whole,
            }
            assert (found["plain"], found["generator"], found["alone"]) == (whole, whole, whole)

        worker.play(scenario)

    @pytest.mark.parametrize("is_async", [False, True])
    def test_a_task_waits_when_the_server_acknowledges_nothing(self, worker: SharedWorker, is_async: bool) -> None:
        def plain() -> Any:
            for number in range(CHUNKS):
                context.emit(number)
            return os.getpid()

        async def coroutine() -> Any:
            for number in range(CHUNKS):
                await context.emit_async(number)
            return os.getpid()

        def quick() -> int:
            return 1

        async def quick_coroutine() -> int:
            return 1

        async def scenario(both: Pair) -> None:
            stream, acknowledged, others = both.stream, 0, 0
            stream.assign("flood", coroutine if is_async else plain, is_async=is_async)
            while (got := streamed_by(stream, "flood")) < CHUNKS:
                assert got - acknowledged <= WINDOW_CHUNKS
                if got - acknowledged <= WINDOW_CHUNKS * 3 // 4:
                    await stream.until("flood", "streamed")
                    continue
                # While it waits, others run, also in its process.
                others += 1
                stream.assign(f"o{others}", quick_coroutine if is_async else quick, slot=2, is_async=is_async)
                assert await stream.value(f"o{others}") == 1
                acknowledged = streamed_by(stream, "flood")
                stream.say(acknowledged_sequence=stream.reports[-1].sequence)
            # The last window needs no acknowledgement, so no wait may be seen in it.
            assert others >= CHUNKS // WINDOW_CHUNKS - 1
            # The end may have been read together with that of another task.
            facts = stream.of("flood")
            assert "succeeded" in facts or await stream.value("flood")

        worker.play(scenario)

    @pytest.mark.parametrize("is_async", [False, True])
    def test_a_task_that_waits_for_room_can_be_cancelled(self, worker: SharedWorker, is_async: bool) -> None:
        def plain() -> Any:
            for number in range(CHUNKS):
                context.emit(number)

        async def coroutine() -> Any:
            for number in range(CHUNKS):
                await context.emit_async(number)

        async def scenario(both: Pair) -> None:
            stream, got = both.stream, 0
            stream.assign("flood", coroutine if is_async else plain, is_async=is_async)
            while got < WINDOW_CHUNKS:
                got += len((await stream.until("flood", "streamed")).streamed.chunks)
            stream.say(stop_lease_ids=["flood"])
            report = await stream.end("flood")
            assert report.failed.failure.kind == errors_pb2.FAILURE_KIND_CANCELLED

        worker.play(scenario)

    def test_items_of_a_batch_stream_and_wrong_chunks_raise_in_the_task(self, worker: SharedWorker) -> None:
        def batch() -> Any:
            pass

        def members(n: list[int]) -> list[int]:
            for item, number in enumerate(n):
                context.emit(number, item=item)
                context.progress(number, 10, item=item)
            return n

        def wrong() -> Any:
            found = []
            for call in (
                lambda: context.emit("x" * 200_000),
                lambda: context.emit(1, item=0),
                lambda: context.progress(float("nan")),
                lambda: context.progress(True),
                lambda: context.emit(__import__("threading").Lock()),
            ):
                try:
                    call()
                except Exception as error:
                    found.append(type(error).__name__)
            return found

        async def scenario(both: Pair) -> None:
            stream = both.stream
            attempts = [
                worker_pb2.Attempt(run_id="r", task_id=f"t{number}", number=1, inputs=inputs_of(number))
                for number in (5, 6)
            ]
            stream.assign("batch", members, batched=True, attempts=attempts)
            await stream.end("batch")
            await stream.end("batch")
            told = {(r.item, r.WhichOneof("fact")): r for r in stream.reports if r.lease_id == "batch"}
            assert [told[item, "streamed"].streamed.chunks[0].json for item in (0, 1)] == ["5", "6"]
            assert [told[item, "progressed"].progressed.done for item in (0, 1)] == [5, 6]
            stream.assign("wrong", wrong)
            expected = ["PayloadError", "StreamError", "StreamError", "StreamError", "PayloadError"]
            assert await stream.value("wrong") == expected

        assert batch() is None
        worker.play(scenario)

    def test_a_server_of_an_older_version_takes_no_chunks_and_the_task_is_told(self, worker: SharedWorker) -> None:
        def emits() -> Any:
            context.progress(1, 2)
            try:
                context.emit(1)
            except context.StreamError as error:
                return str(error)

        async def scenario(both: Pair) -> None:
            both.stream.welcome(session_id="s2", chunk_limit_bytes=0)
            both.stream.assign("old", emits)
            assert "takes no chunks" in await both.stream.value("old")
            assert set(both.stream.of("old")) <= {"started", "succeeded"}

        worker.play(scenario)

    def test_chunks_are_sent_again_when_the_stream_breaks(self, tmp_path: Path, worker: SharedWorker) -> None:
        def gated() -> Any:
            context.emit(1)
            while not (tmp_path / "open").exists():
                time.sleep(0.01)
            context.emit(2)

        async def scenario(both: Pair) -> None:
            both.stream.assign("gated", gated)
            first = await both.stream.until("gated", "streamed")
            both.stream.drop()
            stream, _ = await both.head.dialled()
            stream.welcome(resumed=True)
            again = await stream.until("gated", "streamed")
            assert (again.sequence, again.streamed) == (first.sequence, first.streamed)
            stream.say(acknowledged_sequence=again.sequence)
            (tmp_path / "open").touch()
            assert (await stream.until("gated", "streamed")).streamed.chunks[0].json == "2"
            await stream.end("gated")

        worker.play(scenario)

    def test_the_context_has_a_deadline_and_a_logger(self, worker: SharedWorker) -> None:
        def plain() -> Any:
            context.logger().info("to read")
            context.logger().debug("not to read")
            return [context.current().deadline is None, context.cancelled()]

        def timed() -> float:
            deadline = context.current().deadline
            assert deadline is not None
            return deadline - time.time()

        async def scenario(both: Pair) -> None:
            stream = both.stream
            stream.assign("plain", plain)
            assert await stream.value("plain") == [True, False]
            assert stream.logs("plain") == "INFO to read\n"
            assignment = worker_pb2.Assignment()
            assignment.timeout.FromSeconds(50)
            stream.assign("timed", timed, timeout=assignment.timeout)
            assert 0 < await stream.value("timed") <= 50

        worker.play(scenario)


def streamed_by(stream: Stream, lease_id: str) -> int:
    """Return how many chunks of a lease were reported, all in order."""
    reports = {report.sequence: report for report in stream.reports if report.lease_id == lease_id}
    values = [json.loads(chunk.json) for number in sorted(reports) for chunk in reports[number].streamed.chunks]
    assert values == list(range(len(values)))
    return len(values)


def inputs_of(number: int) -> Any:
    from lattice.v1 import payload_pb2

    return {"n": payload_pb2.Binding(payload=payload_pb2.Payload(json=str(number)))}


class Agent:
    """The part of an agent that takes chunks."""

    def __init__(self) -> None:
        self.reports: list[worker_pb2.Report] = []
        self.credits: list[tuple[str, int, int]] = []
        self.streams = Streams(self.reports.append, Limits(chunk_bytes=1000))
        self.runner: Any = SimpleNamespace(credit=lambda *credit: self.credits.append(credit))
        self.assignment = worker_pb2.Assignment(lease_id="l", attempts=[worker_pb2.Attempt(), worker_pb2.Attempt()])

    def chunk(self, data: bytes = b"1", item: Any = 0, media_type: str = "application/json") -> None:
        """Take a chunk."""
        self.streams.take(self.assignment, self.runner, {"item": item, "type": media_type}, [data])

    def sizes(self) -> list[int]:
        """Return how many chunks each report has."""
        return [len(report.streamed.chunks) for report in self.reports]


def test_the_first_chunk_after_a_pause_is_reported_at_once_and_others_share_reports() -> None:
    async def scenario() -> None:
        agent = Agent()
        agent.chunk()
        await asyncio.sleep(0)
        assert agent.sizes() == [1]
        for _ in range(100):
            agent.chunk()
            await asyncio.sleep(0)
        agent.streams.end("l")
        assert sum(agent.sizes()) == 101
        assert len(agent.reports) < 101

    asyncio.run(scenario())


def test_a_process_is_given_as_much_room_as_the_server_has_acknowledged() -> None:
    async def scenario() -> None:
        agent = Agent()
        room, made = WINDOW_CHUNKS, 0
        while made < 2000:
            while room:
                agent.chunk(b"12")
                room, made = room - 1, made + 1
            await asyncio.sleep(0.006)
            reports, agent.reports[:] = list(agent.reports), []
            agent.streams.acknowledge(reports)
            assert all(size == 2 * count for _, count, size in agent.credits), "as many bytes as chunks"
            room += sum(count for _, count, _ in agent.credits)
            agent.credits.clear()
            assert room, "it waits for ever"

    asyncio.run(scenario())


def test_a_process_that_streams_past_its_window_is_ended() -> None:
    async def scenario() -> None:
        agent = Agent()
        for _ in range(WINDOW_CHUNKS):
            agent.chunk()
        with pytest.raises(ValueError, match="streams more than it may"):
            agent.chunk()
        agent.streams.end("l")
        assert sum(agent.sizes()) == WINDOW_CHUNKS

    asyncio.run(scenario())


@pytest.mark.parametrize("wrong", [{"data": b"1" * 1001}, {"item": 2}, {"item": -1}, {"item": "0"}, {"data": b"\xff"}])
def test_a_frame_that_is_no_chunk_raises(wrong: dict[str, Any]) -> None:
    async def scenario() -> None:
        agent = Agent()
        with pytest.raises(ValueError):  # noqa: PT011
            agent.chunk(**wrong)

    asyncio.run(scenario())


def test_a_lease_that_is_over_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        agent = Agent()
        agent.chunk()
        agent.chunk(item=1)
        agent.streams.take_progress(agent.assignment, {"item": 1, "done": 1.0, "total": None})
        agent.streams.end("l")
        assert [(report.item, report.WhichOneof("fact")) for report in agent.reports] == [
            (0, "streamed"),
            (1, "streamed"),
            (1, "progressed"),
        ]
        agent.streams.acknowledge(agent.reports)
        assert not agent.streams._flows
        assert not agent.streams._pending
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
