"""A slow node, a failing line and a starved task are each found with the commands that `lattice --help` names."""

import os
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from lattice_client import LatticeClient, Run, task
from tests.commands import LATTICE, START
from tests.e2e.conftest import served
from tests.e2e.rooms import WAIT_S, Room, enter, entered

# With two tasks each, and two more, they make 300 tasks.
RECORDS = 149
BAD_RECORD = 117
SLOW_S, FAST_S = 0.25, 0.05


@task
def fetch(number: int) -> int:
    time.sleep(SLOW_S if "SLOW_NODE" in os.environ else FAST_S)
    return number


@task
def parse(number: int) -> int:
    if number == BAD_RECORD:
        raise ValueError(f"record {number} has no date")
    return number


@task
def report(records: list[int]) -> int:
    return len(records)


@task(node_selector={"at": "head"})
def hold(room: str) -> None:
    enter(room, "hold")


@task(cpu=3)
def train() -> None:
    pass


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """The address of a server with a node of three CPUs and one, `n2`, that is slow."""
    with served("--executor", "local", "--num-cpus", "3", "--label", "at=head") as address:
        command = [*START, "--worker", "--addr", address, "--node-id", "n2", "--num-cpus", "2"]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "SLOW_NODE": "1"})
        assert worker.stdout is not None
        assert "as node n2" in worker.stdout.readline()
        try:
            yield address
        finally:
            worker.terminate()
            worker.wait(WAIT_S)


def lattice(address: str, *arguments: str) -> str:
    """Run a command that has to succeed; return its output."""
    done = subprocess.run(
        [LATTICE, *arguments],
        env={**os.environ, "LATTICE_TARGET": address},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(client: LatticeClient, room: Room) -> Run:
    """Start a run with the three faults; a task of another run that stays in the room starves `train`."""
    holding = client.create_workflow()
    holding.add_task(hold, {"room": room})
    entered(holding.run(), "hold")
    workflow = client.create_workflow("nightly", failure_policy="finish_independent")
    fetched = [workflow.add_task(fetch, {"number": number}) for number in range(RECORDS)]
    parsed = [workflow.add_task(parse, {"number": one.output}) for one in fetched]
    workflow.add_task(report, {"records": [one.output for one in parsed]})
    workflow.add_task(train)
    return workflow.run()


def test_each_fault_of_a_run_is_found_with_one_command(two_nodes: str, room: Room) -> None:
    with LatticeClient(two_nodes) as client:
        run = start(client, room)
        for event in run.events(timeout=WAIT_S):
            if event.type in {"task_succeeded", "task_failed", "task_skipped"}:
                counts = client.describe_run(run).task_counts
                if counts.queued == 1 and not counts.running + counts.blocked:
                    break
        commands = set(re.findall(r"^  ([\w-]+) ", lattice(two_nodes, "runs", "--help"), re.MULTILINE))
        assert {"show", "logs", "timeline"} <= commands

        shown = lattice(two_nodes, "runs", "show", run)
        failures, _, waiting = shown.partition("\nfailures:\n")[2].partition("\nwaiting:\n")
        assert f"  parse-{BAD_RECORD + 1}: attempt 1 on node " in failures
        assert f"USER_ERROR: ValueError: record {BAD_RECORD} has no date" in failures
        assert re.search(r'test_finding_faults\.py:\d+, in parse: raise ValueError\(f"record', failures)
        assert "  train: queued for " in waiting
        assert "resources: node 'local': cpu: 3 wanted, " in waiting

        timeline = lattice(two_nodes, "runs", "timeline", run)
        nodes = timeline.split("\n\n")[3].splitlines()
        assert re.match(r"n2\t\d+\t\d\t.*\t\d+\.\d times as slow$", nodes[1])
        assert "times as slow" not in nodes[2]
        room.open()
        run.cancel()
