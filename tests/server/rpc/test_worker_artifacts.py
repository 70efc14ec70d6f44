"""Large values of workers: when they are dropped, and reading them through the server."""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import pytest
from lattice.v1 import (
    artifact_pb2,
    payload_pb2,
    run_pb2,
    worker_pb2,
)

from tests.server.rpc.callers import function, task
from tests.server.rpc.scripted_worker import Scene, ScriptedWorker, play


def large(name: str) -> payload_pb2.Payload:
    """Return a reference to a value in the store of node `n`."""
    artifact = payload_pb2.Artifact(artifact_id=name, size_bytes=1_000_000, node_id="n")
    return payload_pb2.Payload(media_type="application/json", artifact=artifact)


def spawned(name: str) -> worker_pb2.AttemptSpawned:
    """Return the wish for a task with a large input, deep inside another."""
    inner = payload_pb2.Binding(map=payload_pb2.BindingMap(entries={"k": payload_pb2.Binding(payload=large(name))}))
    inputs = {"x": payload_pb2.Binding(list=payload_pb2.BindingList(items=[inner]))}
    return worker_pb2.AttemptSpawned(tasks=[task("a/b", inputs=inputs)], functions={"work": function()})


def test_large_value_is_dropped_by_its_node_when_no_run_needs_it() -> None:
    """Values of an ended lease, of a task that may not succeed, of an ended run, and undeclared outputs."""

    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()

        async def dropped() -> list[str]:
            return list((await worker.hear("drop_artifact_ids")).drop_artifact_ids)

        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        outputs = {"out": large("kept"), "more": large("kept too")}
        await worker.report(1, "another", succeeded={"outputs": {"out": large("stale")}})
        assert await dropped() == ["stale"]
        await worker.report(2, lease_id, succeeded={"outputs": outputs})
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        await worker.report(3, lease_id, succeeded={"split": {"out": {"items": [large("twice")]}}})
        assert await dropped() == ["twice"]
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(4, lease_id, succeeded={"outputs": {"else": large("not what was asked for")}})
        assert await dropped() == ["not what was asked for"]
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_FAILED
        worker.hang_up()

    play(scenario)


def test_unneeded_large_values_are_dropped_when_a_worker_reconnects() -> None:
    """Values of unacknowledged reports are dropped only when the session has ended."""

    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker(stored_artifact_ids=["older"])
        assert list(welcome.drop_artifact_ids) == ["older"]
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(1, lease_id, succeeded={"outputs": {"out": large("kept")}})
        worker.hang_up()
        await head.result(run_id)
        listed = {"stored_artifact_ids": ["kept", "lost"], "reported_artifact_ids": ["kept", "unsaid"]}
        again, resumed = await head.worker(session_id=welcome.session_id, **listed)
        assert (resumed.resumed, list(resumed.drop_artifact_ids)) == (True, ["lost"])
        again.hang_up()
        other, fresh = await head.worker(**listed)
        assert (fresh.resumed, list(fresh.drop_artifact_ids)) == (False, ["lost", "unsaid"])
        other.hang_up()

    play(scenario)


def test_artifacts_are_dropped_again_when_their_report_is_repeated() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        stale = {"succeeded": {"outputs": {"out": large("stale")}}}
        await worker.report(1, "unknown", **stale)
        assert list((await worker.hear("drop_artifact_ids")).drop_artifact_ids) == ["stale"]
        worker.hang_up()
        again, _ = await head.worker(session_id=welcome.session_id, reported_artifact_ids=["stale"])
        await again.report(3, "unknown", succeeded={"outputs": {"out": large("after one that is missing")}})
        await again.report(1, "unknown", **stale)
        assert list((await again.hear("drop_artifact_ids")).drop_artifact_ids) == ["stale"]
        again.hang_up()

    play(scenario)


