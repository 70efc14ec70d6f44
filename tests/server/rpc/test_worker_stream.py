"""The workers' stream: admission, repetition after a break, and fencing of leases."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    errors_pb2,
    payload_pb2,
    resources_pb2,
    results_pb2,
    results_pb2_grpc,
    run_pb2,
    task_pb2,
    task_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
    workflow_pb2,
    workflow_pb2_grpc,
)

from lattice_server import __version__
from lattice_server.engine.ports import Executor
from tests.server.apps import NoWorkers, serving
from tests.server.rpc.callers import CODE, function, graph, output, task, value

TIMEOUT_S = 60.0
Report = worker_pb2.Report


class Hand:
    """A worker whose every word a test chooses."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = worker_pb2_grpc.WorkerServiceStub(channel).Connect()
        self._heard: list[tuple[worker_pb2.ConnectResponse, set[str]]] = []

    async def say(self, **message: Any) -> None:
        """Send one message."""
        await self._call.write(worker_pb2.ConnectRequest(**message))

    async def hear(self, field: str) -> Any:
        """Return the next message that has a field, or that field where it is one message; without a name, the next
        message that has none. Other fields are kept for later."""
        while True:
            for response, fields in self._heard:
                if field in fields:
                    fields.remove(field)
                    found = getattr(response, field, None)
                    return found if isinstance(found, Message) else response
            response = await self.next()
            self._heard.append((response, {known.name for known, _ in response.ListFields()} or {""}))

    async def next(self) -> worker_pb2.ConnectResponse:
        """Return the next message that nothing has been read of."""
        response = await self._call.read()
        assert isinstance(response, worker_pb2.ConnectResponse), "the stream ended"
        return response

    async def report(self, sequence: int, lease_id: str, **fact: Any) -> None:
        """Send one report."""
        report = Report(sequence=sequence, lease_id=lease_id, **fact)
        await self.say(reports=[report])

    def hang_up(self) -> None:
        """Break the stream."""
        self._call.cancel()


class Searched(NoWorkers):
    """An executor that has lost a worker."""

    given_up = frozenset({"lost"})


