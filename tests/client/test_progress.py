"""The live view of a run: the state of its tasks by the events, and the printed text."""

import io
from typing import Any

import pytest
from lattice.v1 import run_pb2
from rich.console import Console

from lattice_client import RunEvent
from lattice_client.cli.progress import Lines, Progress, first_line, span

FAILURE = {"kind": "USER_ERROR", "type": "ValueError", "message": "no\nsecond line", "traceback": "", "task_id": ""}


class Story:
    """Events in order, one a second."""

    def __init__(self) -> None:
        self.count = 0

    def event(self, kind: str, task_id: str = "", **data: Any) -> RunEvent:
        self.count += 1
        return RunEvent(self.count, float(self.count), kind, task_id, {"task_id": task_id, **data})

    def started(self, task_id: str, attempt: int = 1, gpus: tuple[int, ...] = ()) -> RunEvent:
        return self.event("task_started", task_id, attempt=attempt, node_id="n1", gpu_indices=list(gpus))

    def log(self, task_id: str, text: str, stream: str = "stdout") -> RunEvent:
        return self.event("task_log", task_id, attempt=1, stream=stream, text=text)


@pytest.fixture
def story() -> Story:
    """A story with nothing in it."""
    return Story()


def progress_of(name: str = "named") -> Progress:
    return Progress(run_pb2.Run(run_id="run-1", display_name=name), clock=lambda: 100.0)


