"""Chunks on their way from workers to readers, through a server."""

import asyncio
from typing import Any

import grpc
import pytest
from lattice.v1 import errors_pb2, payload_pb2, results_pb2, task_pb2, task_pb2_grpc, worker_pb2, workflow_pb2

from tests.server.rpc.callers import graph, task
from tests.server.rpc.scripted_worker import Scene, ScriptedWorker, play, succeeded


def chunks_of(*values: object) -> worker_pb2.AttemptStreamed:
    return worker_pb2.AttemptStreamed(chunks=[payload_pb2.Payload(json=str(value)) for value in values])


def failed(kind: errors_pb2.FailureKind.ValueType = errors_pb2.FAILURE_KIND_USER_ERROR) -> worker_pb2.AttemptFailed:
    return worker_pb2.AttemptFailed(failure=errors_pb2.Failure(kind=kind, message="broken"))


async def assigned(worker: ScriptedWorker) -> str:
    return str((await worker.hear("assignments")).assignments[0].lease_id)


async def a_run(head: Scene, **more: Any) -> str:
    spec = graph(task("t", **more))
    return (await head.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))).run.run_id


def shown(response: results_pb2.WatchChunksResponse) -> list[tuple[int, int, int, str]]:
    return [
        (chunk.sequence, chunk.attempt, chunk.index, "restart" if chunk.restart else chunk.payload.json)
        for chunk in response.chunks
    ]


async def read(head: Scene, run_id: str, **more: Any) -> list[tuple[int, int, int, str]]:
    call = head.results.WatchChunks(results_pb2.WatchChunksRequest(run_id=run_id, **more))
    responses = [response async for response in call]
    assert [response.complete for response in responses] == [False] * (len(responses) - 1) + [True]
    return [one for response in responses for one in shown(response)]


class Reading:
    """A reader of one task."""

    def __init__(self, head: Scene, run_id: str, after: int = 0) -> None:
        request = results_pb2.WatchChunksRequest(run_id=run_id, task_id="t", after_sequence={"t": after})
        self.call = head.results.WatchChunks(request)
        self.found: list[tuple[int, int, int, str]] = []

    async def until(self, count: int) -> list[tuple[int, int, int, str]]:
        """Read until there are so many chunks."""
        while len(self.found) < count:
            response = await self.call.read()
            assert isinstance(response, results_pb2.WatchChunksResponse), "the stream ended"
            self.found += shown(response)
        return self.found


def test_chunks_reach_a_reader_at_once_and_are_read_again_from_any_number() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        assert welcome.chunk_limit_bytes == 256 * 1024
        run_id = await a_run(head)
        lease = await assigned(worker)
        reading = Reading(head, run_id)
        await worker.report(1, lease, streamed=chunks_of(10))
        assert await reading.until(1) == [(1, 1, 0, "10")]
        await worker.report(2, lease, streamed=chunks_of(11, 12))
        assert await reading.until(3) == [(1, 1, 0, "10"), (2, 1, 1, "11"), (3, 1, 2, "12")]
        reading.call.cancel()
        await worker.report(3, lease, streamed=chunks_of(13))
        await worker.report(4, lease, succeeded=succeeded())
        await head.result(run_id)
        assert await read(head, run_id, task_id="t", after_sequence={"t": 2}) == [(3, 1, 2, "12"), (4, 1, 3, "13")]
        assert len(await read(head, run_id)) == 4
        assert await read(head, run_id, after_sequence={"t": 99}) == []

    play(scenario)


def test_a_repeated_report_adds_no_chunk_and_that_of_another_lease_none() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await a_run(head)
        lease = await assigned(worker)
        await worker.report(1, lease, streamed=chunks_of(1))
        await worker.report(1, lease, streamed=chunks_of(1))
        await worker.report(2, "unknown", streamed=chunks_of(2))
        await worker.report(3, lease, succeeded=succeeded())
        await head.result(run_id)
        assert await read(head, run_id) == [(1, 1, 0, "1")]

    play(scenario)