class Scene:
    """A head without workers of its own, and a channel to it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.workflows = workflow_pb2_grpc.WorkflowServiceStub(channel)
        self.results = results_pb2_grpc.ResultsServiceStub(channel)
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        self.workers = worker_pb2_grpc.WorkerServiceStub(channel)

    def hello(self, **more: Any) -> worker_pb2.Hello:
        """Return the greeting of a worker of one CPU."""
        capacity = resources_pb2.Capacity(cpu=1, slots=1)
        known = {"worker_id": "w", "node_id": "n", "capacity": capacity, "protocol_version": 1}
        return worker_pb2.Hello(**known | {"isolations": [resources_pb2.ISOLATION_NONE]} | more)

    async def hand(self, **hello: Any) -> tuple[Hand, worker_pb2.Welcome]:
        """Connect a worker."""
        hand = Hand(self.channel)
        await hand.say(hello=self.hello(**hello))
        return hand, await hand.hear("welcome")

    async def run(self, *task_ids: str) -> str:
        """Start a run."""
        spec = graph(*(task(task_id) for task_id in task_ids))
        return (await self.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))).run.run_id

    async def result(self, run_id: str, wait_s: int = 60) -> run_pb2.Run:
        """Wait for the end of a run."""
        request = results_pb2.GetResultRequest(run_id=run_id, wait=Duration(seconds=wait_s))
        return (await self.results.GetResult(request)).run

    async def until_event(self, run_id: str, kind: str) -> None:
        """Wait until a run has an event of a kind: then the server has processed all earlier reports."""
        call = self.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
        async for response in call:
            if any(event.WhichOneof("event") == kind for event in response.events):
                call.cancel()
                return

    async def until(self, state: cluster_pb2.NodeState.ValueType) -> None:
        """Wait until the only node is in a state."""
        while [node.state for node in (await self.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes] != [state]:
            await asyncio.sleep(0.01)

    async def until_states(self, **states: cluster_pb2.NodeState.ValueType) -> None:
        """Wait until the nodes are in these states."""
        request = cluster_pb2.ListNodesRequest()
        while {node.node_id: node.state for node in (await self.cluster.ListNodes(request)).nodes} != states:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def on_stage(executor: Executor, **settings: Any) -> AsyncIterator[Scene]:
    """A head while the block runs."""
    async with serving(executor, **settings) as app, grpc.aio.insecure_channel(app.address) as channel:
        yield Scene(channel)


def play(
    scenario: Callable[[Scene], Coroutine[Any, Any, None]], executor: Executor | None = None, **settings: Any
) -> None:
    """Play a scenario with a head."""

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT_S), on_stage(executor or Searched(), **settings) as head:
            await scenario(head)

    asyncio.run(run())


def succeeded() -> worker_pb2.AttemptSucceeded:
    return worker_pb2.AttemptSucceeded(outputs={"out": payload_pb2.Payload(json="1")})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"hello": {"node_id": "n", "protocol_version": 1}}, "PROTOCOL_ERROR"),
        ({"hello": {"worker_id": "w", "protocol_version": 1}}, "PROTOCOL_ERROR"),
        ({"heartbeat": {}}, "PROTOCOL_ERROR"),
        ({"reports": [{}]}, "PROTOCOL_ERROR"),
        ({}, "PROTOCOL_ERROR"),
        ({"hello": {"worker_id": "lost", "node_id": "n", "protocol_version": 1}}, "LOST"),
    ],
)
def test_stream_is_closed_with_a_reason_when_the_opening_is_refused(message: dict[str, Any], reason: str) -> None:
    async def scenario(head: Scene) -> None:
        hand = Hand(head.channel)
        await hand.say(**message)
        assert (await hand.hear("close")).reason == worker_pb2.CloseReason.Value(f"CLOSE_REASON_{reason}")
        assert not (await head.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes
        hand.hang_up()

    play(scenario)


@pytest.mark.parametrize("kind", ["hello", "join"])
def test_stream_is_closed_when_a_worker_has_another_protocol_version(kind: str) -> None:
    async def scenario(head: Scene) -> None:
        hand = Hand(head.channel)
        named = {"node_id": "n"} | ({"worker_id": "w"} if kind == "hello" else {})
        await hand.say(**{kind: {"version": "9.8.7", "protocol_version": 2, **named}})
        close = await hand.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_VERSION
        assert "version 9.8.7 and speaks protocol 2" in close.message
        assert f"version {__version__} and speaks protocol 1" in close.message
        hand.hang_up()

    play(scenario)


@pytest.mark.parametrize("is_welcome", [False, True])
def test_stream_is_closed_with_a_reason_when_a_message_cannot_be_decoded(
    is_welcome: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(head: Scene) -> None:
        call = head.channel.stream_stream("/lattice.v1.WorkerService/Connect")()
        if is_welcome:
            await call.write(worker_pb2.ConnectRequest(hello=head.hello()).SerializeToString())
            assert worker_pb2.ConnectResponse.FromString(await call.read()).HasField("welcome")
        await call.write(b"\xff")
        close = worker_pb2.ConnectResponse.FromString(await call.read()).close
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert "ConnectRequest" in close.message
        call.cancel()

    play(scenario)
    assert not caplog.records


NAN = float("nan")
GPUS = {"gpus": [{"index": 0}, {"index": 0}]}


@pytest.mark.parametrize(
    ("offer", "field"),
    [
        ({"node_id": "n" * 129}, "node_id"),
        ({"node_id": "a\nb"}, "node_id"),
        ({"node_id": "\x1b[2J"}, "node_id"),
        ({"node_id": "head"}, "node_id"),
        ({"capacity": {"cpu": NAN}}, "capacity.cpu"),
        ({"capacity": {"cpu": float("inf")}}, "capacity.cpu"),
        ({"capacity": {"cpu": -1}}, "capacity.cpu"),
        ({"capacity": {"memory_bytes": -1}}, "capacity.memory_bytes"),
        ({"capacity": {"slots": -1}}, "capacity.slots"),
        ({"capacity": {"async_slots": -1}}, "capacity.async_slots"),
        ({"capacity": GPUS}, "capacity.gpus[1].index"),
        ({"capacity": {"gpus": [{"index": -1}]}}, "capacity.gpus[0].index"),
        ({"capacity": {"gpus": [{"memory_bytes": -1}]}}, "capacity.gpus[0].memory_bytes"),
        ({"capacity": {"gpus": [{"model": "m" * 257}]}}, "capacity.gpus[0].model"),
        ({"capacity": {"gpus": [{"index": index} for index in range(1025)]}}, "capacity.gpus"),
        ({"capacity": {"cpu": 1e6}}, "capacity.cpu"),
        ({"capacity": {"memory_bytes": (1 << 60) + 1}}, "capacity.memory_bytes"),
        ({"capacity": {"slots": (1 << 23) + 1}}, "capacity.slots"),
        ({"labels": {str(number): "" for number in range(257)}}, "labels"),
        ({"labels": {"a": "v" * 257}}, "labels"),
        ({"labels": {"\x1b[2J": "v"}}, "labels"),
        ({"hostname": "h" * 257}, "hostname"),
        ({"node_ip": "\n"}, "node_ip"),
    ],
)
@pytest.mark.parametrize("kind", ["hello", "join"])
def test_offer_is_refused_by_its_field_when_it_is_malformed(kind: str, offer: dict[str, Any], field: str) -> None:
    async def scenario(head: Scene) -> None:
        hand = Hand(head.channel)
        named = {"node_id": "n", "protocol_version": 1} | ({"worker_id": "w"} if kind == "hello" else {})
        await hand.say(**{kind: named | offer})
        close = await hand.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert close.message.startswith(f"{kind}.{field}: ")
        assert not (await head.cluster.ListNodes(cluster_pb2.ListNodesRequest())).nodes
        hand.hang_up()

    play(scenario)


@pytest.mark.parametrize(
    ("claim", "field"),
    [
        ({"entrypoints": [f"e{number}" for number in range(10_001)]}, "entrypoints"),
        ({"entrypoints": ["e" * 257]}, "entrypoints[0]"),
        ({"stored_artifact_ids": ["", "a" * 257]}, "stored_artifact_ids[1]"),
        ({"reported_artifact_ids": ["a"] * 1_000_001}, "reported_artifact_ids"),
        ({"held_lease_ids": ["l" * 257]}, "held_lease_ids[0]"),
        ({"session_id": "s" * 257}, "session_id"),
        ({"runtime": {"language": "p" * 257}}, "runtime.language"),
        ({"worker_id": "a\nb"}, "worker_id"),
    ],
)
def test_offer_is_refused_by_its_field_when_it_exceeds_a_limit(claim: dict[str, Any], field: str) -> None:
    async def scenario(head: Scene) -> None:
        hand = Hand(head.channel)
        await hand.say(hello={"node_id": "n", "protocol_version": 1, "worker_id": "w"} | claim)
        close = await hand.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert close.message.startswith(f"hello.{field}: ")
        hand.hang_up()

    play(scenario)


def test_stream_ends_when_a_heartbeat_exceeds_a_limit() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        await hand.say(heartbeat={"held_lease_ids": ["l" * 257]})
        close = await hand.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_PROTOCOL_ERROR
        assert close.message.startswith("heartbeat.held_lease_ids[0]: ")
        hand.hang_up()

    play(scenario)


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
        hand, _ = await head.hand(capacity=resources_pb2.Capacity(cpu=2, slots=2))
        run_ids = [await head.run("a"), await head.run("a")]
        lease_ids: list[str] = []
        while len(lease_ids) < 2:
            lease_ids += [assigned.lease_id for assigned in (await hand.hear("assignments")).assignments]
        unreadable = worker_pb2.AttemptSucceeded(outputs={"out": payload_pb2.Payload(**payload)})
        facts = zip(lease_ids, (succeeded(), unreadable), strict=True)
        reports = [Report(sequence=n, lease_id=lease, succeeded=fact) for n, (lease, fact) in enumerate(facts, 1)]
        await hand.say(reports=reports)
        good, bad = [await head.result(run_id) for run_id in run_ids]
        assert good.state == run_pb2.RUN_STATE_SUCCEEDED
        assert (bad.state, bad.failure.kind) == (run_pb2.RUN_STATE_FAILED, errors_pb2.FAILURE_KIND_PAYLOAD)
        assert field in bad.failure.message
        hand.hang_up()

    play(scenario)
    assert not caplog.records


def test_stream_is_closed_when_a_drain_deadline_is_negative() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        await hand.say(draining={"deadline": Duration(seconds=-1)})
        close = await hand.hear("close")
        assert (close.reason, close.message) == (
            worker_pb2.CLOSE_REASON_PROTOCOL_ERROR,
            "deadline: must not be negative",
        )
        hand.hang_up()

    play(scenario)


def test_drain_deadline_is_at_most_a_month() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        await head.run("a")
        await hand.hear("assignments")
        ages = Duration(seconds=2**63 - 1)
        await head.cluster.DrainNode(cluster_pb2.DrainNodeRequest(node_id="n", deadline=ages))
        assert (await hand.hear("drain")).deadline == Duration(seconds=30 * 24 * 3600)
        await hand.say(draining={"deadline": ages})
        assert (await hand.hear("drain")).deadline == Duration(seconds=30 * 24 * 3600)
        hand.hang_up()

    play(scenario)


def test_code_is_sent_once_and_attempts_end() -> None:
    async def scenario(head: Scene) -> None:
        hand, welcome = await head.hand()
        assert welcome.session_id
        assert not welcome.resumed
        run_id = await head.run("a", "b")
        for number, task_id in enumerate("ab", 1):
            work = await hand.hear("assignments")
            (assignment,) = work.assignments
            assert len(work.functions) == (number == 1)
            assert (assignment.attempts[0].task_id, assignment.attempts[0].number) == (task_id, 1)
            await hand.report(number, assignment.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        hand.hang_up()

    play(scenario)


def test_code_a_worker_does_not_have_is_sent_again_when_it_asks() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        run_id = await head.run("a")
        work = await hand.next()
        (assignment,), (code,) = work.assignments, work.functions
        await hand.say(unknown_digests=["sha256:of no lease", assignment.function_digest])
        assert list((await hand.hear("functions")).functions) == [code]
        await hand.report(1, assignment.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        hand.hang_up()

    play(scenario)


def test_report_counts_once_when_it_is_repeated() -> None:
    async def scenario(head: Scene) -> None:
        hand, welcome = await head.hand()
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        await hand.report(1, lease_id, log=worker_pb2.AttemptLog(text="once"))
        await head.until_event(run_id, "task_log")
        hand.hang_up()
        again, resumed = await head.hand(session_id=welcome.session_id, held_lease_ids=[lease_id])
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
        hand, _ = await head.hand(capacity=resources_pb2.Capacity(cpu=2, slots=2))
        for tenant in ("one", "two"):
            request = workflow_pb2.RunWorkflowRequest(run_id="same", workflow=graph(task("a")), tenant=tenant)
            assert (await head.workflows.RunWorkflow(request)).created
        found: list[worker_pb2.Assignment] = []
        while len(found) < 2:
            found += (await hand.hear("assignments")).assignments
        assert [(a.tenant, a.attempts[0].run_id) for a in found] == [("one", "same"), ("two", "same")]
        await hand.report(1, found[1].lease_id, succeeded=succeeded())
        ended: list[str] = []
        while not ended:
            runs = (await head.workflows.ListRuns(workflow_pb2.ListRunsRequest())).runs
            ended = [run.tenant for run in runs if run.state == run_pb2.RUN_STATE_SUCCEEDED]
        assert ended == ["two"]
        hand.hang_up()

    play(scenario)


def test_an_assignment_lost_with_its_stream_is_sent_again() -> None:
    async def scenario(head: Scene) -> None:
        hand, welcome = await head.hand()
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        hand.hang_up()
        again, resumed = await head.hand(session_id=welcome.session_id)
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
        hand, welcome = await head.hand()
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        await hand.report(1, lease_id, started={})
        await head.until_event(run_id, "task_started")
        hand.hang_up()
        await head.until(cluster_pb2.NODE_STATE_DETACHED)
        await head.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id))
        again, _ = await head.hand(session_id=welcome.session_id, held_lease_ids=[lease_id])
        assert list((await again.hear("stop_lease_ids")).stop_lease_ids) == [lease_id]
        again.hang_up()

    play(scenario)


def test_unknown_leases_are_dropped_when_a_worker_connects() -> None:
    async def scenario(head: Scene) -> None:
        hand, welcome = await head.hand()
        hand.hang_up()
        await head.until(cluster_pb2.NODE_STATE_DETACHED)
        again, resumed = await head.hand(session_id=welcome.session_id, held_lease_ids=["stale"])
        assert list(resumed.drop_lease_ids) == ["stale"]
        other, fresh = await head.hand(worker_id="x", node_id="x", session_id="unknown", held_lease_ids=["stale"])
        assert not fresh.resumed
        assert list(fresh.drop_lease_ids) == ["stale"]
        again.hang_up()
        other.hang_up()

    play(scenario)


def test_reports_are_acknowledged_in_time() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        for number in range(1, 101):
            await hand.report(number, lease_id, log=worker_pb2.AttemptLog(text="x"))
        last = 0
        while last < 50:
            sequence = (await hand.hear("acknowledged_sequence")).acknowledged_sequence
            assert last < sequence <= 100
            last = sequence
        await head.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id))
        hand.hang_up()

    play(scenario)


@pytest.mark.parametrize("skew_s", [-3600, 0, 3600])
def test_times_are_the_server_s_when_the_worker_s_clock_is_another(skew_s: int) -> None:
    def here(ago_s: float) -> Timestamp:
        """Return a time on the worker's clock."""
        time_ns = int((time.time() + skew_s - ago_s) * 1e9)
        return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)

    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand(send_time=here(0.0))
        began_s = time.time()
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        await asyncio.sleep(0.3)
        done = worker_pb2.AttemptSucceeded(outputs=succeeded().outputs, duration=Duration(nanos=100_000_000))
        await hand.report(1, lease_id, time=here(0.1), succeeded=done)
        await head.result(run_id)
        request = task_pb2.GetTaskRequest(run_id=run_id, task_id="a")
        found = (await task_pb2_grpc.TaskServiceStub(head.channel).GetTask(request)).task
        start_s, end_s = found.start_time.ToNanoseconds() / 1e9, found.end_time.ToNanoseconds() / 1e9
        assert end_s - start_s == pytest.approx(0.1, abs=0.001)
        assert began_s <= start_s < end_s <= time.time()
        hand.hang_up()

    play(scenario)


