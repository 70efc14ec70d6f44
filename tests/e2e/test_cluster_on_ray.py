"""The same cluster on Ray: machines start Ray nodes, Ray starts the workers, and any part of it may die."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lattice.v1 import cluster_pb2

from lattice_client import Run, TaskFailedError, task
from tests.commands import LATTICE
from tests.e2e.clusters import PORT, Cluster, cluster
from tests.e2e.net import GONE_S, Host, needs_network
from tests.e2e.rooms import WAIT_S, Room, entered, until
from tests.e2e.test_cluster import (
    LARGE_BYTES,
    all_outputs,
    four_in,
    make,
    measure,
    retried,
    start_four,
    stay,
    wait_and_measure,
)
from tests.e2e.test_llm_cluster import PORT as GATEWAY_PORT
from tests.e2e.test_llm_cluster import check_budget_of_two_nodes, check_model_of_another_node, run_chat, start_model

READY = cluster_pb2.NODE_STATE_READY
PAGE = Path(__file__).parent.parent.parent / "docs" / "cluster.md"
# Several parts, and far more than what machines tell each other anyway.
MANY_BYTES = 30_000_000
AWAY_S = 3.0

pytestmark = [needs_network, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head, which offers nothing, and three machines; Ray takes its time to start."""
    with cluster(tmp_path_factory.mktemp("cluster"), "ray", machines=3) as found:
        assert not found.nodes()
        yield found


@pytest.fixture
def two(cluster_of_two: Cluster) -> Cluster:
    """That cluster, whole, whatever befell it before."""
    cluster_of_two.restore("ab")
    return cluster_of_two


stay_on_b = task(node_selector={"at": "b"})(stay.function)


@task
def devices() -> str:
    import os

    return os.environ["CUDA_VISIBLE_DEVICES"]


