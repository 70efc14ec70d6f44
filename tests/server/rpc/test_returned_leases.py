"""Leases that a worker gives back over its stream."""

from lattice.v1 import errors_pb2, results_pb2, run_pb2, worker_pb2

from tests.server.rpc.scripted_worker import Scene, play, succeeded

REASON = "the process it shared with other async tasks exited with status 3"


def test_a_lease_returned_after_its_start_runs_again_with_the_reason_in_an_event() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        for number in range(1, 6):
            (work,) = (await worker.hear("assignments")).assignments
            assert work.attempts[0].number == number, "nothing limits how often"
            if number == 5:
                break
            await worker.report(2 * number - 1, work.lease_id, started=worker_pb2.AttemptStarted())
            await worker.report(2 * number, work.lease_id, returned=worker_pb2.LeaseReturned(reason=REASON))
        await worker.report(9, work.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        watch = head.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
        events = [event async for response in watch for event in response.events]
        retries = [(event, event.task_retrying) for event in events if event.HasField("task_retrying")]
        assert {(retry.failure.kind, retry.failure.message) for _, retry in retries} == {
            (errors_pb2.FAILURE_KIND_WORKER_LOST, REASON)
        }
        assert len(retries) == 4
        waits = [retry.retry_time.ToNanoseconds() - event.time.ToNanoseconds() for event, retry in retries]
        assert all(abs(wait) < 1e6 for wait in waits), "no backoff"
        worker.hang_up()

    play(scenario)


def test_a_lease_returned_before_its_start_keeps_its_number_and_gives_no_event() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker()
        run_id = await head.run("a")
        (first,) = (await worker.hear("assignments")).assignments
        await worker.report(1, first.lease_id, returned=worker_pb2.LeaseReturned())
        (second,) = (await worker.hear("assignments")).assignments
        assert (second.lease_id != first.lease_id, second.attempts[0].number) == (True, 1)
        await worker.report(2, second.lease_id, succeeded=succeeded())
        await head.result(run_id)
        watch = head.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
        kinds = [event.WhichOneof("event") async for response in watch for event in response.events]
        assert kinds == ["run_started", "task_started", "task_succeeded", "run_finished"]
        worker.hang_up()

    play(scenario)
