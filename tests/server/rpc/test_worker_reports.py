"""Workers' reports: order, repetition after a break, times, and fencing of leases."""

import asyncio
import time
from typing import Any, NoReturn

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import (
    cluster_pb2,
    errors_pb2,
    payload_pb2,
    resources_pb2,
    results_pb2,
    run_pb2,
    task_pb2,
    task_pb2_grpc,
    worker_pb2,
    workflow_pb2,
)

from lattice_server.rpc import worker_reader
from tests.server.rpc.callers import graph, task
from tests.server.rpc.scripted_worker import Report, Scene, play, succeeded


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({}, 'outputs["out"]'),
        ({"data": b"x"}, 'outputs["out"].media_type'),
        ({"artifact": {"artifact_id": "a", "size_bytes": -1}}, 'outputs["out"].artifact.size_bytes'),
        ({"artifact": {"artifact_id": "../a"}}, 'outputs["out"].artifact.artifact_id'),
    ],
)
def test_task_fails_when_its_success_cannot_be_read(
    payload: dict[str, Any], field: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker(capacity=resources_pb2.Capacity(cpu=2, slots=2))
        run_ids = [await head.run("a"), await head.run("a")]
        lease_ids: list[str] = []
        while len(lease_ids) < 2:
            lease_ids += [assigned.lease_id for assigned in (await worker.hear("assignments")).assignments]
        unreadable = worker_pb2.AttemptSucceeded(outputs={"out": payload_pb2.Payload(**payload)})
        facts = zip(lease_ids, (succeeded(), unreadable), strict=True)
        reports = [Report(sequence=n, lease_id=lease, succeeded=fact) for n, (lease, fact) in enumerate(facts, 1)]
        await worker.say(reports=reports)
        good, bad = [await head.result(run_id) for run_id in run_ids]
        assert good.state == run_pb2.RUN_STATE_SUCCEEDED
        assert (bad.state, bad.failure.kind) == (run_pb2.RUN_STATE_FAILED, errors_pb2.FAILURE_KIND_PAYLOAD)
        assert field in bad.failure.message
        worker.hang_up()

    play(scenario)
    assert not caplog.records


def test_task_fails_when_a_report_raises_and_its_worker_keeps_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> NoReturn:
        raise KeyError("a bug")

    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        for number in (1, 2):
            run_id = await head.run("a")
            (assignment,) = (await worker.hear("assignments")).assignments
            with monkeypatch.context() as patch:
                if number == 1:
                    patch.setattr(worker_reader, "report_to_event", fail)
                await worker.report(number, assignment.lease_id, succeeded=succeeded())
                ended = await head.result(run_id)
            expected = run_pb2.RUN_STATE_FAILED if number == 1 else run_pb2.RUN_STATE_SUCCEEDED
            assert ended.state == expected
            assert number == 2 or ended.failure.kind == errors_pb2.FAILURE_KIND_INTERNAL
        worker.hang_up()

    play(scenario)


def test_code_is_sent_once_and_attempts_end() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        assert welcome.session_id
        assert not welcome.resumed
        run_id = await head.run("a", "b")
        for number, task_id in enumerate("ab", 1):
            work = await worker.hear("assignments")
            (assignment,) = work.assignments
            assert len(work.functions) == (number == 1)
            assert (assignment.attempts[0].task_id, assignment.attempts[0].number) == (task_id, 1)
            await worker.report(number, assignment.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        worker.hang_up()

    play(scenario)


def test_code_a_worker_does_not_have_is_sent_again_when_it_asks() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        work = await worker.next()
        (assignment,), (code,) = work.assignments, work.functions
        await worker.say(unknown_digests=["sha256:of no lease", assignment.function_digest])
        assert list((await worker.hear("functions")).functions) == [code]
        await worker.report(1, assignment.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        worker.hang_up()

    play(scenario)


def test_report_counts_once_when_it_is_repeated() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(1, lease_id, log=worker_pb2.AttemptLog(text="once"))
        await head.until_event(run_id, "task_log")
        worker.hang_up()
        again, resumed = await head.worker(session_id=welcome.session_id, held_lease_ids=[lease_id])
        assert resumed.resumed
        assert not resumed.drop_lease_ids
        await again.report(1, lease_id, log=worker_pb2.AttemptLog(text="once"))
        await again.report(2, lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        watch = head.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
        kinds = [event.WhichOneof("event") async for response in watch for event in response.events]
        assert kinds == ["run_started", "task_started", "task_log", "task_succeeded", "run_finished"]
        again.hang_up()

    play(scenario)


def test_runs_are_distinct_when_two_tenants_use_one_id() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker(capacity=resources_pb2.Capacity(cpu=2, slots=2))
        for tenant in ("one", "two"):
            request = workflow_pb2.RunWorkflowRequest(run_id="same", workflow=graph(task("a")), tenant=tenant)
            assert (await head.workflows.RunWorkflow(request)).created
        found: list[worker_pb2.Assignment] = []
        while len(found) < 2:
            found += (await worker.hear("assignments")).assignments
        assert [(a.tenant, a.attempts[0].run_id) for a in found] == [("one", "same"), ("two", "same")]
        await worker.report(1, found[1].lease_id, succeeded=succeeded())
        ended: list[str] = []
        while not ended:
            runs = (await head.workflows.ListRuns(workflow_pb2.ListRunsRequest())).runs
            ended = [run.tenant for run in runs if run.state == run_pb2.RUN_STATE_SUCCEEDED]
        assert ended == ["two"]
        worker.hang_up()

    play(scenario)


def test_an_assignment_lost_with_its_stream_is_sent_again() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        worker.hang_up()
        again, resumed = await head.worker(session_id=welcome.session_id)
        assert resumed.resumed
        work = await again.hear("assignments")
        assert [(a.lease_id, a.attempts[0].number) for a in work.assignments] == [(lease_id, 1)]
        assert len(work.functions) == 1, "the code as well: it may have been lost too"
        await again.report(1, lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        again.hang_up()

    play(scenario)


def test_a_cancellation_while_the_worker_is_away_reaches_it_when_it_is_back() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(1, lease_id, started={})
        await head.until_event(run_id, "task_started")
        worker.hang_up()
        await head.until(cluster_pb2.NODE_STATE_DETACHED)
        await head.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id))
        again, _ = await head.worker(session_id=welcome.session_id, held_lease_ids=[lease_id])
        assert list((await again.hear("stop_lease_ids")).stop_lease_ids) == [lease_id]
        again.hang_up()

    play(scenario)


def test_unknown_leases_are_dropped_when_a_worker_connects() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        worker.hang_up()
        await head.until(cluster_pb2.NODE_STATE_DETACHED)
        again, resumed = await head.worker(session_id=welcome.session_id, held_lease_ids=["stale"])
        assert list(resumed.drop_lease_ids) == ["stale"]
        other, fresh = await head.worker(worker_id="x", node_id="x", session_id="unknown", held_lease_ids=["stale"])
        assert not fresh.resumed
        assert list(fresh.drop_lease_ids) == ["stale"]
        again.hang_up()
        other.hang_up()

    play(scenario)


def test_reports_are_acknowledged_in_time() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        for number in range(1, 101):
            await worker.report(number, lease_id, log=worker_pb2.AttemptLog(text="x"))
        last = 0
        while last < 50:
            sequence = (await worker.hear("acknowledged_sequence")).acknowledged_sequence
            assert last < sequence <= 100
            last = sequence
        await head.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id))
        worker.hang_up()

    play(scenario)


@pytest.mark.parametrize("skew_s", [-3600, 0, 3600])
def test_times_are_the_server_s_when_the_worker_s_clock_is_another(skew_s: int) -> None:
    def here(ago_s: float) -> Timestamp:
        """Return a time on the worker's clock."""
        time_ns = int((time.time() + skew_s - ago_s) * 1e9)
        return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)

    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker(send_time=here(0.0))
        began_s = time.time()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await asyncio.sleep(0.3)
        done = worker_pb2.AttemptSucceeded(outputs=succeeded().outputs, duration=Duration(nanos=100_000_000))
        await worker.report(1, lease_id, time=here(0.1), succeeded=done)
        await head.result(run_id)
        request = task_pb2.GetTaskRequest(run_id=run_id, task_id="a")
        found = (await task_pb2_grpc.TaskServiceStub(head.channel).GetTask(request)).task
        start_s, end_s = found.start_time.ToNanoseconds() / 1e9, found.end_time.ToNanoseconds() / 1e9
        assert end_s - start_s == pytest.approx(0.1, abs=0.001)
        assert began_s <= start_s < end_s <= time.time()
        worker.hang_up()

    play(scenario)


def test_a_report_of_a_lease_no_longer_held_is_ignored() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        lease_id = (await worker.hear("assignments")).assignments[0].lease_id
        await worker.report(1, "another", succeeded=succeeded())
        await worker.report(2, lease_id, succeeded=succeeded())
        await worker.report(3, lease_id, failed={"failure": {"message": "late"}})
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        worker.hang_up()

    play(scenario)
