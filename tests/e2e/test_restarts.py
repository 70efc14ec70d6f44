"""A server that is killed with SIGKILL and started again on the same journal: runs continue, and results stay."""

import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lattice_client import LatticeClient, Run, task
from tests.e2e import rooms
from tests.e2e.conftest import LATTICE
from tests.e2e.rooms import Room

pytestmark = pytest.mark.slow

RESULT_S = 60.0


class Head:
    """A server on one port and one journal, over several lives."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        flags = ["--port", str(self.port), "--executor", "local", "--num-cpus", "2", "--journal", str(self.journal)]
        return [LATTICE, "start", "--head", *flags]

    def start(self) -> None:
        self._process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self.address in self._process.stdout.readline()

    def kill(self) -> None:
        """Kill the server, and wait until its workers have ended by themselves."""
        assert self._process is not None
        workers = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        assert not psutil.wait_procs(workers, 30)[1]
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(30) == 0
            self._process = None


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    found = Head(tmp_path / "journal")
    found.start()
    yield found
    found.stop()


def aside(call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call on a thread; return a function that waits for what it returned."""
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
        head.kill()
        head.start()
        room.open()
        assert result() == {"result": 3}
        events = list(run.events())
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    notes = room.notes()
    assert (notes.count("first"), notes.count("-second"), notes.count("third")) == (1, 1, 1)