def test_a_report_of_a_lease_no_longer_held_is_ignored() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        await hand.report(1, "another", succeeded=succeeded())
        await hand.report(2, lease_id, succeeded=succeeded())
        await hand.report(3, lease_id, failed={"failure": {"message": "late"}})
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        hand.hang_up()

    play(scenario)


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
        hand, _ = await head.hand()

        async def dropped() -> list[str]:
            return list((await hand.hear("drop_artifact_ids")).drop_artifact_ids)

        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        outputs = {"out": large("kept"), "more": large("kept too")}
        await hand.report(1, "another", succeeded={"outputs": {"out": large("stale")}})
        assert await dropped() == ["stale"]
        await hand.report(2, lease_id, succeeded={"outputs": outputs})
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        await hand.report(3, lease_id, succeeded={"split": {"out": {"items": [large("twice")]}}})
        assert await dropped() == ["twice"]
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        await hand.report(4, lease_id, succeeded={"outputs": {"else": large("not what was asked for")}})
        assert await dropped() == ["not what was asked for"]
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_FAILED
        hand.hang_up()

    play(scenario)


def test_unneeded_large_values_are_dropped_when_a_worker_reconnects() -> None:
    """Values of unacknowledged reports are dropped only when the session has ended."""

    async def scenario(head: Scene) -> None:
        hand, welcome = await head.hand(stored_artifact_ids=["older"])
        assert list(welcome.drop_artifact_ids) == ["older"]
        run_id = await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        await hand.report(1, lease_id, succeeded={"outputs": {"out": large("kept")}})
        hand.hang_up()
        await head.result(run_id)
        listed = {"stored_artifact_ids": ["kept", "lost"], "reported_artifact_ids": ["kept", "unsaid"]}
        again, resumed = await head.hand(session_id=welcome.session_id, **listed)
        assert (resumed.resumed, list(resumed.drop_artifact_ids)) == (True, ["lost"])
        again.hang_up()
        other, fresh = await head.hand(**listed)
        assert (fresh.resumed, list(fresh.drop_artifact_ids)) == (False, ["lost", "unsaid"])
        other.hang_up()

    play(scenario)


