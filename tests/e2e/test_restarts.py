"""A server that is killed with SIGKILL and started again on the same journal: runs continue, and results stay."""

import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lattice_client import (
    LatticeClient,
    NotFoundError,
    Run,
    RunCancelledError,
    RunEvent,
    TaskFailedError,
    UnavailableError,
    task,
)
from lattice_server.journal_cli import journal
from lattice_worker import context
from tests.e2e import rooms
from tests.e2e.heads import Head
from tests.e2e.rooms import Room

# Each test ends a server and starts it again; the next test continues with that one.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RESULT_S = 60.0


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    found = Head(tmp_path_factory.mktemp("head") / "journal")
    found.start()
    yield found
    found.stop()


def test_a_server_that_is_started_without_flags_has_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    head, room = Head(None), Room(tmp_path)
    head.start()
    try:
        with LatticeClient(head.address) as client:
            workflow = client.create_workflow()
            one = workflow.add_task(first, {"room": room})
            workflow.add_task(second, {"room": room, "value": one.output})
            run = workflow.run()
            rooms.noted(room, "+second")
            again = subprocess.run(head.command(), capture_output=True, text=True, timeout=100, check=False)
            assert again.returncode == 1
            folder = tmp_path / f"lattice/journal-{head.port}"
            assert f"uses the journal in {folder}; stop it, or name another --journal" in again.stderr
            head.restart()
            room.open()
            assert run.result(timeout=RESULT_S) == {"result": 2}
            assert room.notes().count("first") == 1
    finally:
        head.stop()


