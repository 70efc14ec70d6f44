"""`lattice doctor`: its findings, its advice, and its exit status."""

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lattice.v1 import cluster_pb2, resources_pb2, task_pb2

from lattice_client import LatticeClient, Run
from lattice_client.cli import machine_checks, server_checks
from lattice_client.cli.cluster_checks import isolation_checks, node_checks, queue_status
from lattice_client.cli.findings import ERROR, OK, SKIPPED, WARNING, Finding
from lattice_client.cli.server_checks import Answer, answer_checks, clock_check
from tests.certificates import certificates
from tests.client.histories import duration, timestamp
from tests.client.shell import WAIT_S, at_terminal, call, ended, greet
from tests.client.test_inspection import wide
from tests.server.apps import NoWorkers, serving_aside

READY, DETACHED, DRAINING = (cluster_pb2.NodeState.Value(f"NODE_STATE_{n}") for n in ("READY", "DETACHED", "DRAINING"))


def answer(**fields: Any) -> Answer:
    """Return an answer at 1000 s that took 2 s."""
    info = {"version": "0.1.0", "protocol_version": 1, "executor": "local", **fields}
    return Answer(cluster_pb2.GetServerInfoResponse(**info), 1000.0, 1002.0)


def node(node_id: str = "n1", state: int = READY, seen_s: float = 1000, **fields: Any) -> cluster_pb2.Node:
    capacity = resources_pb2.Capacity(cpu=4)
    found = cluster_pb2.Node(node_id=node_id, state=state, capacity=capacity, free=capacity, **fields)
    found.heartbeat_time.CopyFrom(timestamp(seen_s))
    return found


@pytest.mark.parametrize(
    ("server_s", "status", "text"),
    [
        (1000.0, OK, "agrees"),
        (1002.0, OK, "agrees"),
        (1003.5, OK, "off by 1500ms"),
        (1012.0, WARNING, "at least 10.0 s ahead of this one"),
        (970.0, WARNING, "at least 30.0 s behind this one"),
    ],
)
def test_clock_difference_excludes_the_duration_of_the_call(server_s: float, status: str, text: str) -> None:
    found = clock_check(answer(current_time=timestamp(server_s)))
    assert found.status == status
    assert text in found.found
    assert bool(found.advice) is (status != OK)


def test_clock_is_skipped_when_the_server_does_not_tell_its_time() -> None:
    assert clock_check(answer()).status == SKIPPED


def test_answer_warns_of_another_version_and_refuses_a_newer_protocol() -> None:
    def status(**fields: Any) -> str:
        return next(found for found in answer_checks(answer(**fields)) if found.name == "version").status

    assert (status(), status(version="9.9"), status(protocol_version=2)) == (OK, WARNING, ERROR)


def test_answer_warns_of_a_store_that_is_nearly_full() -> None:
    stores = [
        cluster_pb2.StoreUsage(name=name, used_bytes=used, limit_bytes=100) for name, used in (("a", 95), ("b", 1))
    ]
    found = {finding.name: finding.status for finding in answer_checks(answer(stores=stores))}
    assert (found["store of a"], found["store of b"]) == (WARNING, OK)


def test_nodes_are_an_error_when_there_is_none_or_none_is_ready() -> None:
    assert [found.status for found in node_checks([], answer())] == [ERROR]
    assert node_checks([node(state=DRAINING)], answer())[0].status == ERROR


def test_each_node_that_is_not_healthy_is_named() -> None:
    nodes = [node(), node("gone", DETACHED, attempts=3), node("leaving", DRAINING), node("silent", seen_s=900)]
    found = node_checks(nodes, answer(current_time=timestamp(1001)))
    assert (found[0].status, found[0].found[:18]) == (OK, "2 of 4 are ready; ")
    assert {finding.name: finding.status for finding in found[1:]} == dict.fromkeys(
        ("node gone", "node leaving", "node silent"), WARNING
    )
    assert "3 attempts" in found[1].found


