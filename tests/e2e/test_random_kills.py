"""A head, its agents and their runners are killed and paused at random under load; a checker compares histories."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lattice_client import LatticeClient, Run, UnavailableError, task
from tests.e2e import rooms
from tests.e2e.heads import Head
from tests.e2e.rooms import Room
from tests.server.journal.postgres_server import running_postgres

KILLS = int(os.environ.get("LATTICE_KILLS", "20"))
CLIENTS = 6
# Runs that a client starts before it reads their results.
RUNS = int(os.environ.get("LATTICE_RUNS", "1"))
RESULT_S = 120.0 + RUNS
LONGEST_PAUSE_S = 4.0
PLACES = 5

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(120 + 30 * KILLS)]


@pytest.fixture(params=["sqlite", "postgres"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Head]:
    with ExitStack() as closing:
        journal: str | Path = tmp_path / "journal"
        if request.param == "postgres":
            journal = closing.enter_context(running_postgres()).url
        found = Head(journal, "--num-cpus", "0")
        found.start()
        closing.callback(found.close)
        for node_id in ("a", "b"):
            found.join(node_id)
        yield found


@task(retries=50)
def step(folder: str, name: str, value: int, seconds: float) -> int:
    rooms.note(folder, f"+{name}")
    time.sleep(seconds)
    rooms.note(folder, f"-{name}")
    return value + 1


def steps(client: LatticeClient, room: str, run_id: str, dice: random.Random) -> Run:
    workflow = client.create_workflow()
    last: Any = 0
    for place in range(PLACES):
        given = {"folder": room, "name": f"{run_id}/{place}", "value": last, "seconds": dice.choice([0.0, 0.01, 0.3])}
        last = workflow.add_task(step, given).output
    return workflow.run(run_id)


class Load:
    """Clients that start runs and read their results, each with a history of its own."""

    def __init__(self, head: Head, room: str, clients: int) -> None:
        self.started: list[str] = []
        self.results: dict[str, Any] = {}
        self._head, self._room = head, room
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._submit, args=[number]) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * RESULT_S)
            assert not thread.is_alive(), "a run is stuck"

    def _submit(self, number: int) -> None:
        count = 0
        with LatticeClient(self._head.address) as client:
            while not self._is_over.is_set():
                ids = [f"run-{number}-{place}" for place in range(count, count + RUNS)]
                count += RUNS
                runs = [self._start(client, run_id) for run_id in ids]
                self.results |= {run_id: self._result(run) for run_id, run in zip(ids, runs, strict=True)}

    def _start(self, client: LatticeClient, run_id: str) -> Run:
        """Start a run. A start that is repeated with its id starts nothing twice."""
        while True:
            with suppress(UnavailableError):
                run = steps(client, self._room, run_id, random.Random(run_id))
                self.started.append(run_id)
                return run

    def _result(self, run: Run) -> Any:
        """Return the result of a run, or the error that it ended with."""
        deadline = time.monotonic() + RESULT_S
        while time.monotonic() < deadline:
            try:
                return run.result(timeout=RESULT_S)
            except UnavailableError:
                continue  # A client tries for 30 s; under many kills that can be too short.
            except Exception as error:
                return repr(error)
        return "there is none"


def kill(head: Head, dice: random.Random) -> str:
    """Kill or pause something at random; return what."""
    what = dice.choices(["head", "agent", "runner", "pause"], [4, 1, 2, 1])[0]
    if what == "pause":
        pause(dice.choice([head.pid, *(agent.pid for agent in head.agents.values())]), dice)
    elif what == "head":
        head.kill()
        time.sleep(dice.uniform(0, 0.5))
        head.start()
    elif what == "agent":
        node_id = dice.choice(sorted(head.agents))
        head.kill_agent(node_id)
        head.join(node_id)
    else:
        agent = psutil.Process(dice.choice(list(head.agents.values())).pid)
        # Any of them may end meanwhile.
        with suppress(psutil.Error, IndexError):
            runners = [process for process in agent.children(recursive=True) if not process.children()]
            dice.choice(runners).send_signal(signal.SIGKILL)
    return what


def pause(pid: int, dice: random.Random) -> None:
    """Stop a process for some time, which the others cannot tell from a machine that hangs."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(dice.uniform(0.1, LONGEST_PAUSE_S))
    os.kill(pid, signal.SIGCONT)


def check_run(run: Run, run_id: str, notes: Counter[str]) -> int:
    """Assert that a run's events are dense, and that each task ended once; return how many attempts were repeated."""
    events = list(run.events())
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    ends = Counter(event.task_id for event in events if event.type == "task_succeeded")
    assert sorted(ends.values()) == [1] * PLACES, (run_id, ends)
    ended_at = {event.task_id: event.sequence for event in events if event.type == "task_succeeded"}
    for event in events:
        if event.type == "task_started":
            assert event.sequence < ended_at[event.task_id], f"{event.task_id} of {run_id} started after its end"
    for place in range(PLACES):
        assert notes[f"-{run_id}/{place}"] >= 1, "a task succeeded that never ran to its end"
    return sum(event.type == "task_retrying" for event in events)


def test_nothing_is_lost_or_done_twice_when_heads_agents_and_runners_are_killed(head: Head, room: Room) -> None:
    dice = random.Random(int(os.environ.get("LATTICE_SEED", "7")))
    load = Load(head, room, CLIENTS)
    killed: Counter[str] = Counter()
    for _ in range(KILLS):
        time.sleep(dice.uniform(0.05, 1.0))
        killed[kill(head, dice)] += 1
    load.stop()
    wrong = {run_id: found for run_id, found in load.results.items() if found != {"result": PLACES}}
    assert not wrong
    assert load.results.keys() == set(load.started)
    notes = Counter(room.notes())
    with LatticeClient(head.address) as client:
        repeated = sum(check_run(client.get_run(run_id), run_id, notes) for run_id in load.started)
    twice = sum(count - 1 for note, count in notes.items() if note.startswith("-"))
    print(
        f"kills {dict(killed)}, runs {len(load.started)}, attempts repeated {repeated}, functions ended twice {twice}"
    )