def test_artifacts_are_dropped_again_when_their_report_is_repeated() -> None:
    async def scenario(head: Scene) -> None:
        hand, welcome = await head.hand()
        stale = {"succeeded": {"outputs": {"out": large("stale")}}}
        await hand.report(1, "unknown", **stale)
        assert list((await hand.hear("drop_artifact_ids")).drop_artifact_ids) == ["stale"]
        hand.hang_up()
        again, _ = await head.hand(session_id=welcome.session_id, reported_artifact_ids=["stale"])
        await again.report(3, "unknown", succeeded={"outputs": {"out": large("after one that is missing")}})
        await again.report(1, "unknown", **stale)
        assert list((await again.hear("drop_artifact_ids")).drop_artifact_ids) == ["stale"]
        again.hang_up()

    play(scenario)


def test_large_input_is_dropped_when_its_spawned_task_is_not_added() -> None:
    """Whether the task is there already, cannot be, or its parent has ended."""

    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()

        async def dropped() -> list[str]:
            return list((await hand.hear("drop_artifact_ids")).drop_artifact_ids)

        await head.run("a")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        await hand.report(1, lease_id, spawned=spawned("kept"))
        await hand.report(2, lease_id, spawned=spawned("again"))
        assert await dropped() == ["again"]
        wrong = spawned("wrong")
        wrong.functions["work"].Clear()
        await hand.report(3, lease_id, spawned=wrong)
        assert await dropped() == ["wrong"]
        await hand.report(4, lease_id, failed={"failure": {"kind": "FAILURE_KIND_CANCELLED"}})
        await hand.report(5, lease_id, spawned=spawned("late"))
        assert await dropped() == ["late"]
        hand.hang_up()

    play(scenario, max_spawn_depth=1)


