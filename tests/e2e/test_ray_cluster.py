"""Runs survive the death of Ray, and an existing Ray is used without an effect on its other users."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lattice_client import LatticeClient, Run, task
from tests.e2e.conftest import served
from tests.e2e.rays import ACCESS, machine_address, ray_head
from tests.e2e.rooms import WAIT_S, Room, enter, entered, until

pytestmark = pytest.mark.timeout(240)

SCALE_S = 120.0
STAYED = {"result": "stayed"}


@task(resources={"cpu": 2})
def stay(room: str) -> str:
    enter(room, "task")
    return "stayed"


@contextmanager
def two_cpus(*flags: str) -> Iterator[LatticeClient]:
    """A client of a server that has two CPUs of a Ray; the test may end the server."""
    flags = ("--executor", "ray", "--num-cpus", "2", *flags)
    with served(*flags, statuses=(0, -signal.SIGKILL)) as address, LatticeClient(address) as client:
        yield client


def submit(client: LatticeClient, room: str) -> Run:
    """Start a run of one task that takes all there is."""
    workflow = client.create_workflow()
    workflow.add_task(stay, {"room": room})
    return workflow.run()


def processes(client: LatticeClient) -> list[psutil.Process]:
    """Return every process the server started."""
    return psutil.Process(client.server_info().pid).children(recursive=True)


STOPPED, KILLED = signal.SIGTERM, signal.SIGKILL


@pytest.mark.parametrize(
    ("victims", "ending"),
    [
        (["raylet"], KILLED),
        pytest.param(["ray_driver"], STOPPED, marks=pytest.mark.exhaustive),
        pytest.param(["ray::WorkerHost", "gcs_server"], STOPPED, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_succeeds_when_a_process_of_ray_dies_and_no_process_is_left(
    victims: list[str], ending: signal.Signals, tmp_path: Path
) -> None:
    with two_cpus() as client:
        server, ours = psutil.Process(client.server_info().pid), []
        for number, victim in enumerate(victims):
            room = Room(tmp_path / str(number))
            Path(room).mkdir()
            running = submit(client, room)
            entered(running, "stay")
            queued = submit(client, room)
            ours += processes(client)
            killed = next(p for p in processes(client) if victim in " ".join([p.name(), *p.cmdline()[:3]]))
            killed.send_signal(signal.SIGKILL)
            until(running, "task_retrying", "stay")
            room.open()
            assert running.result(timeout=WAIT_S) == queued.result(timeout=WAIT_S) == STAYED
            failures = [e.data["failure"]["kind"] for e in running.events() if e.type == "task_retrying"]
            assert failures == ["WORKER_LOST"]
            assert client.server_info().pid == server.pid
            assert {"gcs_server", "raylet"} <= {process.name() for process in processes(client)}
        ours += processes(client)
        server.send_signal(ending)
        # The Ray that died left nothing either.
        _, alive = psutil.wait_procs(ours, timeout=WAIT_S / 2)
    assert not alive


@pytest.fixture
def access(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of an existing Ray, in the environment of the server."""
    for name, value in ACCESS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("access")
def test_an_existing_ray_is_shared_and_left_running(tmp_path: Path, room: Room) -> None:
    with ray_head(tmp_path, "127.0.0.11", "--num-cpus", "5") as users:
        with two_cpus("--ray-address", users.address, "--ray-workers", "2") as client:
            runs = [submit(client, room) for _ in range(2)]
            for run in runs:
                entered(run, "stay")
            assert users.free()["CPU"] == 1
            assert {node.node_id for node in client.nodes()} == {"ray-1", "ray-2"}
            worker = psutil.Process(client.nodes()[0].worker_pid)
            assert client.server_info().pid not in {parent.pid for parent in worker.parents()}
            room.open()
            assert [run.result(timeout=WAIT_S) for run in runs] == [STAYED] * 2
        users.until_free(5)


# `test_ray.py` of the executors tests that reservations wait in Ray.
@pytest.mark.exhaustive
@pytest.mark.usefixtures("access")
def test_a_waiting_reservation_is_demand_for_the_autoscaler(tmp_path: Path, room: Room) -> None:
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    scaling = {"available_node_types": kinds, "head_node_type": "ray.head.default", "max_workers": 2}
    with ray_head(tmp_path, machine_address(), "--num-cpus", "0", autoscaling=scaling) as users:
        assert "CPU" not in users.free()
        with two_cpus("--ray-address", users.address) as client:
            run = submit(client, room)
            room.open()
            assert run.result(timeout=SCALE_S) == STAYED
