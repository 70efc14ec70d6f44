"""The files of `lattice runs timeline`: the trace obeys its format, and the page loads and runs nothing."""

import json
from collections import defaultdict
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from lattice_client.cli.attempts import History
from lattice_client.cli.chrome_trace import QUEUE_PID, chrome_trace, tracks_of
from lattice_client.cli.timeline import most_telling
from lattice_client.cli.timeline_html import MAX_ROWS, html_page
from tests.client.histories import FAILURE, Script

TIMES = st.integers(0, 20).map(lambda number: number / 4)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Draw a run with retries, waiting and running tasks, on up to three nodes."""
    script = Script()
    names: list[str] = []
    for number in range(draw(st.integers(0, 6))):
        task_id = f"t{number}"
        after = draw(st.lists(st.sampled_from(names), unique=True, max_size=3)) if names else []
        script.task(task_id, *after, queued_s=draw(TIMES), state="queued")
        names.append(task_id)
        at_s = draw(TIMES)
        for attempt in range(1, 1 + draw(st.integers(0, 3))):
            script.started(at_s, task_id, attempt, draw(st.sampled_from(["n1", "n2", "n3"])))
            at_s += draw(TIMES)
            kind = draw(st.sampled_from(["task_retrying", "task_succeeded", "task_failed", "running"]))
            if kind == "running":
                break
            script.event(at_s, kind, task_id, attempt=attempt, failure=FAILURE, retry_time_s=1000 + at_s + draw(TIMES))
            if kind != "task_retrying":
                break
            at_s += draw(TIMES)
    return script.history(at_s=draw(st.none() | st.just(40.0)))


def check_trace(trace: dict[str, Any]) -> None:
    """Assert that a file is in the Trace Event Format: fields, nesting on each thread, and pairs."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    threads: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    opened: dict[tuple[str, int, int], int] = {}
    arrows: dict[int, dict[str, Any]] = {}
    named = {event["pid"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["pid"] in named
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["args"]
            continue
        assert isinstance(event["ts"], int)
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            case "b":
                assert opened.setdefault((event["cat"], event["pid"], event["id"]), event["ts"]) == event["ts"]
            case "e":
                assert opened.pop((event["cat"], event["pid"], event["id"])) < event["ts"]
            case "s":
                arrows[event["id"]] = event
            case "f":
                assert event["bp"] == "e"
                assert arrows.pop(event["id"])["name"] == event["name"]
            case other:
                raise AssertionError(other)
    assert not opened
    assert not arrows
    for slices in threads.values():
        ordered = sorted(slices)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ordered)), ordered


@given(histories())
def test_trace_obeys_its_format(history: History) -> None:
    trace = chrome_trace(history, "run", "name")
    check_trace(trace)
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == sum(attempt.start_s is not None for attempt in history.attempts)


def test_trace_has_nodes_attempts_waits_and_the_critical_path() -> None:
    script = Script()
    script.ran("a", 1, 3, queued_s=1)
    script.ran("b", 3, 4, "a", node="n2")
    events = chrome_trace(script.history(), "run-1", "nightly")["traceEvents"]
    nodes = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert set(nodes) == {"queue", "node n1", "node n2"}
    first, second = (e for e in events if e["ph"] == "X")
    assert (first["name"], first["pid"], first["ts"], first["dur"]) == ("a", nodes["node n1"], 1_000_000, 2_000_000)
    assert second["pid"] == nodes["node n2"]
    assert [(e["ph"], e["pid"], e["ts"]) for e in events if e.get("cat") == "queued"] == [
        ("b", QUEUE_PID, 0),
        ("e", QUEUE_PID, 1_000_000),
    ]
    assert [(e["ph"], e["pid"]) for e in events if e.get("cat") == "critical path"] == [
        ("s", nodes["node n1"]),
        ("f", nodes["node n2"]),
    ]


def test_lanes_are_as_few_as_attempts_ran_at_once() -> None:
    script = Script()
    for number in range(20):
        script.ran(f"t{number}", number, number + 2)
    assert {node: len(tracks) for node, tracks in tracks_of(script.history()).items()} == {"n1": 2}


class Page(HTMLParser):
    """The elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J"


def test_page_shows_names_as_text_and_loads_nothing() -> None:
    script = Script()
    script.ran(HOSTILE, 1, 3, function=HOSTILE, node=HOSTILE, queued_s=0.5)
    script.task("failing")
    script.started(3, "failing")
    script.event(4, "task_failed", "failing", attempt=1, failure={**FAILURE, "message": HOSTILE})
    text = html_page(script.history(), "run-1", HOSTILE, "failed")
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr", "th", "td"),
        *("svg", "rect", "line", "text"),
    }
    assert not {name for _, found in page.elements for name in found} & {"src", "href", "onload", "onclick"}
    assert "<script>alert(1)" in page.text
    assert "\x1b" not in text
    assert "http" not in text.replace("http-equiv", "")
    policy = next(found for tag, found in page.elements if tag == "meta" and "content" in found)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "critical path: 1 task" in page.text


def test_page_of_a_large_run_has_all_attempts_and_few_rows_of_single_ones() -> None:
    script = Script()
    for number in range(2000):
        script.ran(f"t{number}", number, number + 1, function="f")
    bars = [found for tag, found in Page(html_page(script.history(), "run", "", "succeeded")).elements if tag == "rect"]
    assert len(bars) == 2000 + 2 * MAX_ROWS


@given(histories())
def test_page_is_made_of_any_history(history: History) -> None:
    assert html_page(history, "run", "name", "running").endswith("</body></html>\n")


def test_most_telling_attempts_are_the_critical_path_then_failures_then_the_longest() -> None:
    script = Script()
    script.ran("short", 0, 1, function="f")
    script.ran("long", 0, 4, function="f")
    script.task("broken")
    script.started(0, "broken")
    script.event(0.5, "task_failed", "broken", attempt=1, failure=FAILURE)
    script.ran("last", 0, 9)
    history = script.history()
    assert [a.task_id for a in most_telling(history, 1)] == ["last"]
    assert {a.task_id for a in most_telling(history, 2)} == {"last", "broken"}
    assert {a.task_id for a in most_telling(history, 3)} == {"last", "broken", "long"}