def test_older_stream_is_closed_when_a_worker_connects_again() -> None:
    async def scenario(head: Scene) -> None:
        older, _ = await head.hand()
        run_id = await head.run("a")
        stale = (await older.hear("assignments")).assignments[0].lease_id
        await older.report(1, stale, started={})
        await head.until_event(run_id, "task_started")
        newer, _ = await head.hand()
        work = (await newer.hear("assignments")).assignments[0]
        assert work.attempts[0].number == 2
        await older.report(2, stale, succeeded=succeeded())
        await newer.report(1, work.lease_id, failed={"failure": {"kind": "FAILURE_KIND_USER_ERROR"}})
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_FAILED, "the older one's word does not count"
        older.hang_up()
        newer.hang_up()

    play(scenario)


def test_close_names_the_other_worker_when_it_takes_the_node() -> None:
    async def scenario(head: Scene) -> None:
        older, _ = await head.hand()
        newer, _ = await head.hand(worker_id="other", hostname="elsewhere")
        close = await older.hear("close")
        assert close.reason == worker_pb2.CLOSE_REASON_SUPERSEDED
        assert close.message == "worker 'other' on host 'elsewhere' serves node 'n' now"
        older.hang_up()
        newer.hang_up()

    play(scenario)


def test_drained_worker_finishes_its_leases_and_is_closed() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        run_id = await head.run("a", "b")
        lease_id = (await hand.hear("assignments")).assignments[0].lease_id
        drained = await head.cluster.DrainNode(cluster_pb2.DrainNodeRequest(node_id="n"))
        assert drained.node.state == cluster_pb2.NODE_STATE_DRAINING
        await hand.report(1, lease_id, succeeded=succeeded())
        assert (await hand.hear("close")).reason == worker_pb2.CLOSE_REASON_DRAINED
        hand.hang_up()
        other, _ = await head.hand(worker_id="other", node_id="other")
        work = (await other.hear("assignments")).assignments[0]
        assert work.attempts[0].task_id == "b"
        await other.report(1, work.lease_id, succeeded=succeeded())
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        other.hang_up()

    play(scenario)


