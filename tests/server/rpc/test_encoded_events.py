"""Events that are encoded once for all readers of a run."""

from types import SimpleNamespace
from typing import Any

import pytest
from lattice.v1 import results_pb2

from lattice_server.core.messages import RunEvent, RunStarted, TaskLogged
from lattice_server.rpc import encoded_events
from lattice_server.rpc.convert.events import event_to_proto
from lattice_server.rpc.encoded_events import ReadRuns, response

TASKS: Any = {"t": SimpleNamespace(spec=SimpleNamespace(display_name="a task"))}


def entry() -> Any:
    return SimpleNamespace(run=SimpleNamespace(tasks=TASKS))


def logged(sequence: int, text: str) -> RunEvent:
    return RunEvent(sequence, 0.0, TaskLogged("r", "t", 1, False, text, False))


def parsed(data: bytes) -> results_pb2.WatchRunResponse:
    return results_pb2.WatchRunResponse.FromString(data)


def test_response_of_encoded_events_is_that_of_their_messages() -> None:
    events = [RunEvent(1, 1.5, RunStarted("w", 3)), logged(2, "x"), logged(3, "")]
    with ReadRuns().reading(entry()) as encoded:
        data = response([encoded.encode(event) for event in events], 3, complete=True)
    shown = [event_to_proto(TASKS, event) for event in events]
    assert parsed(data) == results_pb2.WatchRunResponse(events=shown, sequence=3, complete=True)
    assert parsed(response([], 7)) == results_pb2.WatchRunResponse(sequence=7)


def test_event_is_encoded_once_when_a_run_has_several_readers() -> None:
    runs, run, event = ReadRuns(), entry(), logged(1, "x")
    with runs.reading(run) as first:
        assert first.encode(event) is not first.encode(event)
        with runs.reading(run) as second:
            assert second.encode(event) is first.encode(event)
        with runs.reading(entry()) as other:
            assert other.encode(event) is not first.encode(event)


def test_event_is_encoded_again_when_its_text_was_cut() -> None:
    runs, run = ReadRuns(), entry()
    with runs.reading(run), runs.reading(run) as encoded:
        encoded.encode(logged(1, "x"))
        assert parsed(encoded.encode(logged(1, ""))).events[0].task_log.text == ""


def test_nothing_is_kept_when_the_last_reader_has_left() -> None:
    runs, run, event = ReadRuns(), entry(), logged(1, "x")
    with runs.reading(run), runs.reading(run) as encoded:
        data = encoded.encode(event)
    with runs.reading(run), runs.reading(run) as encoded:
        assert encoded.encode(event) is not data


def test_kept_events_are_bounded_by_number_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_events, "KEPT_EVENTS", 3)
    runs, run = ReadRuns(), entry()
    events = [logged(number, "x") for number in range(5)]
    large = logged(9, "x" * encoded_events.KEPT_EVENT_BYTES)
    with runs.reading(run), runs.reading(run) as encoded:
        first = [encoded.encode(event) for event in events]
        assert [encoded.encode(event) is data for event, data in zip(events[2:], first[2:], strict=True)] == [True] * 3
        assert encoded.encode(events[0]) is not first[0]
        assert encoded.encode(large) is not encoded.encode(large)