def test_isolation_counts_the_nodes_of_each_level() -> None:
    nodes = [
        node(isolations=[resources_pb2.ISOLATION_NONE, resources_pb2.ISOLATION_SECCOMP]),
        node(isolations=[resources_pb2.ISOLATION_NONE]),
    ]
    assert isolation_checks(nodes)[0].found == "offered: none by 2 of 2 nodes, seccomp by 1 of 2 nodes"


def test_a_refused_level_is_named_once_with_its_nodes_and_its_reason() -> None:
    refusal = resources_pb2.IsolationRefusal(isolation=resources_pb2.ISOLATION_DOCKER, reason="no engine")
    _, found = isolation_checks([node("a", isolation_refusals=[refusal]), node("b", isolation_refusals=[refusal])])
    assert (found.name, found.status, found.found) == (
        "isolation docker",
        SKIPPED,
        "not offered by a, b: no engine",
    )


@pytest.mark.parametrize(
    ("waited_s", "running", "nodes", "kind", "expected"),
    [
        (5, 0, [READY], task_pb2.WAIT_KIND_RESOURCES, OK),
        (90, 4, [READY], task_pb2.WAIT_KIND_RESOURCES, WARNING),
        (90, 0, [READY], task_pb2.WAIT_KIND_RESOURCES, ERROR),
        (90, 0, [READY], task_pb2.WAIT_KIND_BATCH, WARNING),
        (1, 0, [DETACHED], task_pb2.WAIT_KIND_NODES, ERROR),
    ],
)
def test_queue_is_judged_by_its_longest_wait(
    waited_s: float, running: int, nodes: list[int], kind: Any, expected: str
) -> None:
    longest = task_pb2.ExplainTaskResponse(waited=duration(waited_s), reasons=[task_pb2.WaitReason(kind=kind)])
    info = cluster_pb2.GetServerInfoResponse(queued_tasks=1, running_attempts=running)
    assert queue_status(info, [node(state=state) for state in nodes], longest) == expected


def worker_result(
    monkeypatch: pytest.MonkeyPatch, returncode: int, stdout: str = "", stderr: str = ""
) -> list[Finding]:
    """Return the findings when the checks of a worker end like this, and Ray is not installed."""
    done = subprocess.CompletedProcess([], returncode, stdout, stderr)
    monkeypatch.setattr(machine_checks, "_run", lambda *_: done)
    monkeypatch.setattr(machine_checks, "_version", lambda name: "")
    return list(machine_checks.machine_checks())


def test_machine_without_the_packages_of_workers_and_ray_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "Traceback ...\nModuleNotFoundError: No module named 'psutil'\n"
    worker, ray = worker_result(monkeypatch, 1, stderr=stderr)
    assert (worker.status, ray.status) == (SKIPPED, SKIPPED)
    assert "pip install" in worker.advice
    assert "--executor local" in ray.advice


def test_machine_is_an_error_when_the_checks_of_a_worker_die(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"name": "disk", "status": WARNING, "found": "x", "advice": "y"})
    disk, worker, _ = worker_result(monkeypatch, -11, stdout=f"noise\n[1]\n{line}\n")
    assert (disk.name, disk.status, worker.status) == ("disk", WARNING, ERROR)
    assert "exit status -11" in worker.found


@pytest.mark.parametrize(
    ("version", "imports", "expected", "text"),
    [
        ("2.40.0", 0, ERROR, "needs"),
        ("2.55.0", 1, ERROR, "cannot be imported: ImportError: no"),
        ("2.55.0", 0, OK, "can be imported"),
    ],
)
def test_ray_is_checked_by_its_version_and_by_importing_it(
    monkeypatch: pytest.MonkeyPatch, version: str, imports: int, expected: str, text: str
) -> None:
    done = subprocess.CompletedProcess([], imports, "", "ImportError: no\n")
    monkeypatch.setattr(machine_checks, "_run", lambda *_: done)
    monkeypatch.setattr(machine_checks, "_version", lambda name: version)
    monkeypatch.setattr(machine_checks, "_wanted", lambda package: "<2.61,>=2.50")
    found = machine_checks._ray_check()
    assert found.status == expected
    assert text in found.found


