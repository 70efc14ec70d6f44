"""Leases that are pipelined: they run without waiting for the agent, in order, once each."""

import os
from pathlib import Path
from typing import Any

import pytest
from lattice.v1 import errors_pb2, payload_pb2

from tests.e2e.proxy import Gate
from tests.worker.head import Pair
from tests.worker.shared import SharedWorker

pytestmark = pytest.mark.slow


@pytest.fixture
def gate(tmp_path: Path) -> Any:
    """A gate for attempts."""
    made = Gate(tmp_path, "only")
    yield made
    made.open(100)
    made.close()


def test_a_slot_runs_its_leases_in_order_in_one_process(tmp_path: Path, worker: SharedWorker) -> None:
    def note(path: str, number: int) -> int:
        with open(path, "a") as file:
            file.write(f"{number} ")
        return os.getpid()

    async def scenario(both: Pair) -> None:
        path = tmp_path / "order"
        for number in range(50):
            both.stream.assign(f"l{number}", note, inputs={"path": str(path), "number": number})
        pids = {await both.stream.value(f"l{number}") for number in range(50)}
        assert len(pids) == 1
        assert path.read_text().split() == [str(number) for number in range(50)]

    worker.play(scenario)


def test_pipelined_leases_run_once_elsewhere_when_the_process_crashes(
    gate: Gate, tmp_path: Path, worker: SharedWorker
) -> None:
    def crash(gate: str) -> None:
        with open(gate, "rb", buffering=0) as file:
            file.read(1)
        os._exit(7)

    def note(path: str) -> str:
        with open(path, "a") as file:
            file.write("ran ")
        return "fine"

    async def scenario(both: Pair) -> None:
        stream, path = both.stream, tmp_path / "runs"
        stream.assign("crash", crash, inputs={"gate": gate.path})
        for name in "abc":
            stream.assign(name, note, inputs={"path": str(path)})
        await stream.until("crash", "started")
        gate.open(1)
        assert (await stream.end("crash")).failed.failure.kind == errors_pb2.FAILURE_KIND_CRASHED
        assert [await stream.value(name) for name in "abc"] == ["fine"] * 3
        assert path.read_text().split() == ["ran"] * 3

    worker.play(scenario)


def test_a_result_given_just_before_a_crash_counts(worker: SharedWorker) -> None:
    def fine() -> str:
        return "fine"

    def crash() -> None:
        os._exit(1)

    async def scenario(both: Pair) -> None:
        for number in range(20):
            both.stream.assign(f"fine{number}", fine, slot=number)
            both.stream.assign(f"crash{number}", crash, slot=number)
        ends = 0
        while ends < 40:
            ends += (await both.stream.report()).WhichOneof("fact") in {"succeeded", "failed"}
        for number in range(20):
            assert both.stream.of(f"fine{number}")[-1] == "succeeded"
            assert both.stream.of(f"crash{number}")[-1] == "failed"

    worker.play(scenario)


def test_one_of_several_pipelined_leases_can_be_revoked(gate: Gate, worker: SharedWorker) -> None:
    def wait_at(gate: str) -> str:
        with open(gate, "rb", buffering=0) as file:
            file.read(1)
        return "through"

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("first", wait_at, inputs={"gate": gate.path})
        for name in "abcd":
            stream.assign(name, lambda: "ran")
        await stream.until("first", "started")
        stream.say(revoke_lease_ids=["b", "d"])
        for name in "bd":
            assert (await stream.end(name)).HasField("returned")
        gate.open(1)
        assert await stream.value("first") == "through"
        assert [await stream.value(name) for name in "ac"] == ["ran", "ran"]

    worker.play(scenario)


def test_output_past_python_belongs_to_the_attempt_that_wrote_it(worker: SharedWorker) -> None:
    def shout(word: str) -> None:
        os.write(1, f"{word}\n".encode())

    async def scenario(both: Pair) -> None:
        for number in range(40):
            both.stream.assign(f"l{number}", shout, inputs={"word": f"word{number}"})
        for number in range(40):
            await both.stream.end(f"l{number}")
            assert both.stream.logs(f"l{number}").split() == [f"word{number}"]

    worker.play(scenario)


def test_nothing_is_lost_while_leases_are_taken_back_from_a_busy_process(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        stream, back = both.stream, list[str]()
        for number in range(600):
            stream.assign(f"l{number}", lambda: "ran", slot=number % 2)
            if number % 3 == 2:
                stream.say(revoke_lease_ids=[f"l{number - 1}", f"l{number}"])
        ends = 0
        while ends < 600:
            report = await stream.report()
            back += [report.lease_id] if report.HasField("returned") else []
            ends += report.WhichOneof("fact") in {"succeeded", "returned"}
        assert all(stream.of(f"l{number}").count("succeeded") <= 1 for number in range(600))
        assert all(stream.of(name)[-1] == "returned" for name in back)

    worker.play(scenario)


def test_a_lease_keeps_its_inputs_when_it_was_withdrawn_and_sent_again(gate: Gate, worker: SharedWorker) -> None:
    def wait_at(gate: str) -> str:
        with open(gate, "rb", buffering=0) as file:
            file.read(1)
        return "through"

    def echo(value: str) -> str:
        return value

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("source", wait_at, inputs={"gate": gate.path})
        stream.assign("long", wait_at, inputs={"gate": gate.path})
        given = payload_pb2.Binding(output=payload_pb2.OutputRef(task_id="source", output="out"))
        stream.assign("follower", echo, after_lease_id="source", bindings={"value": given})
        stream.assign("other", lambda: "ran")
        stream.assign("barrier", lambda: "ran", slot=2)
        # The follower of a lease that has ended is returned: the source ends after the follower came.
        await stream.end("barrier")
        gate.open(1)
        await stream.until("long", "started")
        stream.say(revoke_lease_ids=["other"])
        assert (await stream.end("other")).HasField("returned")
        gate.open(1)
        assert await stream.value("follower") == "through"

    worker.play(scenario)


def test_a_pipelined_lease_ends_when_the_answer_before_it_is_still_converted(gate: Gate, worker: SharedWorker) -> None:
    def many(gate: str) -> list[str]:
        with open(gate, "rb", buffering=0) as file:
            file.read(1)
        return ["x"] * 60_000

    def note() -> str:
        return "fine"

    async def scenario(both: Pair) -> None:
        both.stream.assign("first", note)  # leases are sent ahead to a process that is there
        await both.stream.value("first")
        both.stream.assign("many", many, inputs={"gate": gate.path}, split_outputs=["out"])
        for name in "abc":
            both.stream.assign(name, note)
        await both.stream.until("many", "started")
        gate.open(1)
        assert len((await both.stream.end("many")).succeeded.split["out"].items) == 60_000
        assert [await both.stream.value(name) for name in "abc"] == ["fine"] * 3

    worker.play(scenario)
