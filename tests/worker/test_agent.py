"""A real worker on its stream: revoking, resuming a session, losing one, hanging up."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from lattice.v1 import errors_pb2, payload_pb2, resources_pb2, worker_pb2

from tests.e2e.proxy import Gate
from tests.worker.head import TIMEOUT_S, Pair, pair
from tests.worker.shared import SharedWorker

pytestmark = pytest.mark.slow


def play(scenario: Callable[[Pair], Coroutine[Any, Any, None]], folder: Path, *flags: str) -> None:
    """Play a scenario with a worker."""

    async def scene() -> None:
        async with pair(folder, *flags) as both, asyncio.timeout(TIMEOUT_S):
            await scenario(both)

    asyncio.run(scene())


def wait_at(gate: str) -> str:
    with open(gate, "rb", buffering=0) as file:
        file.read(1)
    return "through"


def fail_at_length() -> None:
    raise ValueError("x" * 5_000_000)


def spawn_at_length(gate: str) -> None:
    from lattice_worker import context

    context.spawn(len, {f"x{number}": "x" * 90_000 for number in range(60)})
    with open(gate, "rb", buffering=0) as file:
        file.read(1)


def by_value(function: Any) -> Any:
    """Return a function that travels whole: runners cannot import this module."""
    return type(function)(function.__code__, {"__builtins__": __builtins__}, function.__name__)


@pytest.fixture
def gate(tmp_path: Path) -> Any:
    """A gate for attempts."""
    made = Gate(tmp_path, "only")
    yield made
    made.open(100)
    made.close()


def test_a_worker_introduces_itself(tmp_path: Path) -> None:
    async def scenario(both: Pair) -> None:
        hello = both.hello
        assert (hello.worker_id, hello.node_id, hello.session_id) == ("w", "n", "")
        assert (both.stream.credentials, hello.pid) == ("Bearer secret", both.process.pid)
        assert (hello.capacity.cpu, list(hello.capacity.gpus), list(hello.held_lease_ids)) == (2, [], [])

    play(scenario, tmp_path)


def test_a_waiting_lease_is_returned_when_it_is_revoked(gate: Gate, worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        stream, wait = both.stream, by_value(wait_at)
        for name in "abc":
            stream.assign(name, wait, inputs={"gate": gate.path})
        await stream.until("a", "started")
        stream.say(revoke_lease_ids=["a", "b", "unknown"])
        assert (await stream.end("b")).WhichOneof("fact") == "returned"
        gate.open(2)
        assert await stream.value("a") == "through"
        assert await stream.value("c") == "through"
        assert stream.of("b") == ["returned"]

    worker.play(scenario)


def test_a_waiting_lease_is_cancelled_when_it_is_stopped(gate: Gate, worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        stream, wait = both.stream, by_value(wait_at)
        for name in "ab":
            stream.assign(name, wait, inputs={"gate": gate.path})
        await stream.until("a", "started")
        stream.say(stop_lease_ids=["b"])
        assert (await stream.end("b")).failed.failure.kind == errors_pb2.FAILURE_KIND_CANCELLED
        gate.open()
        assert await stream.value("a") == "through"

    worker.play(scenario)


def test_reports_are_numbered_and_those_not_acknowledged_come_again(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        first = both.stream
        for name in "abc":
            first.assign(name, lambda: None)
        await first.end("c")
        assert [report.sequence for report in first.reports] == list(range(1, len(first.reports) + 1))
        seen = next(report.sequence for report in first.reports if report.lease_id == "b")
        first.say(acknowledged_sequence=seen)
        first.drop()
        second, hello = await both.head.dialled()
        assert (hello.session_id, hello.worker_id) == ("s1", "w")
        second.welcome(resumed=True)
        await second.end("c")
        assert second.reports == first.reports[seen:]

    worker.play(scenario)


def test_reports_that_add_up_to_more_than_a_message_come_in_several(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        both.stream.drop()
        second, _ = await both.head.dialled()
        second.welcome(resumed=True, inline_limit_bytes=300_000)
        for number in range(30):  # more than gRPC accepts in one message by default
            second.assign(f"{number}", lambda: "x" * 200_000)
        await second.end("29")
        second.drop()
        third, _ = await both.head.dialled()
        third.welcome(resumed=True)
        await third.end("29")
        assert third.reports == second.reports

    worker.play(scenario)


def test_an_attempt_whose_end_no_message_holds_has_failed(tmp_path: Path) -> None:
    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("items", lambda: ["x" * 90_000] * 60, split_outputs=["out"])
        failure = (await stream.end("items")).failed.failure
        assert failure.kind == errors_pb2.FAILURE_KIND_PAYLOAD
        assert "return fewer items" in failure.message
        stream.assign("text", by_value(fail_at_length))
        failure = (await stream.end("text")).failed.failure
        assert failure.kind == errors_pb2.FAILURE_KIND_USER_ERROR
        assert len(failure.SerializeToString()) < 128 * 1024
        assert "characters left out" in failure.message
        stream.assign("next", lambda: "here still")
        assert await stream.value("next") == "here still"
        assert not [path for path in tmp_path.iterdir() if path.is_file()], "nobody will ask for what it returned"

    play(scenario, tmp_path)


def test_a_successor_does_not_run_when_the_outputs_before_it_fit_in_no_message(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        first = payload_pb2.Binding(output=payload_pb2.OutputRef(task_id="first", output="out"))
        both.stream.assign("first", lambda: ["x" * 90_000] * 60, split_outputs=["out"])
        both.stream.assign("second", lambda x: x[0], bindings={"x": first}, after_lease_id="first")
        assert (await both.stream.end("first")).WhichOneof("fact") == "failed"
        assert (await both.stream.end("second")).WhichOneof("fact") == "returned"

    worker.play(scenario)


def test_an_attempt_fails_when_a_task_it_spawns_fits_in_no_message(gate: Gate, worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        both.stream.assign("parent", by_value(spawn_at_length), inputs={"gate": gate.path})
        failure = (await both.stream.end("parent")).failed.failure
        assert failure.kind == errors_pb2.FAILURE_KIND_PAYLOAD
        assert "give it fewer inputs" in failure.message
        both.stream.assign("next", lambda: "in the same slot")
        assert await both.stream.value("next") == "in the same slot"

    worker.play(scenario)


def test_a_worker_runs_its_leases_when_its_session_is_resumed(gate: Gate, worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        for name in "ab":
            both.stream.assign(name, by_value(wait_at), inputs={"gate": gate.path})
        await both.stream.until("a", "started")
        both.stream.drop()
        second, hello = await both.head.dialled()
        assert list(hello.held_lease_ids) == ["a", "b"]
        second.welcome(resumed=True)
        second.say(acknowledged_sequence=1)
        gate.open(2)
        assert await second.value("a") == "through"
        assert await second.value("b") == "through"

    worker.play(scenario)


def test_a_lease_whose_end_was_lost_on_the_way_is_not_run_twice(tmp_path: Path, worker: SharedWorker) -> None:
    journal = tmp_path / "journal"

    def note(path: str) -> None:
        with open(path, "a") as file:
            file.write("ran\n")

    async def scenario(both: Pair) -> None:
        assignment = both.stream.assign("a", note, inputs={"path": str(journal)})
        await both.stream.end("a")
        both.stream.drop()
        second, hello = await both.head.dialled()
        second.welcome(resumed=True)
        if "a" not in hello.held_lease_ids:
            # A head that has no report of the lease takes its assignment for lost.
            second.say(assignments=[assignment])
        second.assign("next in the slot", lambda: None)
        await second.end("next in the slot")
        assert journal.read_text() == "ran\n"

    worker.play(scenario)


def test_a_worker_drops_its_leases_when_its_session_is_lost(gate: Gate, worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        for name in "ab":
            both.stream.assign(name, by_value(wait_at), inputs={"gate": gate.path})
        await both.stream.until("a", "started")
        both.stream.drop()
        second, _ = await both.head.dialled()
        second.welcome("s2", resumed=False)
        second.assign("c", lambda: "fresh")
        assert await second.value("c") == "fresh"
        assert {report.lease_id for report in second.reports} == {"c"}
        second.drop()
        third, hello = await both.head.dialled()
        assert hello.session_id == "s2"
        third.welcome(resumed=True)

    worker.play(scenario)


def test_leases_the_head_does_not_know_are_dropped(gate: Gate, worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        for slot, name in enumerate("ab"):
            both.stream.assign(name, by_value(wait_at), slot=slot, inputs={"gate": gate.path})
        await both.stream.until("b", "started")
        both.stream.drop()
        second, _ = await both.head.dialled()
        second.welcome(resumed=True, drop=("a",))
        second.assign("c", lambda: "free", slot=0)
        assert await second.value("c") == "free"

    worker.play(scenario)


EXHAUSTIVE = pytest.mark.exhaustive
DRAINED, SHUTDOWN = worker_pb2.CLOSE_REASON_DRAINED, worker_pb2.CLOSE_REASON_SHUTDOWN
OF_ANOTHER_VERSION = 1000


# The worker treats the other reasons alike, and each takes a worker.
OTHERS = sorted({*worker_pb2.CloseReason.values()} - {SHUTDOWN, DRAINED})


@pytest.mark.parametrize(
    "reason", [DRAINED, OF_ANOTHER_VERSION, OTHERS[-1], *(pytest.param(one, marks=EXHAUSTIVE) for one in OTHERS[:-1])]
)
def test_a_worker_that_is_closed_for_good_ends(reason: int, tmp_path: Path) -> None:
    async def scenario(both: Pair) -> None:
        both.stream.say(close={"reason": reason, "message": "so it is"})
        assert await both.process.wait() == (0 if reason == DRAINED else 1)

    play(scenario, tmp_path)


def test_a_worker_comes_back_to_a_head_that_stopped_unless_told_otherwise(tmp_path: Path) -> None:
    close = worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_SHUTDOWN)

    async def scenario(both: Pair) -> None:
        both.stream.say(close=close)
        second, hello = await both.head.dialled()
        assert hello.session_id == "s1"
        second.welcome("s2")

    async def last(both: Pair) -> None:
        both.stream.say(close=close)
        assert await both.process.wait() == 0

    play(scenario, tmp_path)
    play(last, tmp_path, "--exit-on-close")


def test_a_spawned_task_needs_the_python_of_its_parent_when_its_pickle_holds_code(worker: SharedWorker) -> None:
    def spawns() -> None:
        from lattice_worker import context

        context.spawn(len, {"it": ""}, name="named")
        context.spawn(lambda: 1, name="held")

    async def scenario(both: Pair) -> None:
        both.stream.assign("a", by_value(spawns))
        needs = {}
        for _ in range(2):
            spawned = (await both.stream.until("a", "spawned")).spawned
            needs[spawned.tasks[0].display_name] = spawned.functions[spawned.tasks[0].function].runtime
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        held = resources_pb2.Runtime(language="python", version=here)
        assert needs == {"named": resources_pb2.Runtime(), "held": held}

    worker.play(scenario)


def test_a_lease_waits_for_code_that_was_forgotten_and_asks_for_it(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        stream = both.stream
        first = stream.assign("a", lambda: "known")
        assert await stream.value("a") == "known"
        code = stream.code[first.function_digest]
        stream.say(forget_digests=[code.digest, "sha256:never had"])
        for name in "bc":
            again = worker_pb2.Assignment.FromString(first.SerializeToString())
            again.lease_id = name
            stream.say(assignments=[again])
        assert await stream.asked() == [code.digest]
        stream.drop()
        second, hello = await both.head.dialled()
        assert {"b", "c"} <= set(hello.held_lease_ids)
        second.welcome(resumed=True)
        assert await second.asked() == [code.digest], "the answer may have been lost with the stream"
        second.say(functions=[code])
        assert [await second.value(name) for name in "bc"] == ["known", "known"]

    worker.play(scenario)


def test_a_lease_that_waits_for_its_code_can_be_cancelled(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        stream = both.stream
        first = stream.assign("a", lambda: "known")
        await stream.value("a")
        first.lease_id = "b"
        stream.say(forget_digests=[first.function_digest], assignments=[])
        stream.say(assignments=[first])
        await stream.asked()
        stream.say(stop_lease_ids=["b"])
        assert (await stream.end("b")).failed.failure.kind == errors_pb2.FAILURE_KIND_CANCELLED
        stream.assign("c", lambda: "free")
        assert await stream.value("c") == "free"

    worker.play(scenario)


@pytest.mark.parametrize("is_async", [False, True])
def test_code_that_a_call_needs_is_forgotten_when_the_call_is_over(
    is_async: bool, gate: Gate, worker: SharedWorker
) -> None:
    async def wait_async(gate: str) -> str:
        import asyncio

        return await asyncio.to_thread(lambda: open(gate, "rb", buffering=0).read(1) and "through")

    async def scenario(both: Pair) -> None:
        stream = both.stream
        wait = by_value(wait_at) if not is_async else wait_async
        first = stream.assign("a", wait, is_async=is_async, inputs={"gate": gate.path})
        await stream.until("a", "started")
        stream.say(forget_digests=[first.function_digest])
        gate.open()
        assert await stream.value("a") == "through"
        code = stream.code[first.function_digest]
        first.lease_id = "b"
        stream.say(functions=[code], assignments=[first])
        gate.open()
        assert await stream.value("b") == "through"

    worker.play(scenario)