def test_a_reader_is_told_that_an_attempt_replaces_an_earlier_one() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await a_run(head, retry=task_pb2.RetryPolicy(max_attempts=2))
        lease = await assigned(worker)
        reading = Reading(head, run_id)
        await worker.report(1, lease, streamed=chunks_of(1, 2))
        await reading.until(2)
        await worker.report(2, lease, failed=failed())
        lease = await assigned(worker)
        await worker.report(3, lease, started=worker_pb2.AttemptStarted())
        assert await reading.until(3) == [(1, 1, 0, "1"), (2, 1, 1, "2"), (3, 2, 0, "restart")]
        await worker.report(4, lease, streamed=chunks_of(3))
        await worker.report(5, lease, succeeded=succeeded())
        await head.result(run_id)
        assert await read(head, run_id) == [(3, 2, 0, "restart"), (4, 2, 0, "3")]

    play(scenario)


def test_chunk_fails_only_its_attempt_when_it_is_too_large_or_unreadable() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        sequence = 0
        artifact = payload_pb2.Payload(artifact=payload_pb2.Artifact(artifact_id="a"))
        for chunk in (payload_pb2.Payload(json="1" * 101), payload_pb2.Payload(data=b"1"), artifact):
            run_id = await a_run(head)
            lease = await assigned(worker)
            sequence += 1
            await worker.report(sequence, lease, streamed=worker_pb2.AttemptStreamed(chunks=[chunk]))
            assert list((await worker.hear("stop_lease_ids")).stop_lease_ids) == [lease]
            sequence += 1
            await worker.report(sequence, lease, failed=failed(errors_pb2.FAILURE_KIND_CANCELLED))
            run = await head.result(run_id)
            assert run.failure.kind == errors_pb2.FAILURE_KIND_PAYLOAD
            assert "a chunk of its output cannot be read" in run.failure.message
            assert await read(head, run_id) == []

    play(scenario, chunk_limit_bytes=100)


def test_progress_is_shown_to_readers_and_of_the_task() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await a_run(head)
        lease = await assigned(worker)
        await worker.report(1, lease, progressed=worker_pb2.AttemptProgressed(done=1, total=4))
        call = head.results.WatchChunks(results_pb2.WatchChunksRequest(run_id=run_id))
        response = await call.read()
        assert isinstance(response, results_pb2.WatchChunksResponse)
        (progress,) = response.progress
        assert (progress.task_id, progress.attempt, progress.done, progress.total) == ("t", 1, 1, 4)
        for number, done in ((2, float("nan")), (3, float("inf"))):
            await worker.report(number, lease, progressed=worker_pb2.AttemptProgressed(done=done))
        await worker.report(4, lease, succeeded=succeeded())
        await head.result(run_id)
        request = task_pb2.GetTaskRequest(run_id=run_id, task_id="t")
        found = (await task_pb2_grpc.TaskServiceStub(head.channel).GetTask(request)).task
        assert found.progress == progress

    play(scenario)


def test_100_readers_get_all_chunks_when_other_readers_disconnect_or_do_not_read() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await a_run(head)
        lease = await assigned(worker)
        idle = Reading(head, run_id)  # Never read: gRPC's own buffer fills, and then its stream waits.
        vanishing = [Reading(head, run_id) for _ in range(5)]
        readers = [asyncio.create_task(read(head, run_id, task_id="t")) for _ in range(100)]
        text = '"' + "x" * 1000 + '"'
        for number in range(1, 51):
            await worker.report(number, lease, streamed=chunks_of(*[text] * 20))
            if number == 25:
                for reading in vanishing:
                    await reading.until(20)
                    reading.call.cancel()
        await worker.report(51, lease, succeeded=succeeded())
        await head.result(run_id)
        for found in await asyncio.gather(*readers):
            assert [(sequence, index) for sequence, _, index, _ in found] == [(n, n - 1) for n in range(1, 1001)]
        assert len(await idle.until(1000)) == 1000

    play(scenario)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (results_pb2.WatchChunksRequest(run_id="ghost"), grpc.StatusCode.NOT_FOUND),
        (results_pb2.WatchChunksRequest(run_id="r", task_id="ghost"), grpc.StatusCode.NOT_FOUND),
        (results_pb2.WatchChunksRequest(run_id="r", after_sequence={"t": -1}), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_reader_is_refused_when_its_run_task_or_sequence_is_not_valid(
    request_: results_pb2.WatchChunksRequest, reason: grpc.StatusCode
) -> None:
    async def scenario(head: Scene) -> None:
        await head.worker()
        spec = graph(task("t"))
        await head.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(run_id="r", workflow=spec))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await head.results.WatchChunks(request_).read()
        assert caught.value.code() == reason

    play(scenario)
