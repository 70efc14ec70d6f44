"""A worker that shares only the contract with this project: Node.js runs tasks of a Python client."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from lattice.v1 import cluster_pb2, cluster_pb2_grpc

from lattice_client import (
    AsyncLatticeClient,
    LatticeClient,
    PreconditionError,
    RunCancelledError,
    TaskFailedError,
    entrypoint,
    task,
)
from tests.certificates import certificates
from tests.e2e.conftest import served
from tests.e2e.proxy import Proxy
from tests.e2e.rooms import WAIT_S, Room, entered
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "nodejs-worker"
FUNCTIONS = Path(__file__).parent / "rooms.js"
NODE = "nodejs"

ENTER = entrypoint("js/enter", inputs=["room", "name"])
SUM = entrypoint("js/sum", inputs=["numbers"])
BOTH = entrypoint("js/both", inputs=["number"], outputs=["half", "double"])


@task
def numbers_to(most: int) -> list[int]:
    return list(range(1, most + 1))


@task
def told(**values: Any) -> dict[str, Any]:
    return values


@task
def repeated(text: str, times: int) -> str:
    return text * times


@task
def length(text: str) -> int:
    return len(text)


class NodejsWorker:
    """The worker as a process of its own, with the functions of `rooms.js` and two CPUs."""

    def __init__(self, address: str, functions: Path = FUNCTIONS) -> None:
        flags = ["--addr", address, "--node-id", NODE, "--num-cpus", "2", "--functions", str(functions)]
        command = ["node", str(EXAMPLE / "worker.js"), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def welcomed(self) -> str:
        """Wait until the server welcomes the worker, once more; return the line it prints then."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def leave(self) -> int:
        """Ask it to go, and return how it went."""
        self.process.terminate()
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        """End it as the kernel would, unless it is over."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server with a Python worker of two CPUs beside it."""
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js")
    subprocess.run(["make", "nodejs"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    with served("--executor", "local", "--num-cpus", "2") as found:
        yield found


@pytest.fixture
def worker(address: str) -> Iterator[NodejsWorker]:
    """The worker, connected."""
    started = NodejsWorker(address)
    assert started.welcomed().startswith("began session")
    yield started
    started.kill()


def node_of(client: LatticeClient) -> cluster_pb2.Node:
    """Return the worker's node as the server shows it."""
    (found,) = [node for node in client.nodes() if node.node_id == NODE]
    return found


def attempts_of(client: LatticeClient, run: str) -> dict[str, tuple[int, str]]:
    """Return the number of each task's last attempt, and where it ran."""
    return {found.task_id: (found.attempt, found.node_id) for found in client.list_tasks(run)}


def test_the_unit_tests_of_the_example_pass(address: str) -> None:
    done = subprocess.run(["npm", "test"], cwd=EXAMPLE, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_lock_names_no_place_to_download_from() -> None:
    assert "http" not in (EXAMPLE / "package-lock.json").read_text()


def test_the_functions_of_the_example_return_their_results(address: str, client: LatticeClient) -> None:
    example = NodejsWorker(address, EXAMPLE / "functions.js")
    try:
        example.welcomed()
        node = node_of(client)
        assert list(node.entrypoints) == ["js/sleep", "js/square_root", "js/word_count"]
        assert (node.runtime.language, node.worker_pid, node.capacity.cpu) == ("node", example.process.pid, 2)
        assert node.runtime.version[0].isdigit()
        words = client.run_task(entrypoint("js/word_count", inputs=["text"]), {"text": "Ein Wort, ein Satz"})
        assert words == {"result": {"ein": 2, "wort": 1, "satz": 1}}
        assert client.run_task(entrypoint("js/square_root"), {"x": 9}) == {"result": 3}
        assert client.run_task(entrypoint("js/sleep"), {"seconds": 0.01}) == {"result": 0.01}
        with pytest.raises(TaskFailedError, match="-1 has no square root"):
            client.run_task(entrypoint("js/square_root"), {"x": -1})
        with pytest.raises(PreconditionError, match="node 'nodejs': it has no entry point 'js/other'"):
            client.run_task(entrypoint("js/other"), {})
        assert example.leave() == 0
    finally:
        example.kill()


@pytest.mark.usefixtures("worker")
def test_values_go_from_one_language_to_the_other_and_back(client: LatticeClient) -> None:
    workflow = client.create_workflow("two languages")
    numbers = workflow.add_task(numbers_to, {"most": 4})
    both = workflow.add_task(BOTH, {"number": 10})
    wired = {"numbers": [numbers.output, both.outputs["half"]], "text": "ä\u2028"}
    shown = workflow.add_task(told, {"wired": wired, "double": both.outputs["double"]})
    total = workflow.add_task(
        entrypoint("js/sum", inputs=["numbers", "more"]),
        {"numbers": [both.outputs["double"], 1, both.outputs["half"]], "more": {"x": 0.5, "y": both.outputs["half"]}},
    )
    workflow.add_task(told, {"shown": shown.output, "total": total.output}, "end")
    run = workflow.run()
    shown_there = {"wired": {"numbers": [[1, 2, 3, 4], 5], "text": "ä\u2028"}, "double": 20}
    assert run.result(WAIT_S) == {"result": {"shown": shown_there, "total": 31.5}}
    places = {task_id: place for task_id, (_, place) in attempts_of(client, run).items()}
    assert {places[both.task_id], places[total.task_id]} == {NODE}
    assert NODE not in {places[numbers.task_id], places[shown.task_id]}


@pytest.mark.usefixtures("worker")
def test_maps_and_batches(client: LatticeClient) -> None:
    workflow = client.create_workflow("squares")
    sizes = workflow.add_task(entrypoint("js/range", inputs=["size"]), {"size": 10})
    squares = entrypoint("js/squares", inputs=["x"], batch_size=4, batch_timeout=0.05)
    total = workflow.add_task(SUM, {"numbers": workflow.map(squares, sizes.output).output})
    workflow.add_task(told, {"total": total.output})
    assert workflow.run().result(WAIT_S) == {"result": {"total": 285}}
    # An error in the list fails its item alone.
    workflow = client.create_workflow("squares", failure_policy="finish_independent")
    squares = entrypoint("js/squares", inputs=["x"], batch_size=3, batch_timeout=1.0)
    members = [workflow.add_task(squares, {"x": x}) for x in (2, -1, 3)]
    run = workflow.run()
    with pytest.raises(TaskFailedError, match="RangeError: -1 is below zero"):
        run.result(WAIT_S)
    states = {found.task_id: found.outputs["result"].json for found in client.list_tasks(run, True) if found.outputs}
    assert states == {members[0].task_id: "4", members[2].task_id: "9"}


@pytest.mark.usefixtures("worker")
def test_parts_of_outputs_are_selected(client: LatticeClient) -> None:
    workflow = client.create_workflow("parts")
    numbers = workflow.add_task(entrypoint("js/range", inputs=["size"]), {"size": 5})
    told_numbers = workflow.add_task(told, {"numbers": numbers.output})
    workflow.add_task(SUM, {"numbers": [told_numbers.output["numbers"][-1], numbers.output[1]]})
    assert workflow.run().result(WAIT_S) == {"result": 5}
    workflow = client.create_workflow("parts")
    numbers = workflow.add_task(entrypoint("js/range", inputs=["size"]), {"size": 5})
    workflow.add_task(SUM, {"numbers": [numbers.output[5]]})
    with pytest.raises(TaskFailedError, match=r"no part \[5\]"):
        workflow.run().result(WAIT_S)


@pytest.mark.usefixtures("worker")
def test_chains_of_short_tasks_go_out_together(client: LatticeClient) -> None:
    # Once it is known how long they take, a task is sent along with the one it needs.
    for _ in range(3):
        workflow = client.create_workflow("chain")
        last: Any = 0
        for _ in range(20):
            last = workflow.add_task(SUM, {"numbers": [last, 1]}).output
        assert workflow.run().result(WAIT_S) == {"result": 20}


@pytest.mark.usefixtures("worker")
def test_large_values_stay_on_their_node_until_they_are_read(client: LatticeClient) -> None:
    js_length = entrypoint("js/length", inputs=["text"])
    workflow = client.create_workflow("large")
    theirs = workflow.add_task(entrypoint("js/repeat", inputs=["text", "times"]), {"text": "é", "times": 400_000})
    ours = workflow.add_task(repeated, {"text": "é", "times": 2_000_000})
    found = [
        workflow.add_task(length, {"text": theirs.output}),
        workflow.add_task(js_length, {"text": theirs.output}),
        workflow.add_task(js_length, {"text": ours.output}),
        workflow.add_task(js_length, {"text": "é" * 300_000}),
    ]
    workflow.add_task(told, {"text": theirs.output, "found": [one.output for one in found]})
    text = {"text": "é" * 400_000, "found": [400_000, 400_000, 2_000_000, 300_000]}
    assert workflow.run().result(WAIT_S) == {"result": text}
    again = client.create_workflow("large")
    again.add_task(entrypoint("js/repeat"), {"text": "é", "times": 400_000})
    assert again.run().result(WAIT_S) == {"result": "é" * 400_000}


@pytest.mark.usefixtures("worker")
def test_an_error_comes_with_its_type_and_stack(client: LatticeClient) -> None:
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(entrypoint("js/fail"), {"message": "no such wolf"})
    assert (caught.value.kind, caught.value.task_id) == ("USER_ERROR", "fail")
    assert "TypeError: no such wolf" in str(caught.value)
    assert "rooms.js" in caught.value.remote_traceback
    workflow = client.create_workflow("again")
    again = entrypoint("js/fail", retries=1, retry_on=TypeError, retry_backoff=0.01)
    workflow.add_task(again, {"message": "no"})
    run = workflow.run()
    with pytest.raises(TaskFailedError):
        run.result(WAIT_S)
    assert attempts_of(client, run)["fail"] == (2, NODE)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("path", "outputs", "inputs"),
    [("js/sum", ["a", "b"], {"numbers": [1]}), ("js/sum", None, {"numbers": {1, 2}})],
)
def test_a_task_fails_with_payload_when_its_values_cannot_travel(
    client: LatticeClient, path: str, outputs: list[str] | None, inputs: dict[str, Any]
) -> None:
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(entrypoint(path, outputs=outputs), inputs)
    assert caught.value.kind == "PAYLOAD"


@pytest.mark.usefixtures("worker")
def test_a_worker_runs_as_many_calls_in_parallel_as_it_has_cpus(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow("crowd")
    tasks = [workflow.add_task(ENTER, {"room": str(room), "name": name}) for name in "abc"]
    run = workflow.run()
    entered(run, tasks[0].task_id, tasks[1].task_id)
    room.open()
    run.result(WAIT_S)
    assert room.crowd() == 2
    assert len(room.notes()) == 6


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("path", ["js/enter", "js/stay"])
def test_a_cancelled_task_ends_when_it_ignores_the_cancellation_too(
    client: LatticeClient, room: Room, path: str
) -> None:
    workflow = client.create_workflow("cancelled")
    added = workflow.add_task(entrypoint(path), {"room": str(room), "name": "a"})
    run = workflow.run()
    entered(run, added.task_id)
    run.cancel("enough")
    with pytest.raises(RunCancelledError, match="enough"):
        run.result(WAIT_S)
    # Its slot is free again.
    assert client.run_task(SUM, {"numbers": [1, 2]}) == {"result": 3}
    assert room.notes() == (["+a", "!a"] if path == "js/enter" else ["+a"])


@pytest.mark.usefixtures("worker")
def test_an_attempt_succeeds_within_its_time_limit(client: LatticeClient, room: Room) -> None:
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(entrypoint("js/enter", timeout=0.2), {"room": str(room), "name": "a"})
    assert caught.value.kind == "TIMEOUT"
    assert room.notes() == ["+a", "!a"]


@pytest.mark.usefixtures("worker")
def test_a_time_limit_may_be_longer_than_a_timer_can_wait(client: LatticeClient, room: Room) -> None:
    workflow = client.create_workflow("patient")
    added = workflow.add_task(entrypoint("js/enter", timeout=29 * 86400), {"room": str(room), "name": "a"})
    run = workflow.run()
    entered(run, added.task_id)
    room.open()
    assert run.result(WAIT_S) == {"result": "a"}


def test_a_server_on_this_machine_is_dialled_by_no_proxy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    worker = NodejsWorker(address)
    try:
        assert worker.welcomed().startswith("began session")
        assert worker.leave() == 0
    finally:
        worker.kill()


def test_a_server_that_asks_for_a_token_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = certificates(tmp_path)
    monkeypatch.setenv("LATTICE_TOKEN", "the-right-one")
    monkeypatch.setenv("LATTICE_TLS_CA", str(found.ca))
    flags = ["--executor", "local", "--num-cpus", "1", "--tls-cert", str(found.cert), "--tls-key", str(found.key)]
    with served(*flags) as address, LatticeClient(address) as client:
        worker = NodejsWorker(address)
        try:
            assert worker.welcomed().startswith("began session")
            # A value that is too long for a message is sent by separate calls, which need the token as well.
            text = client.run_task(entrypoint("js/repeat"), {"text": "a", "times": 400_000})
            assert client.run_task(entrypoint("js/length"), {"text": text["result"]}) == {"result": 400_000}
            monkeypatch.setenv("LATTICE_TOKEN", "another")
            stranger = NodejsWorker(address)
            assert stranger.process.wait(WAIT_S) == 1
            assert worker.leave() == 0
        finally:
            worker.kill()


def unused_address() -> str:
    """Return an address that has no server."""
    return f"127.0.0.1:{free_port()}"


@pytest.mark.usefixtures("address")
def test_a_worker_ends_when_there_is_no_server() -> None:
    command = ["node", str(EXAMPLE / "worker.js"), "--addr", unused_address(), "--give-up", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert "there was no server at 127.0.0.1:" in done.stderr
    assert "for 0.5 s" in done.stderr


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--adr", "x"], "Unknown option '--adr'"),
        (["--addr"], "argument missing"),
        (["--addr", "example.test:1"], "example.test:1 is beyond this machine: set LATTICE_TOKEN"),
        (["--num-cpus", "many"], "--num-cpus must be a number from 0, not 'many'"),
    ],
)
def test_a_worker_with_wrong_flags_ends_with_one_line(flags: list[str], text: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LATTICE_")}
    command = ["node", str(EXAMPLE / "worker.js"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("address")
def test_a_worker_without_leases_leaves_when_the_server_is_unreachable() -> None:
    command = ["node", str(EXAMPLE / "worker.js"), "--addr", unused_address(), "--give-up", "1000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "the stream broke" in process.stderr.readline()
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_the_next_worker_runs_the_attempts_of_a_killed_one(
    address: str, client: LatticeClient, worker: NodejsWorker, room: Room
) -> None:
    workflow = client.create_workflow("killed")
    added = workflow.add_task(ENTER, {"room": str(room), "name": "a"})
    workflow.add_task(told, {"found": added.output})
    run = workflow.run()
    entered(run, added.task_id)
    worker.kill()
    second = NodejsWorker(address)
    try:
        second.welcomed()
        room.open()
        assert run.result(WAIT_S) == {"result": {"found": "a"}}
        retries = [event.data["failure"] for event in run.events() if event.type == "task_retrying"]
        assert [failure["kind"] for failure in retries] == ["WORKER_LOST"]
        assert attempts_of(client, run)[added.task_id] == (2, NODE)
        assert room.notes() == ["+a", "+a", "-a"]
    finally:
        second.kill()


def test_a_broken_stream_is_resumed_and_nothing_runs_twice(address: str, room: Room) -> None:
    async def scenario() -> None:
        proxy = Proxy(address)
        worker = NodejsWorker(await proxy.start())
        try:
            async with asyncio.timeout(WAIT_S), AsyncLatticeClient(address) as client:
                first = await asyncio.to_thread(worker.welcomed)
                workflow = client.create_workflow("cut")
                for name in "abc":
                    workflow.add_task(ENTER, {"room": str(room), "name": name})
                run = await workflow.run()
                logs = 0
                async for event in run.events():
                    if event.type == "task_log" and (logs := logs + 1) == 2:
                        break
                # It reconnects twice: while its attempt still runs, and after an attempt has ended meanwhile.
                proxy.cut()
                session = first.split()[2]
                assert (await asyncio.to_thread(worker.welcomed)).startswith(f"resumed session {session}")
                await proxy.cut_and_refuse(1)
                room.open()
                proxy.is_refusing = False
                assert (await asyncio.to_thread(worker.welcomed)).startswith(f"resumed session {session}")
                assert len(await run.result()) == 3
                assert not [event async for event in run.events() if event.type == "task_retrying"]
            assert sorted(room.notes()) == ["+a", "+b", "+c", "-a", "-b", "-c"]
            assert await asyncio.to_thread(worker.leave) == 0
        finally:
            worker.kill()
            await proxy.stop()

    asyncio.run(scenario())


def test_a_worker_opens_another_stream_when_one_is_silent(address: str, room: Room) -> None:
    async def scenario() -> None:
        proxy = Proxy(address)
        worker = NodejsWorker(await proxy.start())
        try:
            async with asyncio.timeout(WAIT_S), AsyncLatticeClient(address) as client:
                session = (await asyncio.to_thread(worker.welcomed)).split()[2]
                workflow = client.create_workflow("silent")
                workflow.add_task(ENTER, {"room": str(room), "name": "a"})
                run = await workflow.run()
                async for event in run.events():
                    if event.type == "task_log":
                        break
                proxy.silence()
                assert (await asyncio.to_thread(worker.welcomed)).startswith(f"resumed session {session}")
                room.open()
                assert await run.result() == {"result": "a"}
            assert room.notes() == ["+a", "-a"]
            assert await asyncio.to_thread(worker.leave) == 0
        finally:
            worker.kill()
            await proxy.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["drained", "asked to leave"])
def test_a_leaving_worker_finishes_its_leases(
    address: str, client: LatticeClient, worker: NodejsWorker, room: Room, how: str
) -> None:
    workflow = client.create_workflow("leaving")
    added = workflow.add_task(ENTER, {"room": str(room), "name": "a"})
    run = workflow.run()
    entered(run, added.task_id)
    if how == "drained":
        with grpc.insecure_channel(address) as channel:
            request = cluster_pb2.DrainNodeRequest(node_id=NODE)
            answer = cluster_pb2_grpc.ClusterServiceStub(channel).DrainNode(request, timeout=WAIT_S)
        assert answer.node.state == cluster_pb2.NODE_STATE_DRAINING
    else:
        os.kill(worker.process.pid, signal.SIGTERM)
    room.open()
    assert run.result(WAIT_S) == {"result": "a"}
    assert worker.process.wait(WAIT_S) == 0
    assert NODE not in {node.node_id for node in client.nodes()}
    assert room.notes() == ["+a", "-a"]