@pytest.mark.parametrize("target", ["nowhere", "0.0.0.0:1", "example.com:50051"])
def test_doctor_names_a_wrong_or_insecure_address(target: str) -> None:
    done = call(target, "doctor", "--only", "server", "--json")
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1
    assert [(found["name"], found["status"]) for found in findings[1:]] == [("address", "error")]
    assert findings[-1]["advice"]


def test_doctor_says_so_when_nothing_listens() -> None:
    done = call("127.0.0.1:1", "doctor", "--only", "server")
    assert done.exit_code == 1
    assert "  error     port: nothing listens at 127.0.0.1:1\n            start a server" in done.stdout
    assert done.stdout.endswith("\n1 error, 0 warnings\n")


@contextmanager
def mute() -> Iterator[str]:
    """A program that takes connections and says nothing; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        taken = []

        def accept() -> None:
            while True:
                try:
                    taken.append(listening.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in taken:
                one.close()


def test_doctor_says_so_when_the_port_is_of_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_checks, "ANSWER_S", 0.5)
    with mute() as address:
        done = call(address, "doctor", "--only", "server", "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, last["name"], last["status"]) == (1, "answer", "error")


@pytest.mark.slow
def test_doctor_finds_a_healthy_server(address: str, client: LatticeClient) -> None:
    ended(client, greet, {"name": "x"})  # Its node has joined then.
    done = call(address, "doctor", "--only", "server", "--json")
    findings = {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert done.exit_code == 0
    assert {findings[name]["status"] for name in ("address", "port", "answer", "version", "clock", "nodes")} == {"ok"}
    assert findings["queue"]["found"].startswith("0 tasks are queued")
    assert "0 errors, 0 warnings" in at_terminal(address, "doctor", "--only", "server").stdout


@pytest.mark.slow
def test_doctor_finds_a_server_without_nodes_and_a_queue_that_cannot_move() -> None:
    with serving_aside(NoWorkers()) as address, LatticeClient(address) as client:
        done = call(address, "doctor", "--only", "server", "--json")
        findings = {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}
        assert done.exit_code == 1
        assert findings["nodes"]["status"] == "error"
        assert "lattice start --worker" in findings["nodes"]["advice"]
        assert client.server_info().queued_tasks == 0


@pytest.mark.slow
def test_doctor_names_the_task_that_waits_longest(address: str, client: LatticeClient, waiting: Run) -> None:
    next(event for event in waiting.events(timeout=WAIT_S) if event.type == "task_started")
    workflow = client.create_workflow()
    workflow.add_task(wide)
    run = workflow.run()
    done = call(address, "doctor", "--only", "server", "--json")
    client.cancel_run(run)
    queue = next(found for found in map(json.loads, done.stdout.splitlines()) if found["name"] == "queue")
    assert f"wide of run {run} has waited for" in queue["found"]
    assert f"lattice runs explain {run} wide" in queue["advice"]


@pytest.mark.slow
def test_doctor_checks_certificate_and_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lattice_server.security import read_tls

    files = certificates(tmp_path, "127.0.0.1")
    tls = read_tls(files.cert, files.key, None)
    monkeypatch.delenv("LATTICE_TOKEN", raising=False)
    with serving_aside(NoWorkers(), tls=tls, token="right") as address:

        def findings(**environment: str) -> dict[str, dict[str, str]]:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            done = call(address, "doctor", "--only", "server", "--json")
            assert "Traceback" not in done.output
            return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}

        assert findings()["answer"]["status"] == "error"
        found = findings(LATTICE_TLS_CA=str(files.ca))
        assert found["certificate"]["status"] in {"ok", "warning"}
        assert "LATTICE_TOKEN" in found["answer"]["advice"]
        assert found["answer"]["advice"] not in found["answer"]["found"]
        assert findings(LATTICE_TOKEN="wrong")["answer"]["status"] == "error"
        assert findings(LATTICE_TOKEN="right")["answer"]["status"] == "ok"
        found = findings(LATTICE_TLS_CA=str(files.stranger_ca))
        assert found["certificate"]["status"] == "error"
        assert "LATTICE_TLS_CA" in found["certificate"]["advice"]