def kill(host: Host, words: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the processes of a host whose command lines contain some words."""
    found = [process for process in host.processes() if words in " ".join(process.cmdline())]
    assert found, f"nothing on the host is called {words}"
    for process in found:
        process.send_signal(number)


def test_machines_join_ray_and_exchange_values(two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    workflow = two.client.create_workflow()
    made = workflow.add_task(make, {"size": LARGE_BYTES}, "make")
    workflow.add_task(measure, {"data": made.output}, "measure")
    assert workflow.run().result(timeout=WAIT_S) == {"result": LARGE_BYTES}
    assert two.client.server_info().ray_address.startswith(f"{two.head.address}:")
    assert {node.node_ip for node in two.nodes().values()} == {machine.address for machine in two.machines[:2]}


def test_a_machine_joins_with_its_gpus_and_drains_by_the_commands_of_the_page(two: Cluster, tmp_path: Path) -> None:
    section = re.findall(r"^## Joining\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    join, look = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    variables, start = join.splitlines()
    path = f"PATH={Path(LATTICE).parent}:$PATH"
    typed = variables.replace("10.1.2.3:50051", two.address).replace("cert.pem", two.env["LATTICE_TLS_CA"])
    (tmp_path / "token").write_text(two.env["LATTICE_TOKEN"])
    machine = two.machines[2]
    offers = "--num-gpus 2 --gpu-memory 8192"
    worker = machine.start("sh", "-c", f"cd {tmp_path}; {path}; {typed}; exec {start} {offers}")
    machine.hear(worker, "as node second")
    two.until_node("second", READY)
    node = two.nodes()["second"]
    assert [(gpu.index, gpu.memory_bytes) for gpu in node.capacity.gpus] == [(0, 2**33), (1, 2**33)]
    assert two.client.run_task(devices, {}) == {"result": ""}
    whole = task(gpu=2)(devices.function)
    assert two.client.run_task(whole, {}) == {"result": "0,1"}
    shown = two.head.run("sh", "-c", f"cd {tmp_path}; {path}; {typed}; {look}")
    assert re.search(r"^second\tready", shown, re.MULTILINE)
    assert "draining" in shown
    assert worker.wait(GONE_S) == 0
    assert set(two.nodes()) == {"a", "b"}


BEFALL: dict[str, Callable[[Host], None]] = {
    "worker": lambda host: kill(host, "-m lattice_worker --addr"),
    "actor": lambda host: kill(host, "ray::WorkerHost"),
    "raylet": lambda host: kill(host, "raylet/raylet"),
    "agent": lambda host: kill(host, "-m lattice_worker --join"),
    "power": Host.crash,
    "cable": Host.cut,
    "frozen": lambda host: host.signal_all(signal.SIGSTOP),
}


# The other failures are handled like one of these.
SUFFICIENT = ("worker", "raylet", "power")


@pytest.mark.parametrize(
    "what", [what if what in SUFFICIENT else pytest.param(what, marks=pytest.mark.exhaustive) for what in BEFALL]
)
def test_attempts_run_again_when_a_part_of_their_machine_dies(what: str, two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    session = two.nodes()["a"].worker_id
    BEFALL[what](two.machines[0])
    two.until(lambda: (found := two.nodes().get("a")) is None or found.worker_id != session)
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert retried(run) == ["WORKER_LOST"] * 2
    if what in {"worker", "actor", "raylet"}:
        two.until_node("a", READY)
    if what == "agent":
        two.until(lambda: not two.machines[0].processes())


# Other tests have a machine that returns at once, and a machine that is lost.
@pytest.mark.exhaustive
def test_a_machine_keeps_its_worker_when_it_reconnects_before_ray_misses_it(two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    two.machines[0].cut()
    two.until_node("a")
    time.sleep(AWAY_S)  # That is the point: for longer than a session waits.
    two.machines[0].mend()
    two.until_node("a", READY)
    # A worker that is about to be ended would take the two that run again, each alone on its node: one at a time.
    while len([line for line in room.notes() if line.startswith("+")]) < 5:
        entered(run, "stay")
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert retried(run) == ["WORKER_LOST"] * 2


# `test_ray_cluster.py` kills Ray, and the last test of this file has the machines join again.
@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["gcs_server", "ray_driver", "raylet/raylet"])
def test_machines_join_again_when_the_head_of_ray_dies(what: str, two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    before = two.client.server_info()
    kill(two.head, what)
    two.until(lambda: two.client.server_info().ray_address not in {"", before.ray_address})
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert set(retried(run)) == {"WORKER_LOST"}
    assert two.client.server_info().pid == before.pid
    for machine, name in zip(two.machines, "ab", strict=False):
        two.until_node(name, READY)
        started = [process for process in machine.processes() if before.ray_address in process.cmdline()]
        assert not started, "a node of the Ray that is gone was left"


@pytest.mark.parametrize("how", [pytest.param("drain", marks=pytest.mark.exhaustive), "stop"])
def test_a_machine_leaves_when_it_is_drained_or_stopped(how: str, two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    if how == "drain":
        two.command("nodes", "drain", "a")
    else:
        kill(two.machines[0], "-m lattice_worker --join", signal.SIGTERM)
    two.until_node("a", cluster_pb2.NODE_STATE_DRAINING)
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert retried(run) == []
    two.until(lambda: not two.machines[0].processes())
    assert set(two.nodes()) == {"b"}


def passed_on(found: Cluster, source: str = "a") -> Run:
    """Start a run that makes a large value on a node, `a` unless told otherwise, and measures it on `b`."""
    workflow = found.client.create_workflow()
    make_there = task(node_selector={"at": source})(make.function)
    made = workflow.add_task(make_there, {"size": MANY_BYTES}, "make")
    workflow.add_task(measure, {"data": made.output}, "measure")
    return workflow.run()


def bytes_through_head(found: Cluster) -> int:
    """Pass a large value on from node to node; return how many bytes the head carried meanwhile."""
    before = found.head.carried_bytes()
    assert passed_on(found).result(timeout=WAIT_S) == {"result": MANY_BYTES}
    return found.head.carried_bytes() - before


def test_large_values_bypass_the_head_also_when_the_worker_that_has_them_is_new(two: Cluster) -> None:
    assert bytes_through_head(two) < MANY_BYTES / 10
    session = two.nodes()["a"].worker_id
    kill(two.machines[0], "-m lattice_worker --addr")
    two.until(lambda: (found := two.nodes().get("a")) is None or found.worker_id != session)
    two.until_node("a", READY)
    assert bytes_through_head(two) < MANY_BYTES / 10


def test_nodes_that_do_not_reach_each_other_get_large_values_through_the_head(two: Cluster) -> None:
    with two.machines[0].strangers_to(two.machines[1]):
        assert bytes_through_head(two) > 2 * MANY_BYTES


@pytest.mark.parametrize(
    ("what", "is_known"),
    [
        ("power", False),
        *(
            pytest.param(*how, marks=pytest.mark.exhaustive)
            for how in (("worker", True), ("worker", False), ("power", True))
        ),
    ],
)
def test_a_task_fails_with_payload_when_a_large_value_was_lost_with_its_node(
    what: str, is_known: bool, two: Cluster, room: Room
) -> None:
    session = two.nodes()["a"].worker_id
    workflow = two.client.create_workflow()
    made = workflow.add_task(make, {"size": MANY_BYTES}, "make")
    waits = workflow.add_task(stay_on_b, {"room": room, "name": "later"}, "stay")
    workflow.add_task(wait_and_measure, {"room": room, "data": made.output, "after": waits.output}, "measure")
    run = workflow.run()
    until(run, "task_succeeded", "make")
    entered(run, "stay")
    BEFALL[what](two.machines[0])
    if is_known:
        two.until(lambda: (found := two.nodes().get("a")) is None or found.worker_id != session)
    room.open()
    with pytest.raises(TaskFailedError, match="node 'a'") as failed:
        run.result(timeout=WAIT_S)
    assert failed.value.kind == "PAYLOAD"


# These come last: the head that is left offers a node of its own.


def test_machines_join_again_when_the_head_restarts(two: Cluster, room: Room) -> None:
    four_in(two, room)
    two.head.kill_all()
    two.start_head("--num-cpus", "1", "--label", "at=head")
    for name in "ab":
        two.until_node(name, READY)
    room.open()
    again = Room(room + "/again")
    Path(again).mkdir()
    # Open before: a worker of the former Ray may take some of the four before it is ended, and those run one by one.
    again.open()
    assert all_outputs(start_four(two, again)) == {"t0", "t1", "t2", "t3"}
    assert not [line for line in room.notes() if line.startswith("-")], "what the head forgot went on"
    sent, carried = two.head.sent_bytes(PORT), two.head.carried_bytes()
    assert passed_on(two, "head").result(timeout=WAIT_S) == {"result": MANY_BYTES}
    assert two.head.sent_bytes(PORT) - sent < MANY_BYTES / 10
    assert two.head.carried_bytes() - carried > MANY_BYTES


@pytest.mark.exhaustive
def test_tasks_on_two_nodes_use_a_model_of_one_and_share_a_budget(two: Cluster) -> None:
    check_model_of_another_node(two)
    two.client.services.stop("tiny", timeout=WAIT_S)
    check_budget_of_two_nodes(two)


@pytest.mark.exhaustive
def test_gateways_listen_at_the_port_of_the_head_and_of_machines_that_joined(tmp_path: Path) -> None:
    ports = {"a": GATEWAY_PORT, "b": GATEWAY_PORT + 1}
    flags = ("--num-cpus", "2", "--label", "at=a", "--gateway-port", str(ports["a"]))
    with cluster(tmp_path, "ray", machines=1, flags=flags) as found:
        (machine,) = found.machines
        found.join(machine, "b", "--num-cpus", "2", "--gateway-port", str(ports["b"]))
        hosts = {"a": found.head, "b": machine}
        for at, other in ("ab", "ba"):
            start_model(found, node_selector={"at": at})
            for node_id in (at, other):
                assert run_chat(found, node_id, "x y")[0] == 200
            assert all(f"{host.address}:{ports[name]}" in host.listening() for name, host in hosts.items())
            found.client.services.stop("tiny", timeout=WAIT_S)
