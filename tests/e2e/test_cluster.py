"""A head and workers on separate hosts: they join, leave, die and reconnect, and no run is lost."""

import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest
from lattice.v1 import cluster_pb2

from lattice_client import Run, TaskFailedError, task
from tests.commands import LATTICE
from tests.e2e.clusters import Cluster, cluster
from tests.e2e.net import GONE_S, Host, needs_network
from tests.e2e.rooms import WAIT_S, Room, enter, entered, started, until

READY, DETACHED, DRAINING = (cluster_pb2.NodeState.Value(f"NODE_STATE_{n}") for n in ("READY", "DETACHED", "DRAINING"))
DEADLINE_S = 0.2
LARGE_BYTES = 3_000_000


pytestmark = [needs_network, pytest.mark.timeout(240)]
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def cluster_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and two machines."""
    with cluster(tmp_path_factory.mktemp("cluster"), "local") as found:
        yield found


@pytest.fixture
def two(cluster_of_two: Cluster) -> Cluster:
    """That cluster, each machine a node of two CPUs, `a` and `b`, whatever befell it before."""
    cluster_of_two.restore("ab", "--num-cpus", "2", "--drain-deadline", str(DEADLINE_S))
    return cluster_of_two


@pytest.fixture
def empty(cluster_of_two: Cluster) -> Cluster:
    """That cluster without any node."""
    for machine in cluster_of_two.machines:
        machine.mend()
        machine.kill_all()
    cluster_of_two.until(lambda: not cluster_of_two.nodes())
    return cluster_of_two


@task
def stay(room: str, name: str) -> str:
    enter(room, name)
    return name


def start_four(found: Cluster, room: Room) -> Run:
    """Start a run of four tasks that enter a room."""
    workflow = found.client.create_workflow()
    for index in range(4):
        workflow.add_task(stay, {"room": room, "name": f"t{index}"}, f"t{index}")
    return workflow.run()


def four_in(found: Cluster, room: Room) -> Run:
    """Start a run of four tasks, and wait until all are in the room: two on each host."""
    run = start_four(found, room)
    entered(run, *(record.task_id for record in found.client.list_tasks(run)))
    assert {node.attempts for node in found.nodes().values()} == {2}
    return run


def retried(run: Run) -> list[str]:
    """Return the kinds of failures after which tasks of a run were tried again."""
    return [e.data["failure"]["kind"] for e in run.events(timeout=WAIT_S) if e.type == "task_retrying"]


def nodes_that_finished(run: Run) -> set[str]:
    """Return the nodes on which the last attempts of a run's tasks started."""
    last = {e.task_id: e.data["node_id"] for e in run.events(timeout=WAIT_S) if e.type == "task_started"}
    return set(last.values())


def all_outputs(run: Run) -> set[str]:
    """Return the outputs of the tasks of a run, each of which ended once."""
    ends = [e for e in run.events(timeout=WAIT_S) if e.type == "task_succeeded"]
    assert len(ends) == len({e.task_id for e in ends})
    return {e.data["outputs"]["result"] for e in ends}


def test_a_waiting_task_starts_when_a_machine_joins(empty: Cluster, room: Room) -> None:
    workflow = empty.client.create_workflow()
    workflow.add_task(stay, {"room": room, "name": "early"})
    run = workflow.run()
    empty.join(empty.machines[0], "c", "--num-cpus", "2", "--label", "zone=eu", "--memory", "1000")
    started(run, "stay")
    room.open()
    assert run.result(timeout=WAIT_S) == {"result": "early"}
    node = empty.nodes()["c"]
    assert (node.node_ip, node.capacity.cpu, dict(node.labels)["zone"]) == (empty.machines[0].address, 2, "eu")
    assert node.capacity.memory_bytes == 1000 * 2**20
    assert "\nc\t" in empty.command("nodes")


def kill_worker(host: Host, worker: "subprocess.Popen[bytes]") -> None:
    """Kill the worker's process, and nothing else of its host."""
    worker.kill()


def crash(host: Host, worker: "subprocess.Popen[bytes]") -> None:
    """Cut the power."""
    host.crash()


def cut(host: Host, worker: "subprocess.Popen[bytes]") -> None:
    """Cut the cable; the host keeps running."""
    host.cut()


def stop_all(host: Host, worker: "subprocess.Popen[bytes]") -> None:
    """Freeze everything on the host."""
    host.signal_all(signal.SIGSTOP)


@pytest.mark.parametrize(
    "befall", [kill_worker, *(pytest.param(one, marks=EXHAUSTIVE) for one in (cut, crash, stop_all))]
)
def test_attempts_run_elsewhere_when_their_worker_is_lost(
    befall: Callable[[Host, "subprocess.Popen[bytes]"], None], two: Cluster, room: Room
) -> None:
    run = four_in(two, room)
    befall(two.machines[0], two.workers["a"])
    two.until_node("a")
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert retried(run) == ["WORKER_LOST"] * 2
    assert nodes_that_finished(run) == {"b"}
    node = two.nodes()["b"]
    assert (node.attempts, node.free.cpu) == (0, 2), "the ledger is not true"


@pytest.mark.parametrize("befall", [cut, pytest.param(stop_all, marks=EXHAUSTIVE)])
def test_a_worker_ends_its_attempts_when_it_reconnects_too_late(
    befall: Callable[[Host, "subprocess.Popen[bytes]"], None], two: Cluster, room: Room
) -> None:
    run = four_in(two, room)
    befall(two.machines[0], two.workers["a"])
    two.until_node("a")
    if befall is cut:
        two.machines[0].mend()
    else:
        two.machines[0].signal_all(signal.SIGCONT)
    two.until_node("a", READY)
    # Both attempts of the lost worker run again, each alone on its node: the other node is busy, so one at a time.
    while len([line for line in room.notes() if line.startswith("+")]) < 5:
        entered(run, "stay")
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    left = [line for line in room.notes() if line.startswith("-")]
    assert len(left) == 4, "an attempt went on although its lease was lost"


