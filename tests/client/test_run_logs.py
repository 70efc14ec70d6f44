"""The lines of output of a run: how pieces become lines, which lines are wanted, and from where reading resumes."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lattice_client import RunEvent
from lattice_client.cli.run_logs import Line, LineAssembly, Wanted


def piece(sequence: int, task_id: str, text: str, attempt: int = 1, stream: str = "stdout") -> RunEvent:
    data = {"task_id": task_id, "attempt": attempt, "stream": stream, "text": text, "truncated": False}
    return RunEvent(sequence, float(sequence), "task_log", task_id, {**data, "display_name": "shown"})


def ended(sequence: int, task_id: str, attempt: int = 1, kind: str = "task_succeeded") -> RunEvent:
    return RunEvent(sequence, float(sequence), kind, task_id, {"task_id": task_id, "attempt": attempt})


def texts(lines: list[Line]) -> list[tuple[str, int, str, str]]:
    return [(line.task_id, line.attempt, line.stream, line.text) for line in lines]


def test_pieces_of_each_stream_of_each_attempt_are_joined_to_lines() -> None:
    assembly = LineAssembly()
    pieces = [piece(1, "a", "one"), piece(2, "a", "oops\n", stream="stderr"), piece(3, "a", "second\n", attempt=2)]
    lines = [line for event in (*pieces, piece(4, "a", "\ntwo\n")) for line in assembly.take(event)]
    assert texts(lines) == [
        ("a", 1, "stderr", "oops"),
        ("a", 2, "stdout", "second"),
        ("a", 1, "stdout", "one"),
        ("a", 1, "stdout", "two"),
    ]


def test_the_end_of_an_attempt_completes_its_lines_and_not_those_of_others() -> None:
    assembly = LineAssembly()
    for event in (piece(1, "a", "first"), piece(2, "a", "again", attempt=2), piece(3, "b", "other")):
        assert list(assembly.take(event)) == []
    assert texts(assembly.take(ended(4, "a", kind="task_retrying"))) == [("a", 1, "stdout", "first")]
    assert texts(assembly.rest()) == [("a", 2, "stdout", "again"), ("b", 1, "stdout", "other")]


def test_the_end_of_the_run_completes_all_lines() -> None:
    assembly = LineAssembly()
    list(assembly.take(piece(1, "a", "left")))
    assert texts(assembly.take(RunEvent(2, 2.0, "run_finished", "", {}))) == [("a", 1, "stdout", "left")]
    assert assembly.rest() == []


def test_reading_resumes_before_the_first_incomplete_line() -> None:
    assembly = LineAssembly(after=4)
    assert assembly.resume_after == 4
    list(assembly.take(piece(5, "a", "begun")))
    list(assembly.take(piece(6, "b", "whole\n")))
    assert assembly.resume_after == 4
    list(assembly.take(piece(7, "a", " and ended\nmore")))
    assert assembly.resume_after == 6
    list(assembly.take(ended(8, "a")))
    assert assembly.resume_after == 8


def test_a_progress_bar_shows_its_last_state() -> None:
    assembly = LineAssembly()
    found = [
        line
        for event in (piece(1, "a", "10%\r2"), piece(2, "a", "0%\r"), piece(3, "a", "\n"))
        for line in assembly.take(event)
    ]
    assert texts(found) == [("a", 1, "stdout", "20%")]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["stdout", "stderr"]), st.text("xy\n", max_size=4)),
        max_size=12,
    ),
    st.data(),
)
def test_a_resumed_reader_loses_no_line(pieces: list[tuple[str, str, str]], data: st.DataObject) -> None:
    events = [piece(n, task_id, text, stream=stream) for n, (task_id, stream, text) in enumerate(pieces, 1)]
    whole = LineAssembly()
    wanted = [line for event in events for line in whole.take(event)] + whole.rest()
    stop = data.draw(st.integers(0, len(wanted)))
    first, printed = LineAssembly(), []
    if stop:
        for line in (line for event in events for line in first.take(event)):
            printed.append(line)
            if len(printed) == stop:  # Perhaps between two lines of one event.
                break
    second = LineAssembly(first.resume_after)
    for event in events[first.resume_after :]:
        printed += second.take(event)
    printed += second.rest()
    keys = {(line.sequence, line.task_id, line.stream, line.text) for line in printed}
    missing = [line for line in wanted if (line.sequence, line.task_id, line.stream, line.text) not in keys]
    assert not missing


def line(task_id: str = "a", attempt: int = 1, stream: str = "stdout") -> Line:
    return Line(1, 1.0, task_id, "", attempt, stream, "text")


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        (Wanted(), line(), True),
        (Wanted(("a",)), line(), True),
        (Wanted(("a",)), line("a[3]"), True),
        (Wanted(("a",)), line("ab"), False),
        (Wanted(("b", "a")), line(), True),
        (Wanted(stream="stderr"), line(), False),
        (Wanted(stream="stderr"), line(stream="stderr"), True),
        (Wanted(attempt=2), line(), False),
        (Wanted(attempt=2), line(attempt=2), True),
    ],
)
def test_a_line_is_wanted_by_task_attempt_and_stream(wanted: Wanted, found: Line, expected: bool) -> None:
    assert wanted.has(found) is expected