def test_worker_is_closed_when_it_drains_itself() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand()
        await hand.say(draining={})
        assert (await hand.hear("close")).reason == worker_pb2.CLOSE_REASON_DRAINED
        hand.hang_up()

    play(scenario)


ARTIFACT = "ab" * 16
CHUNK = worker_pb2.UploadArtifactRequest(data=b"12345")


async def sending(head: Scene, size_bytes: int = 10, said: int | None = 10) -> tuple[Hand, Any, Any]:
    """Have a worker make a value that stays with it, and a client read it; return the worker, the reading and the
    upload it is asked for, of as many bytes as it says there will be."""
    hand, _ = await head.hand()
    run_id = await head.run("a")
    lease_id = (await hand.hear("assignments")).assignments[0].lease_id
    artifact = payload_pb2.Artifact(artifact_id=ARTIFACT, size_bytes=size_bytes, node_id="n")
    made = payload_pb2.Payload(media_type="application/octet-stream", artifact=artifact)
    await hand.report(1, lease_id, succeeded={"outputs": {"out": made}})
    await head.result(run_id)
    reading = head.artifacts.ReadArtifact(artifact_pb2.ReadArtifactRequest(artifact_id=ARTIFACT))
    transfer_id = (await hand.hear("send_artifacts")).send_artifacts[0].transfer_id
    upload = head.workers.UploadArtifact()
    await upload.write(worker_pb2.UploadArtifactRequest(transfer_id=transfer_id, size_bytes=said))
    return hand, reading, upload