def test_no_attempt_is_lost_when_the_network_breaks_briefly(two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    two.machines[0].cut()
    two.machines[0].mend()
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert retried(run) == []
    assert len(room.notes()) == 8


def test_a_run_waits_when_there_is_no_node(two: Cluster, room: Room) -> None:
    workflow = two.client.create_workflow()
    workflow.add_task(stay, {"room": room, "name": "patient"})
    run = workflow.run()
    entered(run, "stay")
    for machine in two.machines:
        machine.kill_all()
    two.until(lambda: not two.nodes())
    later = workflow.run()
    two.join(two.machines[1], "b")
    room.open()
    assert run.result(timeout=WAIT_S) == later.result(timeout=WAIT_S) == {"result": "patient"}
    assert retried(run) == ["WORKER_LOST"]


@EXHAUSTIVE  # Four workers; the scheduler's own tests count losses.
def test_a_task_that_loses_three_workers_fails(empty: Cluster, room: Room) -> None:
    workflow = empty.client.create_workflow()
    workflow.add_task(stay, {"room": room, "name": "poison"})
    run = workflow.run()
    for number in range(1, 4):
        worker = empty.join(empty.machines[0], f"n{number}")
        while len(room.notes()) < number:
            entered(run, "stay")
        worker.kill()
        empty.until_node(f"n{number}")
    with pytest.raises(TaskFailedError, match="lost"):
        run.result(timeout=WAIT_S)


def test_a_drained_node_finishes_its_attempts_and_leaves(two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    assert "draining" in two.command("nodes", "drain", "a")
    two.until_node("a", DRAINING)
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert retried(run) == []
    assert two.workers["a"].wait(GONE_S) == 0
    assert set(two.nodes()) == {"b"}


def test_attempts_run_elsewhere_when_the_deadline_of_a_drain_is_over(two: Cluster, room: Room) -> None:
    run = four_in(two, room)
    two.command("nodes", "drain", "a", "--deadline", str(DEADLINE_S))
    assert two.workers["a"].wait(GONE_S) == 0
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert retried(run) == ["WORKER_LOST"] * 2
    assert nodes_that_finished(run) == {"b"}


@pytest.mark.parametrize(
    "how", [pytest.param("SIGTERM", marks=EXHAUSTIVE), pytest.param("SIGINT", marks=EXHAUSTIVE), "lattice stop"]
)
def test_a_stopped_worker_drains_before_it_ends(how: str, two: Cluster, room: Room) -> None:
    run, worker = four_in(two, room), two.workers["a"]
    if how == "lattice stop":
        stopping = two.machines[0].start(LATTICE, "stop", "--node", "a")
        assert worker.wait(GONE_S) == stopping.wait(GONE_S) == 0
    else:
        worker.send_signal(signal.Signals[how])
        assert worker.wait(GONE_S) == 0
    room.open()
    assert all_outputs(run) == {"t0", "t1", "t2", "t3"}
    assert nodes_that_finished(run) == {"b"}


def test_workers_reconnect_when_the_head_restarts(two: Cluster, room: Room) -> None:
    four_in(two, room)
    two.head.kill_all()
    two.start_head()
    for name in "ab":
        two.until_node(name, READY)
    workflow = two.client.create_workflow()
    for index in range(4):
        workflow.add_task(two_words, {"index": index}, f"t{index}")
    # The four CPUs are free: the forgotten attempts were ended.
    assert all_outputs(workflow.run()) == {"word 0", "word 1", "word 2", "word 3"}
    assert not [line for line in room.notes() if line.startswith("-")]


@task
def two_words(index: int) -> str:
    return f"word {index}"


@task(node_selector={"at": "a"})
def make(size: int) -> bytes:
    return b"x" * size


@task(node_selector={"at": "b"})
def measure(data: bytes) -> int:
    return len(data)


@task(node_selector={"at": "b"})
def wait_and_measure(room: str, data: bytes, after: str) -> int:
    return len(data)


def test_large_values_move_between_nodes_and_to_clients(two: Cluster) -> None:
    workflow = two.client.create_workflow()
    made = workflow.add_task(make, {"size": LARGE_BYTES}, "make")
    workflow.add_task(measure, {"data": made.output}, "measure")
    assert workflow.run().result(timeout=WAIT_S) == {"result": LARGE_BYTES}
    assert two.client.run_task(make, {"size": LARGE_BYTES}) == {"result": b"x" * LARGE_BYTES}
    assert two.client.run_task(measure, {"data": b"y" * LARGE_BYTES}) == {"result": LARGE_BYTES}


def test_a_task_fails_with_payload_when_a_value_was_lost_with_its_node(two: Cluster, room: Room) -> None:
    workflow = two.client.create_workflow()
    made = workflow.add_task(make, {"size": LARGE_BYTES}, "make")
    waits = workflow.add_task(stay, {"room": room, "name": "later"}, "stay")
    workflow.add_task(wait_and_measure, {"room": room, "data": made.output, "after": waits.output}, "measure")
    run = workflow.run()
    until(run, "task_succeeded", "make")
    entered(run, "stay")
    two.workers["a"].kill()
    two.until_node("a")
    room.open()
    with pytest.raises(TaskFailedError, match=r"node 'a'.*gone") as failed:
        run.result(timeout=WAIT_S)
    assert failed.value.kind == "PAYLOAD"
