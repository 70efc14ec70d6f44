"""Hostile functions on a real worker: every lease ends once, as it should, and its slot is free afterwards."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import errors_pb2, payload_pb2, worker_pb2

from lattice_worker.runner.encoding.values import decode_value
from tests import hostile
from tests.examples import SEED, examples
from tests.hostile import BLOCKING, Plan, act, act_async, act_each, act_twice, is_expected, plan_of
from tests.worker.head import Stream, pair, payload_of

pytestmark = pytest.mark.slow

ENDS = ("succeeded", "failed", "returned")
LEASE_S = 30.0
SLOTS = (1, 2)


class Worker:
    """A worker that lives through all examples, and the event loop on which a test speaks with it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.numbers = itertools.count()
        self._seen: set[int] = set()

    def start(self, form: str, plan: Plan, slot: int, size: int) -> str:
        """Start a lease; return its id."""
        lease_id = f"{form}-{next(self.numbers)}"
        inputs = {"plan": payload_pb2.Binding(payload=payload_of(plan))}
        attempts = [
            worker_pb2.Attempt(run_id="r", task_id=f"{lease_id}-{item}", number=1, inputs=inputs)
            for item in range(size)
        ]
        function = {"batch": act_each, "map": act_twice, "async": act_async}.get(form, act)
        more: dict[str, Any] = {"attempts": attempts, "batched": form == "batch", "timeout": Duration(seconds=3)}
        if form == "map":
            more["split_outputs"] = ["out"]
        self.stream.assign(lease_id, function, slot=slot, is_async=form == "async", **more)
        return lease_id

    async def ends(self, sizes: dict[str, int]) -> list[worker_pb2.Report]:
        """Return the reports that end leases of these sizes, as soon as all are there."""
        left = dict(sizes)
        found = []
        async with asyncio.timeout(LEASE_S):
            while any(left.values()):
                report = await self.stream.report()
                self.stream.say(acknowledged_sequence=report.sequence)
                if report.WhichOneof("fact") in ENDS and report.sequence not in self._seen:
                    self._seen.add(report.sequence)
                    found.append(report)
                    left[report.lease_id] = 0 if report.HasField("returned") else left[report.lease_id] - 1
        return found

    async def check_calm(self) -> None:
        """Assert that a plain function succeeds on each slot and in the process of coroutines."""
        forms = [*((("process", slot)) for slot in SLOTS), ("async", 3)]
        calm = {self.start(form, ["number"], slot, 1): 1 for form, slot in forms}
        for report in await self.ends(calm):
            assert kind_of(report) == "", report
            assert value_of(report) == 7


def kind_of(report: worker_pb2.Report) -> str:
    """Return the kind of a failure; nothing of a success."""
    if not report.HasField("failed"):
        return ""
    return errors_pb2.FailureKind.Name(report.failed.failure.kind).removeprefix("FAILURE_KIND_")


def value_of(report: worker_pb2.Report) -> Any:
    """Return the output of a report; a large one is not read."""
    payload = report.succeeded.outputs["out"]
    if payload.HasField("artifact"):
        return hostile.VALUES["large"]
    return decode_value(payload.media_type, payload.json.encode() or payload.data)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Worker]]:
    """A worker of two CPUs, with a place to write to."""
    cloudpickle.register_pickle_by_value(hostile)
    print(f"LATTICE_SEED={SEED}")
    with asyncio.Runner() as runner:
        context = pair(Path(tmp_path_factory.mktemp("store")))
        both = runner.run(context.__aenter__())
        worker = Worker(both.stream)
        yield runner, worker
        # One that is not acknowledged soon enough is sent again.
        reports = {report.sequence: report for report in both.stream.reports}.values()
        ended = Counter((r.lease_id, r.item) for r in reports if r.WhichOneof("fact") in ENDS)
        runner.run(context.__aexit__(None, None, None))
    cloudpickle.unregister_pickle_by_value(hostile)
    assert set(ended.values()) <= {1}, [lease for lease, count in ended.items() if count > 1]


@pytest.mark.parametrize("form", ["process", "async", "batch", "map"])
@examples(250)
@given(seed=st.integers(0, 2**64))
def test_every_lease_ends_once_when_its_function_is_hostile(
    form: str, loop: tuple[asyncio.Runner, Worker], seed: int
) -> None:
    choice = random.Random(seed)
    runner, worker = loop

    async def example() -> None:
        plans, sizes = {}, {}
        for slot in SLOTS:
            plan, size = plan_of(choice), choice.randrange(1, 4) if form == "batch" else 1
            if form == "async" and slot == 2:
                # A coroutine sees the disturbances of its neighbours; this one does not depend on them.
                plan = ["number"]
            lease_id = worker.start(form, plan, slot, size)
            plans[lease_id], sizes[lease_id] = plan, size
        is_blocked = form == "async" and any(plan[-1] in BLOCKING for plan in plans.values())
        for report in await worker.ends(sizes):
            plan, kind = plans[report.lease_id], kind_of(report)
            if report.HasField("returned"):
                # The process may be found broken when the step that broke it is over, and no coroutine is charged then.
                assert form == "async"
                assert plan[-1] in {"number", "garbage"}
            elif not (is_blocked and kind == "TIMEOUT"):
                value = None if kind else value_in(report, form)
                assert is_expected(plan, kind, value, form), (plan, report, plans)
        await worker.check_calm()

    runner.run(example())


def test_the_child_of_a_coroutine_ends_when_it_returns_to_the_event_loop(loop: tuple[asyncio.Runner, Worker]) -> None:
    runner, worker = loop

    async def fork() -> list[int]:
        import os

        if (pid := os.fork()) == 0:
            return []
        await asyncio.sleep(1)
        ended, status = os.waitpid(pid, os.WNOHANG)
        return [ended - pid, status]

    async def scenario() -> None:
        worker.stream.assign("forked", fork, slot=1, is_async=True)
        (report,) = await worker.ends({"forked": 1})
        assert (kind_of(report), value_of(report)) == ("", [0, 0])
        await worker.check_calm()

    runner.run(scenario())


def test_no_coroutine_is_charged_when_one_of_several_sends_garbage(loop: tuple[asyncio.Runner, Worker]) -> None:
    runner, worker = loop

    async def scenario() -> None:
        for _ in range(5):
            calm = {worker.start("async", ["number"], slot, 1): 1 for slot in (2, 3)}
            garbage = {worker.start("async", ["garbage"], 1, 1): 1}
            ends = {report.lease_id: report for report in await worker.ends(calm | garbage)}
            assert {kind_of(ends[lease_id]) for lease_id in calm} == {""}
            await worker.check_calm()

    runner.run(scenario())


def value_in(report: worker_pb2.Report, form: str) -> Any:
    """Return the value of one call, from the output of a function of this form."""
    found = value_of(report)
    return found[0] if form == "map" and isinstance(found, list) else found