async def read(reading: Any) -> bytes:
    return b"".join([response.data async for response in reading])


def test_artifact_is_read_from_its_worker_through_the_server() -> None:
    async def scenario(head: Scene) -> None:
        hand, reading, upload = await sending(head)
        for _ in range(2):
            await upload.write(CHUNK)
        await upload.done_writing()
        assert await read(reading) == b"1234512345"
        await upload
        hand.hang_up()

    play(scenario)


@pytest.mark.parametrize("said", [10, None])
@pytest.mark.parametrize("ending", ["cancel", "done_writing"])
def test_read_fails_when_the_upload_of_the_worker_breaks(ending: str, said: int | None) -> None:
    async def scenario(head: Scene) -> None:
        hand, reading, upload = await sending(head, said=said)
        await upload.write(CHUNK)
        assert (await reading.read()).data == CHUNK.data
        ended = getattr(upload, ending)()
        if ending == "done_writing":
            await ended
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        hand.hang_up()

    play(scenario)


@pytest.mark.parametrize(("count", "said"), [(1, 5), (3, 15), (3, None)])
def test_read_fails_when_the_worker_sends_another_size(count: int, said: int | None) -> None:
    async def scenario(head: Scene) -> None:
        hand, reading, upload = await sending(head, said=said)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the server may have ended it by then
            for _ in range(count):
                await upload.write(CHUNK)
            await upload.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(reading)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "another number of bytes" in str(caught.value.details())
        hand.hang_up()

    play(scenario)


@pytest.mark.parametrize("count", [0, 100])
def test_an_upload_ends_when_its_reader_has_left(count: int) -> None:
    async def scenario(head: Scene) -> None:
        hand, reading, upload = await sending(head, size_bytes=count * 2**20 + 10, said=count * 2**20 + 10)
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
        hand.hang_up()

    play(scenario)


TEXT = json.dumps("x" * 200_000)
TEXTS = 30  # together more than gRPC accepts in one message by default
MANY = resources_pb2.Capacity(cpu=TEXTS, slots=TEXTS)


async def taken(hand: Hand, count: int) -> list[worker_pb2.Assignment]:
    """Return the next so many leases."""
    found: list[worker_pb2.Assignment] = []
    while len(found) < count:
        found += (await hand.hear("assignments")).assignments
    return found


async def given(head: Scene, *specs: task_pb2.TaskSpec) -> str:
    """Start a run of tasks that may need what task `source` makes."""
    spec = graph(task("source"), *specs)
    return (await head.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec))).run.run_id


def made() -> worker_pb2.AttemptSucceeded:
    return worker_pb2.AttemptSucceeded(outputs={"out": payload_pb2.Payload(json=TEXT)})


