"""Values of sandboxed tasks: data where they can be, and otherwise pickles that weaker isolated code is not given."""

import datetime
import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lattice_client import LatticeClient, TaskFailedError, UntrustedPayloadError, context, task
from lattice_client.convert import arrays, payloads, tagged
from tests.e2e.conftest import OFFERS, served

LEVELS = ("subprocess", "seccomp")


@pytest.fixture(scope="module")
def sandboxed() -> Iterator[LatticeClient]:
    """A client of a server with a local worker."""
    with served("--executor", "local", *OFFERS) as address, LatticeClient(address) as client:
        yield client


class Hostile:
    """Runs a command in the process that unpickles it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def hostile_task(level: str, path: Path) -> Any:
    """Return a sandboxed task whose value creates a folder where it is unpickled."""

    @task(isolation=level)
    def attack() -> Any:
        return Hostile(str(path))

    return attack


@pytest.mark.parametrize("level", LEVELS)
def test_sandboxed_values_travel_without_pickle(sandboxed: LatticeClient, level: str) -> None:
    moment = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)

    @task(isolation=level, outputs=["plain", "raw", "mixed", "array", "large"])
    def make() -> dict[str, Any]:
        mixed = {"when": moment, (1, "a"): {2, 3}, "price": Decimal("1.50"), "weights": np.arange(3)}
        return {"plain": [1], "raw": b"\0", "mixed": mixed, "array": np.eye(2), "large": np.zeros(1_000_000)}

    workflow = sandboxed.create_workflow()
    made = workflow.add_task(make)
    run = workflow.run()
    found = run.result(timeout=60)
    assert (found["plain"], found["raw"], found["large"].shape) == ([1], b"\0", (1_000_000,))
    assert (found["mixed"].pop("weights") == np.arange(3)).all()
    assert found["mixed"] == {"when": moment, (1, "a"): {2, 3}, "price": Decimal("1.50")}
    assert (found["array"] == np.eye(2)).all()
    (ended,) = [one for one in sandboxed.list_tasks(run, with_outputs=True) if one.task_id == made.task_id]
    types = {name: payload.media_type for name, payload in ended.outputs.items()}
    expected = (payloads.JSON, payloads.BYTES, tagged.MEDIA_TYPE, arrays.NPY, arrays.NPY)
    assert types == dict(zip(("plain", "raw", "mixed", "array", "large"), expected, strict=True))
    assert len({payload.produced_at for payload in ended.outputs.values()}) == 1
    assert ended.outputs["large"].HasField("artifact")


@pytest.mark.parametrize("level", LEVELS)
def test_client_refuses_a_pickle_of_a_sandbox_unless_it_trusts_it(
    sandboxed: LatticeClient, level: str, tmp_path: Path
) -> None:
    attack = hostile_task(level, tmp_path / "was-here")
    workflow = sandboxed.create_workflow()
    added = workflow.add_task(attack)
    run = workflow.run()
    with pytest.raises(UntrustedPayloadError) as raised:
        run.result(timeout=60)
    assert raised.value.level == level
    assert "output 'result' of task 'attack'" in str(raised.value)
    assert "trust_pickles=True" in str(raised.value)
    for read in (lambda: run.output(added), lambda: list(run.events()), lambda: sandboxed.run_task(attack)):
        with pytest.raises(UntrustedPayloadError):
            read()
    assert not (tmp_path / "was-here").exists()
    with LatticeClient(sandboxed.target, trust_pickles=True) as trusting:
        trusting.get_run(run).result(timeout=60)
    assert (tmp_path / "was-here").exists()
    (tmp_path / "was-here").rmdir()
    run.result(trust_pickles=True)
    assert os.path.exists(tmp_path / "was-here")


@pytest.mark.parametrize("level", LEVELS)
def test_weaker_task_fails_before_it_starts_when_it_would_unpickle(
    sandboxed: LatticeClient, level: str, tmp_path: Path
) -> None:
    @task
    def victim(value: Any) -> str:
        return type(value).__name__

    workflow = sandboxed.create_workflow()
    made = workflow.add_task(hostile_task(level, tmp_path / "was-here"))
    workflow.add_task(victim, {"value": [made.output]})
    run = workflow.run()
    with pytest.raises(TaskFailedError) as raised:
        run.result(timeout=60)
    assert (raised.value.kind, raised.value.task_id) == ("UNTRUSTED_INPUT", "victim")
    for word in ("'value'", "'attack'", "cloudpickle", repr(level), "'none'"):
        assert word in str(raised.value)
    ended = next(one for one in sandboxed.list_tasks(run) if one.task_id == "victim")
    assert ended.attempt == 0
    assert not (tmp_path / "was-here").exists()


def test_equally_isolated_task_may_unpickle(sandboxed: LatticeClient) -> None:
    class Point:
        x = 1

    @task(isolation="subprocess")
    def make() -> Any:
        return Point()

    @task(isolation="seccomp")
    def read(value: Any) -> int:
        return int(value.x)

    workflow = sandboxed.create_workflow()
    workflow.add_task(read, {"value": workflow.add_task(make).output})
    assert workflow.run().result(timeout=60)["result"] == 1


def test_mapped_task_is_refused_the_pickles_of_a_list(sandboxed: LatticeClient) -> None:
    class Point:
        x = 1

    @task(isolation="seccomp")
    def maker() -> list[Any]:
        return [Point(), Point()]

    @task
    def read(value: Any) -> int:
        return int(value.x)

    workflow = sandboxed.create_workflow()
    workflow.map(read, {"value": workflow.add_task(maker).output})
    with pytest.raises(TaskFailedError, match="task 'maker' produced it") as raised:
        workflow.run().result(timeout=60)
    assert raised.value.kind == "UNTRUSTED_INPUT"


@pytest.mark.parametrize("level", LEVELS)
def test_task_that_a_sandbox_spawns_is_isolated_as_it_is(sandboxed: LatticeClient, level: str) -> None:
    @task(isolation=level, resources={"cpu": 0.1})
    def spawn() -> int:
        @task(isolation="none", resources={"cpu": 0.1})
        def escape() -> int:
            return os.getuid()

        context.spawn(escape, name="escaped")
        return os.getuid()

    workflow = sandboxed.create_workflow()
    workflow.add_task(spawn)
    run = workflow.run()
    found = run.result(timeout=60)
    uids = {name: outputs["result"] for name, outputs in found.items()}
    assert len(set(uids.values())) == 2
    assert os.getuid() not in uids.values()


@pytest.mark.parametrize("level", LEVELS)
def test_question_of_a_sandbox_is_not_unpickled(sandboxed: LatticeClient, level: str, tmp_path: Path) -> None:
    @task(isolation=level)
    def asker(path: str) -> Any:
        return context.ask("q", Hostile(path))

    seen: list[Any] = []

    def answer(question: Any) -> str:
        with pytest.raises(UntrustedPayloadError) as raised:
            seen.append(question.payload)
        seen.append(str(raised.value))
        return "no"

    with sandboxed.open_run(on_question=answer) as run:
        assert run.output(run.add(asker, {"path": str(tmp_path / "was-here")}), timeout=60) == "no"
    assert ["question 'q' of task 'asker'" in text for text in seen] == [True]
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("level", LEVELS)
def test_chunks_of_a_sandbox_are_data_or_refused(sandboxed: LatticeClient, level: str, tmp_path: Path) -> None:
    @task(isolation=level)
    def produce(path: str) -> Any:
        yield (1, 2)
        yield Hostile(path)

    workflow = sandboxed.create_workflow()
    produced = workflow.add_task(produce, {"path": str(tmp_path / "was-here")})
    found = []
    with pytest.raises(UntrustedPayloadError, match="a chunk of task 'produce'"):
        found.extend(workflow.run().stream(produced))
    assert not (tmp_path / "was-here").exists()
