"""The synchronous client in a program that gevent has patched, before or after the client was imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WAIT_S = 60
SCRIPT = """
import json, sys
address, order, is_told = sys.argv[1], sys.argv[2], sys.argv[3] == "told"
if order == "after":
    from lattice_client import LatticeClient, task
import gevent, gevent.monkey
gevent.monkey.patch_all()
if is_told:
    from grpc.experimental.gevent import init_gevent
    init_gevent()
from lattice_client import LatticeClient, task

@task
def add(a: int, b: int) -> int:
    return a + b

@task
def nap(seconds: float) -> None:
    import time
    time.sleep(seconds)

turns = []

def tick():
    while True:
        gevent.sleep(0.01)
        turns.append(1)

with LatticeClient(address) as client:
    workflow = client.create_workflow()
    first = workflow.add_task(add, {"a": 1, "b": 2})
    workflow.add_task(add, {"a": first.output, "b": 3})
    run = workflow.run()
    found = {"result": run.result(timeout=30), "events": len(list(run.events()))}
    jobs = [gevent.spawn(client.run_task, add, {"a": number, "b": 1}) for number in range(5)]
    gevent.joinall(jobs, raise_error=True)
    found["side by side"] = [job.value["result"] for job in jobs]
    ticking = gevent.spawn(tick)
    gevent.spawn(client.run_task, nap, {"seconds": 0.5}).get()
    ticking.kill()
    found["turns"] = len(turns) > 5
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("order", "is_told"),
    [
        ("before", False),
        ("after", True),
        pytest.param("before", True, marks=pytest.mark.exhaustive),
        pytest.param("after", False, marks=pytest.mark.exhaustive),
    ],
)
def test_a_client_works_in_a_program_that_gevent_has_patched(
    address: str, tmp_path: Path, order: str, is_told: bool
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", address, order, "told" if is_told else "not told"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    # A gRPC that was not told of gevent holds up all greenlets while one of them waits.
    assert json.loads(done.stdout) == {
        "result": {"result": 6},
        "events": 6,
        "side by side": [1, 2, 3, 4, 5],
        "turns": is_told,
    }