def test_assignments_and_events_are_split_when_they_exceed_a_message() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand(capacity=MANY)
        run_id = await given(head, *(task(f"t{n}", inputs={"x": output("source")}) for n in range(TEXTS)))
        (source,) = await taken(hand, 1)
        await hand.report(1, source.lease_id, succeeded=made())
        leases = await taken(hand, TEXTS)
        assert {lease.attempts[0].task_id for lease in leases} == {f"t{n}" for n in range(TEXTS)}
        assert all(lease.attempts[0].inputs["x"].payload.json == TEXT for lease in leases)
        for number, lease in enumerate(leases, 2):
            await hand.report(number, lease.lease_id, succeeded=made())
        watch = head.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))
        responses = [response async for response in watch]
        events = [event for response in responses for event in response.events]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert sum(event.HasField("task_succeeded") for event in events) == TEXTS + 1
        assert [response.sequence for response in responses] == [r.events[-1].sequence for r in responses]
        assert [response.complete for response in responses][-2:] == [False, True]
        hand.hang_up()

    play(scenario)


def test_code_is_sent_no_later_than_its_use_in_messages_of_a_size() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand(capacity=MANY)
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
            work = await hand.next()
            if not work.ByteSize():
                continue  # A heartbeat.
            known += [code.digest for code in (*work.functions, *work.bundles)]
            assert {bundle.digest, *(lease.function_digest for lease in work.assignments)}.issubset(known)
            held += len(work.assignments)
        assert len(known) == len(set(known)) == len(names) + 1
        hand.hang_up()

    play(scenario)


def test_task_fails_when_its_inputs_exceed_a_message() -> None:
    async def scenario(head: Scene) -> None:
        hand, welcome = await head.hand()
        assert welcome.message_limit_bytes == 2**20
        items = payload_pb2.BindingList(items=[output("source")] * 6)
        run_id = await given(head, task("t", inputs={"x": payload_pb2.Binding(list=items)}))
        (source,) = await taken(hand, 1)
        await hand.report(1, source.lease_id, succeeded=made())
        ended = await head.result(run_id)
        assert (ended.state, ended.failure.kind) == (run_pb2.RUN_STATE_FAILED, errors_pb2.FAILURE_KIND_PAYLOAD)
        assert "a message to a worker may have" in ended.failure.message
        assert "pass fewer or smaller values inline" in ended.failure.message
        next_id = await head.run("next")
        (work,) = await taken(hand, 1)
        await hand.report(2, work.lease_id, succeeded=succeeded())
        assert (await head.result(next_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        hand.hang_up()

    play(scenario, worker_message_limit_bytes=2**20)


def test_batch_is_halved_when_its_inputs_exceed_a_message() -> None:
    async def scenario(head: Scene) -> None:
        hand, _ = await head.hand(capacity=MANY)
        batch = task_pb2.BatchPolicy(max_size=6)
        specs = (task(f"t{n}", inputs={"x": output("source")}, batch=batch) for n in range(6))
        run_id = await given(head, *specs)
        (source,) = await taken(hand, 1)
        await hand.report(1, source.lease_id, succeeded=made())
        number = 1
        for lease in await taken(hand, 2):
            assert len(lease.attempts) == 3
            reports = []
            for item in range(3):
                number += 1
                reports.append(Report(sequence=number, lease_id=lease.lease_id, item=item, succeeded=succeeded()))
            await hand.say(reports=reports)
        assert (await head.result(run_id)).state == run_pb2.RUN_STATE_SUCCEEDED
        hand.hang_up()

    play(scenario, worker_message_limit_bytes=2**20)


def test_streams_are_closed_when_the_server_stops() -> None:
    hands: list[Hand] = []

    class Last(NoWorkers):
        async def stop(self) -> None:
            assert (await hands[0].hear("close")).reason == worker_pb2.CLOSE_REASON_SHUTDOWN
            hands[0].hang_up()

    async def scenario() -> None:
        doors = Last()
        async with asyncio.timeout(TIMEOUT_S), serving(doors) as app:
            # Open beyond the server's end: the worker still reads the last word.
            channel = grpc.aio.insecure_channel(app.address)
            hand, _ = await Scene(channel).hand()
            hands.append(hand)
        await channel.close()

    asyncio.run(scenario())
