"""Messages to workers: assignments and code are split by size."""

import hashlib
import json

from lattice.v1 import (
    errors_pb2,
    payload_pb2,
    resources_pb2,
    results_pb2,
    run_pb2,
    task_pb2,
    worker_pb2,
    workflow_pb2,
)

from tests.server.rpc.callers import CODE, graph, output, task, value
from tests.server.rpc.scripted_worker import Report, Scene, ScriptedWorker, play, succeeded

TEXT = json.dumps("x" * 200_000)
TEXTS = 30  # together more than gRPC accepts in one message by default
MANY = resources_pb2.Capacity(cpu=TEXTS, slots=TEXTS)


async def taken(worker: ScriptedWorker, count: int) -> list[worker_pb2.Assignment]:
    """Return the next so many leases."""
    found: list[worker_pb2.Assignment] = []
    while len(found) < count:
        found += (await worker.hear("assignments")).assignments
    return found


async def given(head: Scene, *specs: task_pb2.TaskSpec) -> str:
    """Start a run of tasks that may need what task `source` makes."""
    spec = graph(task("source"), *specs)
    return (await head.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))).run.run_id


def made() -> worker_pb2.AttemptSucceeded:
    return worker_pb2.AttemptSucceeded(outputs={"out": payload_pb2.Payload(json=TEXT)})


def test_assignments_and_events_are_split_when_they_exceed_a_message() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker(capacity=MANY)
        run_id = await given(head, *(task(f"t{n}", inputs={"x": output("source")}) for n in range(TEXTS)))
        (source,) = await taken(worker, 1)
        await worker.report(1, source.lease_id, succeeded=made())
        leases = await taken(worker, TEXTS)
        assert {lease.attempts[0].task_id for lease in leases} == {f"t{n}" for n in range(TEXTS)}
        assert all(lease.attempts[0].inputs["x"].payload.json == TEXT for lease in leases)
        for number, lease in enumerate(leases, 2):
            await worker.report(number, lease.lease_id, succeeded=made())
        watch = head.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
        responses = [response async for response in watch]
        events = [event for response in responses for event in response.events]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert sum(event.HasField("task_succeeded") for event in events) == TEXTS + 1
        assert [response.sequence for response in responses] == [r.events[-1].sequence for r in responses]
        assert [response.complete for response in responses][-2:] == [False, True]
        worker.hang_up()

    play(scenario)


def test_code_is_sent_no_later_than_its_use_in_messages_of_a_size() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker(capacity=MANY)
        names = [f"f{n}" for n in range(5)]
        spec = graph(*(task(name, function=name, inputs={"x": value(TEXT)}) for name in names))
        zipped = b"x" * 3_000_000
        bundle = task_pb2.CodeBundle(digest=f"sha256:{hashlib.sha256(zipped).hexdigest()}", zip=zipped)
        spec.bundles.append(bundle)
        for name in names:
            source = task_pb2.PythonSource(code=f"{CODE}#{name}{'#' * 1_900_000}", name="work")
            code = task_pb2.Function(python={"source": source}, bundle_digest=bundle.digest)
            spec.functions[name].CopyFrom(code)
        await head.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))
        known: list[str] = []
        held = 0
        while held < len(names):
            work = await worker.next()
            if not work.ByteSize():
                continue  # A heartbeat.
            known += [code.digest for code in (*work.functions, *work.bundles)]
            assert {bundle.digest, *(lease.function_digest for lease in work.assignments)}.issubset(known)
            held += len(work.assignments)
        assert len(known) == len(set(known)) == len(names) + 1
        worker.hang_up()

    play(scenario)


def test_task_fails_when_its_inputs_exceed_a_message() -> None:
    async def scenario(head: Scene) -> None:
        worker, welcome = await head.worker()
        assert welcome.message_limit_bytes == 2**20
        items = payload_pb2.BindingList(items=[output("source")] * 6)
        run_id = await given(head, task("t", inputs={"x": payload_pb2.Binding(list=items)}))
        (source,) = await taken(worker, 1)
        await worker.report(1, source.lease_id, succeeded=made())
        ended = await head.result(run_id)
        assert (ended.state, ended.failure.kind) == (run_pb2.RUN_STATE_FAILED, errors_pb2.FAILURE_KIND_PAYLOAD)
        assert "a message to a worker may have" in ended.failure.message
        assert "pass fewer or smaller values inline" in ended.failure.message
        next_id = await head.run("next")
        (work,) = await taken(worker, 1)
        await worker.report(2, work.lease_id, succeeded=succeeded())
        assert (await head.result(next_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        worker.hang_up()

    play(scenario, worker_message_limit_bytes=2**20)


def test_batch_is_halved_when_its_inputs_exceed_a_message() -> None:
    async def scenario(head: Scene) -> None:
        worker, _ = await head.worker(capacity=MANY)
        batch = task_pb2.BatchPolicy(max_size=6)
        specs = (task(f"t{n}", inputs={"x": output("source")}, batch=batch) for n in range(6))
        run_id = await given(head, *specs)
        (source,) = await taken(worker, 1)
        await worker.report(1, source.lease_id, succeeded=made())
        number = 1
        for lease in await taken(worker, 2):
            assert len(lease.attempts) == 3
            reports = []
            for item in range(3):
                number += 1
                reports.append(Report(sequence=number, lease_id=lease.lease_id, item=item, succeeded=succeeded()))
            await worker.say(reports=reports)
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        worker.hang_up()

    play(scenario, worker_message_limit_bytes=2**20)
