"""Tasks that ask for a level of isolation, through a server and its workers."""

import mmap
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lattice.v1 import resources_pb2

from lattice_client import InvalidArgumentError, LatticeClient, TaskFailedError, task
from tests.client.shell import call
from tests.e2e.conftest import OFFERS, served
from tests.e2e.test_code import run

LEVELS = ("subprocess", "seccomp")
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def sandboxed() -> Iterator[LatticeClient]:
    """A client of a server with a local worker."""
    with served("--executor", "local", *OFFERS) as address, LatticeClient(address) as client:
        yield client


def result(client: LatticeClient, function: Callable[..., Any], level: str, **settings: Any) -> Any:
    workflow = client.create_workflow()
    workflow.add_task(task(isolation=level, **settings)(function))
    return workflow.run().result(timeout=60)["result"]


def failure(client: LatticeClient, function: Callable[..., Any], level: str, **settings: Any) -> tuple[str, str]:
    with pytest.raises(TaskFailedError) as raised:
        result(client, function, level, **settings)
    return raised.value.kind, str(raised.value)


@pytest.mark.parametrize("level", LEVELS)
def test_task_runs_in_a_process_that_is_used_once(sandboxed: LatticeClient, level: str) -> None:
    @task(isolation=level)
    def leave(number: int) -> list[Any]:
        found = [os.getuid() != 0, os.getcwd(), os.listdir("."), "LEFT" in os.environ, number]
        Path("left").write_text("x")
        os.environ["LEFT"] = "x"
        return found

    workflow = sandboxed.create_workflow()
    for number in range(6):
        workflow.add_task(leave, {"number": number}, f"t{number}")
    results = workflow.run().result(timeout=60)
    assert sorted(found["result"] for found in results.values()) == [
        [True, "/tmp", [], False, number] for number in range(6)
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_large_values_go_into_a_sandbox_and_out_of_it(sandboxed: LatticeClient, level: str) -> None:
    @task
    def make() -> Any:
        return np.arange(1_000_000)

    @task(isolation=level)
    def double(values: Any) -> Any:
        return values * 2

    @task
    def total(values: Any) -> int:
        return int(values.sum())

    workflow = sandboxed.create_workflow()
    made = workflow.add_task(make)
    doubled = workflow.add_task(double, {"values": made.output})
    workflow.add_task(total, {"values": doubled.output})
    assert workflow.run().result(timeout=60)["result"] == 999_999_000_000


@pytest.mark.parametrize("level", LEVELS)
def test_errors_of_a_sandbox_travel_as_text(sandboxed: LatticeClient, level: str) -> None:
    class Hostile(Exception):
        def __reduce__(self) -> Any:
            return os.system, ("touch /tmp/lattice-was-here",)

    def fail() -> None:
        raise Hostile("broken")

    kind, text = failure(sandboxed, fail, level)
    assert (kind, "Hostile" in text, "broken" in text) == ("USER_ERROR", True, True)
    assert not Path("/tmp/lattice-was-here").exists()


@pytest.mark.parametrize("level", LEVELS)
def test_limits_end_a_sandbox_with_their_kind(sandboxed: LatticeClient, level: str) -> None:
    def sleep() -> None:
        time.sleep(60)

    def return_much() -> bytes:
        return bytes(80 * MIB)

    def use_children() -> None:
        for _ in range(4):
            if not os.fork():
                kept = bytearray(os.urandom(MIB) * 100)
                time.sleep(60 + len(kept))
        time.sleep(60)

    def crash() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    assert failure(sandboxed, sleep, level, timeout=1)[0] == "TIMEOUT"
    assert failure(sandboxed, return_much, level)[0] == "OUTPUT_SIZE"
    assert failure(sandboxed, use_children, level, resources={"cpu": 1, "cpu_mem": 200})[0] == "OUT_OF_MEMORY"
    assert failure(sandboxed, crash, level)[0] == "CRASHED"


@pytest.mark.parametrize("level", LEVELS)
def test_coroutines_and_batches_run_in_a_sandbox(sandboxed: LatticeClient, level: str) -> None:
    @task(isolation=level)
    async def wait() -> int:
        return os.getpid()

    @task(isolation=level, batch_size=2, batch_timeout=5)
    def pair(numbers: list[int]) -> list[int]:
        return [number * len(numbers) for number in numbers]

    workflow = sandboxed.create_workflow()
    workflow.add_task(wait, {}, "w")
    for number in (1, 2):
        workflow.add_task(pair, {"numbers": number}, f"p{number}")
    results = workflow.run().result(timeout=60)
    assert sorted(found["result"] for found in results.values()) == [2, 2, 4]


def test_network_error_names_the_addresses_a_sandbox_may_reach(sandboxed: LatticeClient) -> None:
    def connect() -> None:
        socket.create_connection(("127.0.0.1", 1))

    def resolve() -> None:
        socket.gethostbyname("name.invalid")

    def become_root() -> None:
        os.setuid(0)

    advice = "\nthis sandbox has no network: name the servers that the task needs, as network=['example.com:443']\n"
    assert advice in failure(sandboxed, connect, "seccomp")[1]
    for level in LEVELS:
        assert advice in failure(sandboxed, resolve, level)[1]
        assert "this sandbox" not in failure(sandboxed, become_root, level)[1]
    listed = failure(sandboxed, resolve, "seccomp", network=["other.invalid:443"])[1]
    assert "\nthis sandbox reaches only the servers that network=[...] of the task lists\n" in listed


SPAWNING = """
import multiprocessing
from lattice_client import LatticeClient, task

def double(number):
    return 2 * number

@task(timeout=60)
def spread(method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.map(double, [1, 2])

with LatticeClient() as client:
    for level in ("subprocess", "seccomp"):
        for method in ("spawn", "forkserver", "fork"):
            print(client.run_task(spread.with_(isolation=level), {"method": method})["result"])
"""


def test_processes_that_a_sandboxed_task_starts_have_its_script(sandboxed: LatticeClient, tmp_path: Path) -> None:
    done = run(sandboxed.target, tmp_path, {"script.py": SPAWNING}, "script.py")
    assert done.stdout == "[2, 4]\n" * 6, done.stderr


def test_node_lists_the_levels_it_can_set_up(sandboxed: LatticeClient) -> None:
    (node,) = sandboxed.nodes()
    levels = {resources_pb2.Isolation.Name(level) for level in node.isolations}
    assert levels == {"ISOLATION_NONE", "ISOLATION_SUBPROCESS", "ISOLATION_SECCOMP"}


def test_kernel_limits_memory_when_a_control_group_is_delegated(
    delegated_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use_memory() -> None:
        # Shared memory, which no limit of a process counts.
        area = mmap.mmap(-1, 400 * MIB)
        for offset in range(0, len(area), 4096):
            area[offset] = 1
        time.sleep(60)

    monkeypatch.setenv("LATTICE_CGROUP", str(delegated_group))
    with served("--executor", "local", *OFFERS) as address, LatticeClient(address) as client:
        kind, message = failure(client, use_memory, "seccomp", resources={"cpu": 1, "cpu_mem": 200})
        (node,) = client.nodes()
        assert "the memory of sandboxes is limited by the kernel (cgroup)" in call(address, "nodes").stdout
    assert kind == "OUT_OF_MEMORY"
    assert f"its processes ran out of memory, and the limit is {200 * MIB}" in message
    assert node.memory_enforcement == resources_pb2.MEMORY_ENFORCEMENT_CGROUP


def test_node_says_that_it_measures_memory_when_no_control_group_is_delegated(sandboxed: LatticeClient) -> None:
    (node,) = sandboxed.nodes()
    assert node.memory_enforcement == resources_pb2.MEMORY_ENFORCEMENT_MEASURED


def shrink_shared_memory() -> None:
    """Shrink each file in memory that this process has."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:" in os.readlink(f"/proc/self/fd/{name}"):
                os.ftruncate(int(name), 0)
        except OSError:
            continue
    time.sleep(0.3)
    os.write(1, b"output that the agent reads\n")
    time.sleep(0.3)


def become_traced() -> None:
    """Have the parent be told of each signal, and stop at one."""
    import ctypes

    if ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("level", ["none", *LEVELS])
@pytest.mark.parametrize(("attack", "kind"), [(shrink_shared_memory, ""), (become_traced, "CRASHED")])
def test_attack_on_shared_memory_or_the_parent_ends_nothing_else(
    sandboxed: LatticeClient, tmp_path: Path, level: str, attack: Callable[..., Any], kind: str
) -> None:
    (before,) = sandboxed.nodes()

    @task(cpu=0.1)
    def wait(door: str) -> str:
        while not Path(door).exists():
            time.sleep(0.01)
        return "out"

    door = tmp_path / "door"
    workflow = sandboxed.create_workflow()
    workflow.add_task(wait, {"door": str(door)})
    other = workflow.run()
    next(event for event in other.events(timeout=60) if event.type == "task_started")
    if kind:
        assert failure(sandboxed, attack, level, timeout=20)[0] == kind
    else:
        assert result(sandboxed, attack, level, timeout=20) is None
    door.touch()
    assert other.result(timeout=60) == {"result": "out"}
    assert [found.attempt for found in sandboxed.list_tasks(other)] == [1]
    (after,) = sandboxed.nodes()
    assert after.worker_pid == before.worker_pid


def forge_output() -> None:
    """Write frames of output by the descriptor of the runner itself."""
    import gc

    (output,) = (found for found in gc.get_objects() if type(found).__name__ == "Output")
    for _ in range(60):
        output._channel.send(output._header([["stdout", "x" * 200_000 + "\n"]], truncated=False))


@pytest.mark.parametrize("level", LEVELS)
def test_output_that_a_task_forges_is_cut_too(sandboxed: LatticeClient, level: str) -> None:
    workflow = sandboxed.create_workflow()
    workflow.add_task(task(isolation=level)(forge_output))
    started = workflow.run()
    started.result(timeout=60)
    logged = [event.data for event in started.events() if event.type == "task_log"]
    assert MIB <= sum(len(data["text"]) for data in logged) <= MIB + 400_000
    assert logged[-1]["truncated"]


@pytest.fixture(scope="module")
def strict() -> Iterator[LatticeClient]:
    """A client of a server that runs no task without isolation."""
    flags = ("--executor", "local", "--min-isolation", "subprocess")
    with served(*flags, *OFFERS) as address, LatticeClient(address) as client:
        yield client


def test_tasks_of_a_server_with_a_least_level_have_at_least_that_one(strict: LatticeClient) -> None:
    def user() -> int:
        return os.getuid()

    @task
    def double(number: int) -> list[int]:
        return [2 * number, os.getuid()]

    @task
    def spawns() -> list[int]:
        from lattice_client import context

        context.spawn(double, {"number": 2})
        return [1, 2]

    for level in ("", "subprocess", "seccomp"):
        assert strict.run_task(task(isolation=level, name="user")(user))["result"] != os.getuid()
    workflow = strict.create_workflow()
    each = workflow.map(double, {"number": workflow.add_task(spawns).output})
    run = workflow.run()
    run.result(timeout=60)
    assert all(uid != os.getuid() for _, uid in run.output(each.task_id))
    (spawned,) = (found.task_id for found in strict.list_tasks(run) if found.parent_task_id == "spawns")
    assert run.output(spawned)[1] != os.getuid()
    with pytest.raises(InvalidArgumentError, match="this server runs tasks at isolation subprocess at least"):
        strict.run_task(task(isolation="none", name="user")(user))