def test_large_input_is_dropped_when_its_spawned_task_is_not_added() -> None:
    """Whether the task is there already, cannot be, or its parent has ended."""

    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()

        async def dropped() -> list[str]:
            return list((await worker.hear("drop_artifact_ids")).drop_artifact_ids)

        await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(1, lease_id, spawned=spawned("kept"))
        await worker.report(2, lease_id, spawned=spawned("again"))
        assert await dropped() == ["again"]
        wrong = spawned("wrong")
        wrong.functions["work"].Clear()
        await worker.report(3, lease_id, spawned=wrong)
        assert await dropped() == ["wrong"]
        await worker.report(4, lease_id, failed={"failure": {"kind": "FAILURE_KIND_CANCELLED"}})
        await worker.report(5, lease_id, spawned=spawned("late"))
        assert await dropped() == ["late"]
        worker.hang_up()

    play(scenario, max_spawn_depth=1)


ARTIFACT = "ab" * 16
CHUNK = worker_pb2.UploadArtifactRequest(data=b"12345")


async def sending(head: Scene, size_bytes: int = 10, said: int | None = 10) -> tuple[ScriptedWorker, Any, Any]:
    """Have a worker make a value that stays with it, and a client read it; return the worker, the reading and the
    upload it is asked for, of as many bytes as it says there will be."""
    worker, _ = await head.worker()
    run_id = await head.run("a")
    lease_id = (await worker.hear("assignments")).assignments[0].lease_id
    artifact = payload_pb2.Artifact(artifact_id=ARTIFACT, size_bytes=size_bytes, node_id="n")
    made = payload_pb2.Payload(media_type="application/octet-stream", artifact=artifact)
    await worker.report(1, lease_id, succeeded={"outputs": {"out": made}})
    await head.result(run_id)
    reading = head.artifacts.ReadArtifact(artifact_pb2.ReadArtifactRequest(artifact_id=ARTIFACT))
    transfer_id = (await worker.hear("send_artifacts")).send_artifacts[0].transfer_id
    upload = head.workers.UploadArtifact()
    await upload.write(worker_pb2.UploadArtifactRequest(transfer_id=transfer_id, size_bytes=said))
    return worker, reading, upload


async def read(reading: Any) -> bytes:
    return b"".join([response.data async for response in reading])


def test_artifact_is_read_from_its_worker_through_the_server() -> None:
    async def scenario(head: Scene) -> None:
        worker, reading, upload = await sending(head)
        for _ in range(2):
            await upload.write(CHUNK)
        await upload.done_writing()
        assert await read(reading) == b"1234512345"
        await upload
        worker.hang_up()

    play(scenario)


@pytest.mark.parametrize("said", [10, None])
@pytest.mark.parametrize("ending", ["cancel", "done_writing"])
def test_read_fails_when_the_upload_of_the_worker_breaks(ending: str, said: int | None) -> None:
    async def scenario(head: Scene) -> None:
        worker, reading, upload = await sending(head, said=said)
        await upload.write(CHUNK)
        assert (await reading.read()).data == CHUNK.data
        ended = getattr(upload, ending)()
        if ending == "done_writing":
            await ended
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        worker.hang_up()

    play(scenario)


@pytest.mark.parametrize(("count", "said"), [(1, 5), (3, 15), (3, None)])
def test_read_fails_when_the_worker_sends_another_size(count: int, said: int | None) -> None:
    async def scenario(head: Scene) -> None:
        worker, reading, upload = await sending(head, said=said)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the server may have ended it by then
            for _ in range(count):
                await upload.write(CHUNK)
            await upload.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(reading)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "another number of bytes" in str(caught.value.details())
        worker.hang_up()

    play(scenario)


@pytest.mark.parametrize("count", [0, 100])
def test_an_upload_ends_when_its_reader_has_left(count: int) -> None:
    async def scenario(head: Scene) -> None:
        worker, reading, upload = await sending(head, size_bytes=count * 2**20 + 10, said=count * 2**20 + 10)
        await upload.write(CHUNK)
        await reading.read()

        async def more() -> None:
            for _ in range(count):  # more than lies on the way to a reader who does not read
                await upload.write(worker_pb2.UploadArtifactRequest(data=bytes(2**20)))

        writing = asyncio.create_task(more())
        await asyncio.wait({writing}, timeout=0.2)
        reading.cancel()
        await upload
        await asyncio.wait({writing})
        worker.hang_up()

    play(scenario)