def drawn(progress: Progress, height: int = 24, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    with console.capture() as captured:
        console.print(progress)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_header_says_where_the_run_is(story: Story) -> None:
    progress = progress_of()
    progress.take(story.event("run_started", task_count=3))
    assert drawn(progress) == ["run-1 named  running  0/3 tasks  0:01:39"]
    progress.take(story.event("tasks_added", task_ids=["c", "d"], parent_task_id="", revision=2))
    progress.take(story.event("something_of_a_later_server"))
    assert drawn(progress) == ["run-1 named  running  0/5 tasks  0:01:39"]
    for event in (story.started("a"), story.started("b"), story.event("task_succeeded", "a", attempt=1, outputs={})):
        progress.take(event)
    assert drawn(progress)[0] == "run-1 named  running  1/5 tasks  0:01:39  1 running"
    progress.take(story.event("task_failed", "b", attempt=1, failure=FAILURE))
    progress.take(story.event("run_cancelling", failure=FAILURE))
    assert drawn(progress)[0] == "run-1 named  cancelling  1/5 tasks  0:01:39  1 failed"
    progress.take(story.event("run_finished", state="failed", failure=FAILURE))
    assert drawn(progress)[0] == "run-1 named  failed  1/5 tasks  8.0s  1 failed"


def test_a_task_has_its_state_attempt_node_time_and_last_line(story: Story) -> None:
    progress = progress_of()
    for event in (story.started("slow"), story.started("a", 2, (0, 3)), story.log("a", "one\ntw"), story.log("a", "o")):
        progress.take(event)
    assert [line.split() for line in drawn(progress)[1:]] == [
        ["task", "state", "attempt", "node", "time", "output"],
        ["a", "running", "2", "n1", "gpu", "0,3", "0:01:38", "two"],
        ["slow", "running", "1", "n1", "0:01:39"],
    ]
    progress.take(story.event("task_failed", "a", attempt=2, failure=FAILURE))
    assert "a failed 2 n1 gpu 0,3 3.0s ValueError: no" in [" ".join(line.split()) for line in drawn(progress)]


def test_a_task_that_is_tried_again_starts_anew(story: Story) -> None:
    progress = progress_of()
    progress.take(story.started("a"))
    progress.take(story.event("task_retrying", "a", attempt=1, failure=FAILURE, retry_time_s=9.0))
    assert drawn(progress)[2].split() == ["a", "retrying", "1", "n1", "1.0s", "ValueError:", "no"]
    progress.take(story.started("a", 2))
    assert drawn(progress)[2].split() == ["a", "running", "2", "n1", "0:01:37"]


@pytest.mark.parametrize("height", [1, 5, 8, 24])
def test_live_view_shows_the_important_tasks_when_not_all_fit(story: Story, height: int) -> None:
    progress = progress_of(name="x" * 300)
    for number in range(100):
        progress.take(story.started(f"done-{number}-{'y' * 100}"))
        progress.take(story.event("task_succeeded", f"done-{number}-{'y' * 100}", attempt=1, outputs={}))
    progress.take(story.started("broken"))
    progress.take(story.event("task_failed", "broken", attempt=1, failure=FAILURE))
    progress.take(story.started("going"))
    progress.take(story.log("going", "z" * 1000))
    progress.take(story.started("newest"))
    progress.take(story.event("task_succeeded", "newest", attempt=1, outputs={}))
    lines = drawn(progress, height)
    room = max(1, height - 4)
    assert len(lines) == room + 3
    shown = [line.split()[0] for line in lines[2:-1]]
    assert [name[:4] for name in shown] == ["goin", "brok", "newe", *["done"] * 100][:room]
    assert lines[-1] == f"... and {103 - room} more"
    assert max(map(len, lines)) <= 80


def test_output_comes_as_whole_lines_with_the_task_before_them(story: Story) -> None:
    progress = progress_of()
    pieces = [story.log("a", "one"), story.log("b", "other\n"), story.log("a", "\ntwo\nthr"), story.log("a", "ee")]
    lines = [line.plain for piece in pieces for line in progress.take(piece)]
    assert lines == ["b | other", "a | one", "a | two"]
    end = story.event("task_succeeded", "a", attempt=1, outputs={})
    assert [line.plain for line in progress.take(end)] == ["a | three"]


def test_each_stream_has_lines_of_its_own_and_the_end_of_the_run_leaves_none_open(story: Story) -> None:
    lines = Lines()
    assert lines.take(story.log("a", "out")) == lines.take(story.log("a", "err", "stderr")) == []
    assert lines.take(story.log("a", "!\n")) == [("a", "out!")]
    assert lines.take(story.event("run_finished", state="cancelled", failure=None)) == [("a", "err")]
    assert lines.take(story.event("run_finished", state="cancelled", failure=None)) == []


def test_a_progress_bar_is_its_newest_state(story: Story) -> None:
    progress = progress_of()
    progress.take(story.started("a"))
    for percent in (10, 50):
        assert progress.take(story.log("a", f"\r{percent}%", "stderr")) == []
    assert drawn(progress)[2].endswith("50%")
    assert [line.plain for line in progress.take(story.log("a", "\r100%\r", "stderr"))] == []
    assert [line.plain for line in progress.take(story.log("a", "\n", "stderr"))] == ["a | 100%"]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("up\x1b[5A\x1b[2J\x1bc\x9b2Jdown\x07\x08", "updown"),
        ("\x1b]0;a title\x07a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "alink"),
        ("a\x1b[?1049hb\x1bPq#0\x1b\\c\x1b(0d", "abcd"),
        ("\u202eback\u2066wards\u2069 \ud83d", "backwards "),
        ("[bold]not markup[/bold]", "[bold]not markup[/bold]"),
        ("cut \x1b", "cut "),
        ("first\nsecond", "first"),
        ("tab\tkept", "tab\tkept"),
    ],
)
def test_live_view_removes_control_characters_when_a_task_prints_them(written: str, shown: str) -> None:
    assert first_line(written).plain == shown


@pytest.mark.parametrize(("seconds", "shown"), [(-1, "0.0s"), (0.04, "0.0s"), (59.9, "59.9s"), (3700, "1:01:40")])
def test_a_length_of_time_is_short(seconds: float, shown: str) -> None:
    assert span(seconds) == shown


@pytest.mark.parametrize(
    ("task_id", "name", "label"),
    [("a1", "summarise", "summarise (a1)"), ("summarise-2", "summarise", "summarise-2"), ("a1", "", "a1")],
)
def test_a_task_is_shown_with_its_name_when_its_id_does_not_tell_it(
    story: Story, task_id: str, name: str, label: str
) -> None:
    progress = progress_of()
    started = story.started(task_id)
    lines = progress.take(RunEvent(1, 1.0, started.type, task_id, {**started.data, "display_name": name}))
    lines += progress.take(story.log(task_id, "hello\n"))
    assert [line.plain for line in lines] == [f"{label} | hello"]
    assert drawn(progress)[2].startswith(label)
