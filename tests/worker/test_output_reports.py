"""Reports of output: order, size, number, and that nothing is lost."""

import asyncio
import os
import signal
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import worker_pb2

from lattice_worker import convert
from lattice_worker.attempts.output_reports import REPORT_CHARACTERS, OutputReports
from tests.examples import examples
from tests.worker.head import LIMIT_BYTES, Pair
from tests.worker.shared import SharedWorker

LINES = 15_000
STREAMS = {1: "stdout", 2: "stderr"}

texts = st.tuples(
    st.just("log"),
    st.sampled_from("ab"),
    st.sampled_from(["stdout", "stderr"]),
    st.one_of(st.text(min_size=1, max_size=9), st.integers(1, 3 * REPORT_CHARACTERS).map("z".__mul__)),
    st.booleans(),
)
others = st.tuples(st.just("other"), st.sampled_from("abc"))
pauses = st.tuples(st.just("pause"))


def told(reports: list[worker_pb2.Report], lease_id: str) -> list[Any]:
    """Return the reports of a lease, in order; neighbours of the same stream are one text."""
    found: list[Any] = []
    for report in reports:
        if report.lease_id != lease_id:
            continue
        if not report.HasField("log"):
            found.append("other")
            continue
        _add(found, STREAMS[report.log.stream], report.log.text, report.log.truncated)
    return found


def _add(found: list[Any], stream: str, text: str, is_truncated: bool) -> None:
    if not is_truncated and found and found[-1][::2] == (stream, False):
        text = found.pop()[1] + text
    found.append((stream, text, is_truncated))


@given(st.lists(st.one_of(texts, texts, texts, others, pauses), max_size=40))
@examples(1000)
def test_output_keeps_its_order_among_other_reports_and_waits_milliseconds(
    steps: list[tuple[Any, ...]],
) -> None:
    async def scenario() -> None:
        reports: list[worker_pb2.Report] = []
        output = OutputReports(reports.append)
        expected: dict[str, list[Any]] = {"a": [], "b": [], "c": []}
        for step in steps:
            match step:
                case "log", lease_id, stream, text, is_truncated:
                    text = text[:20] if is_truncated else text
                    output.log(lease_id, stream, text, is_truncated)
                    _add(expected[lease_id], stream, text, is_truncated)
                case "other", lease_id:
                    output.report(convert.report(lease_id, 1))
                    expected[lease_id].append("other")
                    assert told(reports, lease_id) == expected[lease_id]
                case _:
                    await asyncio.sleep(0)
            for lease_id, sent in expected.items():
                held = sum(len(text) for _, text, _ in (one for one in sent if one != "other"))
                held -= sum(len(one.log.text) for one in reports if one.lease_id == lease_id)
                assert 0 <= held < REPORT_CHARACTERS
        await asyncio.sleep(0.02)
        assert {lease_id: told(reports, lease_id) for lease_id in expected} == expected
        assert all(len(report.log.text) <= REPORT_CHARACTERS for report in reports)

    asyncio.run(scenario())


def test_first_text_after_a_pause_is_reported_at_once_and_the_next_ones_together() -> None:
    async def scenario() -> None:
        reports: list[worker_pb2.Report] = []
        output = OutputReports(reports.append)
        output.log("a", "stdout", "first\n", False)
        await asyncio.sleep(0)
        assert [report.log.text for report in reports] == ["first\n"]
        for number in range(100):
            output.log("a", "stdout", f"{number}\n", False)
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert "".join(report.log.text for report in reports[1:]) == "".join(f"{number}\n" for number in range(100))
        assert len(reports) < 20

    asyncio.run(scenario())


@pytest.mark.slow
class TestWithWorker:
    """With a real worker."""

    def test_many_lines_are_few_reports_and_all_of_them_in_order(self, worker: SharedWorker) -> None:
        def count(lines: int) -> None:
            for number in range(lines):
                print(number)

        async def scenario(both: Pair) -> None:
            both.stream.assign("a", count, inputs={"lines": LINES})
            await both.stream.end("a")
            written = "".join(f"{number}\n" for number in range(LINES))
            assert len(written) < LIMIT_BYTES
            assert both.stream.logs("a") == written
            assert both.stream.of("a").count("log") < LINES / 8

        worker.play(scenario)

    def test_lines_of_a_process_that_is_killed_after_them_are_all_reported(self, worker: SharedWorker) -> None:
        def die(lines: int) -> None:
            for number in range(lines):
                print(number)
            os.kill(os.getpid(), signal.SIGKILL)

        async def scenario(both: Pair) -> None:
            both.stream.assign("a", die, inputs={"lines": 5000})
            assert (await both.stream.end("a")).WhichOneof("fact") == "failed"
            assert both.stream.logs("a") == "".join(f"{number}\n" for number in range(5000))

        worker.play(scenario)

    def test_output_of_both_streams_keeps_its_order_up_to_the_limit(self, worker: SharedWorker) -> None:
        def write(lines: int) -> None:
            import sys

            for number in range(lines):
                print(f"{number} " + "x" * 90, file=sys.stderr if number % 100 == 99 else sys.stdout)

        async def scenario(both: Pair) -> None:
            both.stream.assign("a", write, inputs={"lines": 3 * LIMIT_BYTES // 90})
            await both.stream.end("a")
            *whole, cut, notice = both.stream.logs("a").splitlines()
            assert "cut after" in cut + notice
            assert whole == [f"{number} " + "x" * 90 for number in range(len(whole))]
            assert LIMIT_BYTES - 300 < len(both.stream.logs("a")) < LIMIT_BYTES + 100

        worker.play(scenario)


@pytest.mark.parametrize("first", ["output", "report", "end with output", "nothing"])
def test_a_start_is_reported_with_its_time_before_anything_else_of_its_lease(first: str) -> None:
    async def scenario() -> list[worker_pb2.Report]:
        reports: list[worker_pb2.Report] = []
        output = OutputReports(reports.append)
        before_ns = time.time_ns()
        output.start("a")
        after_ns = time.time_ns()
        if first == "report":
            output.report(convert.report("a", 1))
        elif first != "nothing":
            output.log("a", "stdout", "text", False)
        if first == "end with output":
            output.end("a")
        await asyncio.sleep(0.02)
        assert before_ns <= reports[0].time.ToNanoseconds() <= after_ns
        assert not output.has_starts
        return reports

    facts = [report.WhichOneof("fact") for report in asyncio.run(scenario())]
    assert facts == ["started", *{"report": [None], "nothing": []}.get(first, ["log"])]


def test_a_start_is_not_reported_when_the_end_follows_at_once() -> None:
    async def scenario() -> None:
        reports: list[worker_pb2.Report] = []
        output = OutputReports(reports.append)
        output.start("a")
        output.end("a")
        assert not output.has_starts
        await asyncio.sleep(0.02)
        assert not reports

    asyncio.run(scenario())