def aside(call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call on a thread; return a function that waits for its result."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()

    def wait() -> Any:
        thread.join(RESULT_S)
        assert found, "the call has not returned"
        return found[0]

    return wait


@task
def first(room: str) -> int:
    rooms.note(room, "first")
    return 1


@task
def second(room: str, value: int) -> int:
    rooms.enter(room, "second")
    return value + 1


@task
def third(room: str, value: int) -> int:
    rooms.note(room, "third")
    return value + 1


@task
def numbers(room: str) -> list[int]:
    rooms.note(room, "numbers")
    return [0, 1, 2, 3]


@task
def square(value: int, room: str) -> int:
    if value == 3:
        rooms.enter(room, "square")
    rooms.note(room, f"square {value}")
    return value * value


@task
def total(values: list[int], room: str) -> int:
    context.spawn(third, {"room": room, "value": 0})
    rooms.note(room, "total")
    return sum(values)


@task
def held(room: str) -> None:
    rooms.enter(room, "held")


@task
def asks(room: str) -> list[Any]:
    found = [context.wait_for("sent"), context.wait_for("later")]
    rooms.note(room, "asked")
    return found


def told(event: RunEvent) -> tuple[Any, ...]:
    """Return an event without its rounded times."""
    data = {key: value for key, value in event.data.items() if key not in {"queue_time_s", "duration_s"}}
    return event.sequence, pytest.approx(event.time_s, abs=1e-6), event.type, data


def chain(client: LatticeClient, room: str) -> Run:
    workflow = client.create_workflow()
    one = workflow.add_task(first, {"room": room}, task_name="first")
    two = workflow.add_task(second, {"room": room, "value": one.output}, task_name="second")
    workflow.add_task(third, {"room": room, "value": two.output}, task_name="third")
    return workflow.run()


def test_a_run_ends_with_its_result_when_the_server_is_killed_in_the_middle(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        run = chain(client, room)
        rooms.until(run, "task_started", "second")
        result = aside(run.result)
        head.restart()
        room.open()
        assert result() == {"result": 3}
        events = list(run.events())
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    notes = room.notes()
    assert (notes.count("first"), notes.count("-second"), notes.count("third")) == (1, 1, 1)


def test_signals_and_tasks_that_wait_for_them_survive_a_server_that_is_killed(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        workflow = client.create_workflow()
        workflow.add_task(asks, {"room": room})
        run = workflow.run()
        run.signal("sent", "before")
        rooms.until(run, "signal_awaited", "asks")
        head.restart()
        run.signal("later", "after")
        assert run.result(timeout=RESULT_S) == {"result": ["before", "after"]}
        assert list(run.events())[-1].data["unread_signals"] == []
    assert room.notes() == ["asked"]


def test_a_run_that_grows_keeps_its_ended_items_when_the_server_is_killed(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        workflow = client.create_workflow()
        listed = workflow.add_task(numbers, {"room": room})
        mapped = workflow.map(square, {"value": listed.output}, {"room": room})
        workflow.add_task(total, {"values": mapped.output, "room": room})
        run = workflow.run()
        for item in range(3):
            rooms.until(run, "task_succeeded", f"square[{item}]")
        rooms.until(run, "task_started", "square[3]")
        later = workflow.add_task(third, {"room": room, "value": 41})
        run.add_tasks([later])
        rooms.until(run, "task_succeeded", "third")
        head.restart()
        room.open()
        assert run.output("total", timeout=RESULT_S) == 14
        assert run.output("third") == 42
        assert {found.task_id for found in client.list_tasks(run.run_id)} >= {"square[3]", "total", "third"}
    notes = room.notes()
    assert [notes.count(f"square {item}") for item in range(4)] == [1, 1, 1, 1]
    assert (notes.count("numbers"), notes.count("total")) == (1, 1)


def test_ended_runs_and_stored_workflows_are_there_after_a_restart(head: Head, room: Room) -> None:
    room.open()
    with LatticeClient(head.address) as client:
        ended = chain(client, room)
        assert ended.result(timeout=RESULT_S) == {"result": 3}
        events = list(ended.events())
        shown = client.describe_run(ended.run_id)
        workflow = client.create_workflow()
        workflow.add_task(first, {"room": room})
        workflow.store("kept")
        before, known = len(room.notes()), len(client.list_runs())
        head.restart()
        assert client.list_runs()[0].run_id == ended.run_id
        assert len(client.list_runs()) == known
        assert client.describe_run(ended.run_id) == shown
        assert client.get_run(ended.run_id).result(timeout=RESULT_S) == {"result": 3}
        assert list(map(told, client.get_run(ended.run_id).events())) == list(map(told, events))
        assert [found.workflow_id for found in client.list_workflows()] == ["kept"]
        assert len(room.notes()) == before
        assert client.get_workflow("kept").run().result(timeout=RESULT_S) == {"result": 1}
        retried = client.retry_run(ended.run_id)
        assert retried.result(timeout=RESULT_S) == {"result": 3}
        assert len(room.notes()) == before + 1, "the retried run had all results"
        assert [found.run_id for found in client.list_runs()][2] == ended.run_id
        assert len(client.list_runs()) == known + 2


def test_a_run_ends_with_its_result_when_the_server_is_stopped_in_the_middle(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        run = chain(client, room)
        rooms.until(run, "task_started", "second")
        head.stop()
        head.start()
        room.open()
        assert client.get_run(run.run_id).result(timeout=RESULT_S) == {"result": 3}
        kinds = [event.type for event in run.events()]
    assert (kinds.count("task_succeeded"), kinds.count("task_failed")) == (3, 0)
    assert (room.notes().count("first"), room.notes().count("third")) == (1, 1)


def test_a_cancelled_run_stays_cancelled_when_the_server_is_killed(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        run = client.create_workflow()
        run.add_task(held, {"room": room}, task_name="held")
        started = run.run()
        rooms.until(started, "task_started", "held")
        started.cancel("enough")
        head.restart()
        with pytest.raises(RunCancelledError):
            started.result(timeout=RESULT_S)
    assert "-held" not in room.notes()


def test_a_second_server_on_the_same_journal_is_refused_with_its_reason(head: Head) -> None:
    command = head.command()
    command[command.index("--port") + 1] = "0"
    refused = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    user = "another server, or a `lattice journal` command,"
    assert refused.stderr == f"Error: {user} uses the journal in {head.journal}; stop it, or name another --journal\n"


def test_a_run_continues_from_a_backup_of_a_running_server(head: Head, room: Room, tmp_path: Path) -> None:
    with LatticeClient(head.address) as client:
        run = chain(client, room)
        rooms.entered(run, "second")
        copy = tmp_path / "copy"
        assert CliRunner().invoke(journal, ["backup", str(head.journal), str(copy)]).exit_code == 0
        room.open()
        assert run.result(timeout=RESULT_S) == {"result": 3}
    other = Head(copy)
    other.start()
    try:
        with LatticeClient(other.address) as client:
            assert client.get_run(run.run_id).result(timeout=RESULT_S) == {"result": 3}
    finally:
        other.stop()
    assert CliRunner().invoke(journal, ["check", str(copy)]).exit_code == 0
    exported = CliRunner().invoke(journal, ["export", str(copy), "--run", run.run_id]).output
    ends = [line for line in map(json.loads, exported.splitlines()) if "task_succeeded" in line.get("event", {})]
    assert [line["event"]["task_succeeded"]["task_id"] for line in ends] == ["first", "second", "third"]
    assert room.notes() == ["first", "+second", "-second", "third", "+second", "-second", "third"]


def test_a_journal_in_a_file_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    head = Head(tmp_path / "file")
    refused = subprocess.run(head.command(), check=False, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"Error: the journal in {head.journal} cannot be opened: ")


@task
def step(folder: str, name: str, value: int) -> int:
    rooms.note(folder, name)
    return value + 1


def steps(client: LatticeClient, room: str, run_id: str) -> Run:
    workflow = client.create_workflow()
    last: Any = 0
    for place in range(5):
        last = workflow.add_task(step, {"folder": room, "name": f"{run_id}/{place}", "value": last}).output
    return workflow.run(run_id)


@task
def large() -> bytes:
    return bytes(1_000_000)


@task
def length(value: bytes, room: str) -> int:
    rooms.enter(room, "length")
    return len(value)


def test_a_task_whose_large_input_was_lost_with_the_server_fails_with_the_reason(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        workflow = client.create_workflow()
        made = workflow.add_task(large, {}, task_name="large")
        workflow.add_task(length, {"value": made.output, "room": room}, task_name="length")
        run = workflow.run()
        rooms.entered(run, "length")
        ended = client.create_workflow()
        ended.add_task(large, {}, task_name="large")
        result = ended.run()
        rooms.until(result, "run_finished", "")
        head.restart()
        room.open()
        with pytest.raises(TaskFailedError, match="an input's value is no longer in the store of this node") as failed:
            run.result(timeout=RESULT_S)
        assert failed.value.kind == "PAYLOAD"
        with pytest.raises(NotFoundError):
            client.get_run(result.run_id).result(timeout=RESULT_S)


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_no_run_is_lost_or_ends_twice_when_the_server_is_killed_again_and_again(head: Head, room: Room) -> None:
    dice = random.Random(7)
    ids: list[str] = []
    wrong: list[object] = []
    is_over = threading.Event()

    def submit(number: int) -> None:
        with LatticeClient(head.address) as client:
            while not is_over.is_set():
                run_id = f"run-{number}-{len(ids)}"
                ids.append(run_id)
                started = None
                while started is None:
                    # A start that is repeated with its id starts nothing twice.
                    with suppress(UnavailableError):
                        started = steps(client, room, run_id)
                found = started.result(timeout=RESULT_S)
                if found != {"result": 5}:
                    wrong.append((run_id, found))

    threads = [threading.Thread(target=submit, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(dice.uniform(0.05, 1.5))
        head.restart()
    is_over.set()
    for thread in threads:
        thread.join(2 * RESULT_S)
    assert not wrong
    with LatticeClient(head.address) as client:
        found = {run.run_id: run for run in client.list_runs(limit=len(ids))}
        assert set(ids) == found.keys()
        for run_id in ids:
            run = client.get_run(run_id)
            assert run.result(timeout=RESULT_S) == {"result": 5}
            events = list(run.events())
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            ends = [event.task_id for event in events if event.type == "task_succeeded"]
            assert len(ends) == len(set(ends)) == 5
            for place in range(5):
                tries = sum(event.type == "task_started" and event.data["attempt"] for event in events)
                assert room.notes().count(f"{run_id}/{place}") <= tries
