"""Attempts on agents that outlive a server which is killed: the next life of the server continues them."""

from collections.abc import Iterator

import pytest

from lattice_client import LatticeClient, Run, task
from lattice_worker import context
from tests.e2e import rooms
from tests.e2e.heads import Head
from tests.e2e.rooms import Room
from tests.e2e.test_restarts import RESULT_S, chain

# Each test starts two servers, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("adoption")
    # The agent dials every 2 s at most. On a busy machine that leaves it too little of the default time.
    (folder / "server.toml").write_text("session_ttl_s = 12.0\n")
    found = Head(folder / "journal", "--num-cpus", "0", "--config", str(folder / "server.toml"))
    found.start()
    found.join("agent", cpus=1)
    yield found
    found.close()


@task
def called(room: str, value: int) -> int:
    rooms.enter(room, "called")
    return value + 1


@task
def calling(room: str) -> int:
    rooms.note(room, "calling")
    return context.call(called, {"room": room, "value": 1}).result() + 1


def kinds(run: Run, task_id: str) -> list[str]:
    """Return the types of the events of a task, without its output."""
    events = list(run.events())
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return [event.type for event in events if event.task_id == task_id and event.type != "task_log"]


def test_an_attempt_continues_when_the_server_is_killed_while_it_runs(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        run = chain(client, room)
        rooms.entered(run, "second")
        head.kill()
        head.start()
        room.open()
        assert run.result(timeout=RESULT_S) == {"result": 3}
        assert kinds(run, "second") == ["task_started", "task_succeeded"]
    assert room.notes() == ["first", "+second", "-second", "third"]


def test_a_result_counts_once_when_its_attempt_ends_while_the_server_is_down(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        run = chain(client, room)
        rooms.entered(run, "second")
        head.kill()
        room.open()
        rooms.noted(room, "-second")
        head.start()
        assert run.result(timeout=RESULT_S) == {"result": 3}
        assert kinds(run, "second") == ["task_started", "task_succeeded"]
        head.kill()
        head.start()
        assert client.get_run(run.run_id).result(timeout=RESULT_S) == {"result": 3}
    assert room.notes() == ["first", "+second", "-second", "third"]


def test_an_attempt_gets_the_answer_of_its_call_when_the_server_is_killed_twice(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        workflow = client.create_workflow()
        workflow.add_task(calling, {"room": room}, task_name="calling")
        run = workflow.run()
        rooms.noted(room, "+called")
        for _ in range(2):
            head.kill()
            head.start()
        room.open()
        assert run.result(timeout=RESULT_S) == {"result": 3}
        assert kinds(run, "calling") == ["task_started", "task_succeeded"]
    assert room.notes() == ["calling", "+called", "-called"]


def test_an_attempt_is_repeated_when_its_agent_is_killed_while_the_server_is_down(head: Head, room: Room) -> None:
    with LatticeClient(head.address) as client:
        run = chain(client, room)
        rooms.entered(run, "second")
        head.kill()
        head.kill_agent("agent")
        head.start()
        head.join("agent", cpus=1)
        room.open()
        assert run.result(timeout=RESULT_S) == {"result": 3}
        assert kinds(run, "second") == ["task_started", "task_retrying", "task_started", "task_succeeded"]
