"""Models on machines that joined: gateways of other nodes, lost connections, and a budget of several nodes."""

import json
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_client import context, task
from tests.e2e.clusters import Cluster, cluster
from tests.e2e.net import needs_network
from tests.e2e.rooms import WAIT_S, Room, note, noted
from tests.e2e.test_budgets import ask_many, check_use
from tests.e2e.test_llms import COMMAND, chat

PROVIDER = str(Path(__file__).parent / "providers.py")
PROVIDER_PORT, REQUESTS, PORT = 8123, 60, 7443
# A program that asks a gateway without a certificate, and prints the answer.
ANONYMOUS = """
import socket, ssl, sys
context, answer = ssl._create_unverified_context(), b""
try:
    asking = context.wrap_socket(socket.create_connection(sys.argv[1:]))
    asking.send(b"GET /v1/models HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    answer = asking.recv(100)
except OSError:
    pass
print(answer)
"""

EXHAUSTIVE = pytest.mark.exhaustive

pytestmark = [needs_network, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head, which offers nothing, and two machines."""
    with cluster(tmp_path_factory.mktemp("cluster"), "local") as found:
        yield found


@pytest.fixture
def two(cluster_of_two: Cluster) -> Iterator[Cluster]:
    """That cluster, each machine a node of two CPUs, without models when the test ends."""
    cluster_of_two.restore("ab", "--num-cpus", "2")
    yield cluster_of_two
    for service in cluster_of_two.client.services.list():
        cluster_of_two.client.services.stop(service.spec.name, timeout=WAIT_S)


def at(node_id: str, function: Any) -> Any:
    """Return a task that runs on one node."""
    return task(cpu=0.1, node_selector={"at": node_id})(function.function)


@task(cpu=0.1)
def listen(room: str, text: str) -> list[Any]:
    """Read a stream, and note its first event; return the error that it ends with, and how many events came."""
    found = context.llm("tiny")
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": True}
    headers = {"authorization": f"Bearer {found.api_key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{found.base_url}/chat/completions", json.dumps(body).encode(), headers)
    events = []
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        for line in response:
            if line.startswith(b"data: {"):
                events.append(json.loads(line[6:]))
                if len(events) == 1:
                    note(room, response.headers["x-lattice-instance"])
    return [events[-1].get("error", {}).get("code"), len(events)]


def start_model(found: Cluster, *arguments: str, **settings: Any) -> Any:
    """Start a model of small instances on the first machine."""
    chosen: dict[str, Any] = {"cpu": 0.1, "node_selector": {"at": "a"}, "timeout": WAIT_S}
    return found.client.llm.start("tiny", command=COMMAND, arguments=arguments, **(chosen | settings))


def run_chat(found: Cluster, node_id: str, text: str, **more: Any) -> tuple[int, Any]:
    """Have a task on a node chat with the model; return the status and the answer."""
    result = found.client.run_task(at(node_id, chat), {"name": "tiny", "text": text, **more})["result"]
    return result[2], result[3] if more.get("stream") else json.loads(result[3])


def check_model_of_another_node(found: Cluster) -> None:
    """Have tasks on both machines use a model of the first, and that machine listen as it should."""
    (instance,) = start_model(found).instances
    for node_id in "ba":
        status, answer = run_chat(found, node_id, "hello big world")
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "hello big world")
    status, streamed = run_chat(found, "b", "hello big world", stream=True)
    assert (status, streamed.count("data: "), streamed.rstrip().endswith("[DONE]")) == (200, 5, True)
    assert instance.endpoint.startswith("127.0.0.1:")
    assert instance.endpoint in found.machines[0].listening()


def check_budget_of_two_nodes(found: Cluster) -> None:
    """Have tasks on both machines use up a budget several times; the provider refuses none of their requests."""
    provider = found.head.start(sys.executable, PROVIDER, found.head.address, str(PROVIDER_PORT), "2", str(REQUESTS))
    found.head.hear(provider, "the provider listens")
    url = f"http://{found.head.address}:{PROVIDER_PORT}/v1"
    found.client.llm.start("gpt", base_url=url, requests_per_minute=30 * REQUESTS, limit_window=2.0)
    workflow = found.client.create_workflow()
    for number in range(8):
        workflow.add_task(at("ab"[number % 2], ask_many), {"count": 25}, task_id=f"t{number}")
    outputs = workflow.run().result(timeout=2 * WAIT_S)
    assert Counter(status for one in outputs.values() for status in one["result"]) == {200: 200}
    told = found.head.run(
        sys.executable, "-c", f"import urllib.request as r; print(r.urlopen('{url}').read().decode())"
    )
    assert json.loads(told) == {"200": 200}
    check_use(found.client, 200)
    provider.kill()
    provider.wait(WAIT_S)


def test_task_reaches_a_model_of_another_node_through_both_gateways(two: Cluster) -> None:
    check_model_of_another_node(two)
    # Of the two ports of a gateway only the one for gateways is open to other machines, and it wants a certificate.
    (peer,) = [one for one in two.machines[0].listening() if one.startswith(two.machines[0].address)]
    assert two.head.run(sys.executable, "-c", ANONYMOUS, *peer.split(":")).strip() == "b''"


def test_gateways_call_each_other_at_the_port_of_their_workers(cluster_of_two: Cluster) -> None:
    machines = dict(zip("ab", cluster_of_two.machines, strict=True))
    for name, machine in machines.items():
        machine.kill_all()
        cluster_of_two.join(machine, name, "--num-cpus", "2", "--gateway-port", str(PORT))
    check_model_of_another_node(cluster_of_two)
    for machine in machines.values():
        open_ports = [one for one in machine.listening() if one.startswith(machine.address)]
        assert open_ports == [f"{machine.address}:{PORT}"]
        machine.kill_all()
    cluster_of_two.client.services.stop("tiny", timeout=WAIT_S)


def test_instances_of_both_nodes_answer_tasks_of_one(two: Cluster, room: Room) -> None:
    start_model(two, "--delay", "0.05", replicas=2, node_selector={}, cpu=1.5)
    # Both gateways serve when a task of each node has had an answer.
    for node_id in "ab":
        assert run_chat(two, node_id, "x")[0] == 200
    runs = []
    for count in (60, 2):
        workflow = two.client.create_workflow()
        workflow.add_task(at("b", listen), {"room": room, "text": "word " * count})
        runs.append(workflow.run())
        two.until(lambda: len(room.notes()) == len(runs))
    assert [run.result(timeout=WAIT_S)["result"] for run in runs] == [[None, 61], [None, 3]]
    assert set(room.notes()) == {"tiny-1", "tiny-2"}


@pytest.mark.parametrize("befall", ["engine", *(pytest.param(one, marks=EXHAUSTIVE) for one in ("gateway", "cable"))])
def test_answer_from_another_node_that_is_cut_ends_with_an_error(two: Cluster, room: Room, befall: str) -> None:
    (instance,) = start_model(two, "--delay", "0.05").instances
    workflow = two.client.create_workflow()
    workflow.add_task(at("b", listen), {"room": room, "text": "word " * 2000})
    run = workflow.run()
    noted(room, instance.instance_id)
    machine = two.machines[0]
    if befall == "cable":
        machine.cut()
    else:
        port = next(
            one.rpartition(":")[2]
            for one in machine.listening()
            if (one == instance.endpoint if befall == "engine" else one.startswith(machine.address))
        )
        machine.run("sh", "-c", f"kill -9 $(ss -ltnp 'sport = :{port}' | grep -o 'pid=[0-9]*' | head -1 | cut -c 5-)")
    code, count = run.result(timeout=WAIT_S)["result"]
    assert (code, 0 < count < 2000) == ("replica_lost", True)
    if befall == "cable":
        machine.mend()
        two.restore("ab", "--num-cpus", "2")
    # The instance, or its gateway, is started again, and tasks wait for it.
    assert run_chat(two, "b", "again")[0] == 200


@EXHAUSTIVE
def test_drained_node_finishes_the_answers_for_other_nodes_and_leaves(two: Cluster, room: Room) -> None:
    start_model(two, "--delay", "0.05")
    workflow = two.client.create_workflow()
    workflow.add_task(at("b", listen), {"room": room, "text": "word " * 100})
    run = workflow.run()
    noted(room, "tiny-1")
    # Its connections are counted once a second.
    two.until(lambda: sum(one.in_flight for one in two.client.services.get("tiny").instances) > 0)
    two.command("nodes", "drain", "a")
    assert run.result(timeout=WAIT_S)["result"] == [None, 101]
    assert two.workers["a"].wait(WAIT_S) == 0


def test_budget_is_shared_by_tasks_of_two_nodes(two: Cluster) -> None:
    check_budget_of_two_nodes(two)


@EXHAUSTIVE
def test_model_beside_the_head_is_reached_from_a_machine_that_joined(tmp_path: Path) -> None:
    with cluster(tmp_path, "local", machines=1, flags=("--num-cpus", "2", "--label", "at=a")) as found:
        found.join(found.machines[0], "b")
        start_model(found)
        assert run_chat(found, "b", "x y")[0] == 200
