"""The level `docker` with a real engine: what code tries in a container, its limits, and the end of containers."""

import asyncio
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from lattice_client import LatticeClient, TaskFailedError, secret, task
from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.containers import LABEL, Containers
from lattice_worker.containers.supervisor import ContainerSupervisor
from lattice_worker.pool.invocation import RunnerKey
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.sandbox.policy import DOCKER, LEVELS, MIB, Policy, container_policy
from lattice_worker.sandbox.supervisor import SandboxError
from lattice_worker.store.artifact_staging import ArtifactStaging
from tests.containers.engines import Gate, engine, lack
from tests.e2e.conftest import served
from tests.sandbox import attempts, connections, test_honest_code
from tests.sandbox.boxes import Box

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.skipif(bool(lack()), reason=lack())]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of an engine with the image."""
    with engine() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATTICE_DOCKER_HOST", found)
        # The image does not have the tests.
        for module in (attempts, test_honest_code):
            cloudpickle.register_pickle_by_value(module)
        yield found
        for module in (attempts, test_honest_code):
            cloudpickle.unregister_pickle_by_value(module)


def small() -> Policy:
    return dataclasses.replace(container_policy(), scratch_bytes=32 * MIB, shared_memory_bytes=32 * MIB, cpu_s=60)


def in_container(address: str, policy: Policy, act: Callable[[Box], Awaitable[Any]]) -> Any:
    """Return what `act` returns for a container of a policy."""

    async def scenario() -> Any:
        containers = Containers(EngineConfig(address))
        box = Box(policy, Path(), supervisor := ContainerSupervisor(policy, containers))
        try:
            return await act(await box.start(supervisor))
        finally:
            await box.close()
            await containers.close()

    return asyncio.run(scenario())


def value(address: str, function: Callable[..., Any], *args: Any, policy: Policy | None = None) -> Any:
    return in_container(address, policy or small(), lambda box: box.run(function, *args))


def listed(address: str) -> list[dict[str, Any]]:
    """Return all containers of an engine, ended ones included."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address.removeprefix("unix://"))
        connection.sendall(b"GET /containers/json?all=1 HTTP/1.0\r\nHost: engine\r\n\r\n")
        answer = b"".join(iter(functools.partial(connection.recv, 65536), b""))
    return list(json.loads(answer.partition(b"\r\n\r\n")[2]))


def settle(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# One test of the level through a server; the others are for `make test-all`.


def test_tasks_run_in_containers_of_their_own(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_TEST_KEY", "key-of-a-container")

    @task
    def make() -> Any:
        return np.arange(200_000)

    @task(isolation="docker")
    def double(values: Any) -> Any:
        Path("left").write_text("x")
        print("said in a container")
        return values * 2

    @task(isolation="docker")
    def look(values: Any) -> list[Any]:
        return [os.getuid(), os.getcwd(), os.listdir("."), socket.gethostname(), int(values.sum())]

    @task(isolation="docker")
    def tell() -> list[str]:
        print(f"the key is {os.environ['KEY']}")
        return [os.environ["KEY"], os.environ["CITY"]]

    @task(isolation="docker", resources={"cpu": 1, "cpu_mem": 128})
    def use_children() -> None:
        for _ in range(4):
            if not os.fork():
                kept = bytearray(os.urandom(MIB) * 50)
                time.sleep(60 + len(kept))
        time.sleep(60)

    with served("--executor", "local", "--num-cpus", "4") as server, LatticeClient(server) as client:
        (node,) = client.nodes()
        assert len(node.isolations) == 4
        workflow = client.create_workflow()
        doubled = workflow.add_task(double, {"values": workflow.add_task(make).output})
        workflow.add_task(look, {"values": doubled.output})
        found = workflow.run().result(timeout=60)["result"]
        assert found == [65532, "/tmp", [], "lattice", 2 * sum(range(200_000))]
        secretive = client.create_workflow(env={"KEY": secret("LATTICE_TEST_KEY"), "CITY": "Paris"})
        secretive.add_task(tell)
        run = secretive.run()
        assert run.result(timeout=60)["result"] == ["key-of-a-container", "Paris"]
        assert [event.data["text"] for event in run.events() if event.type == "task_log"] == ["the key is ***\n"]
        failing = client.create_workflow()
        failing.add_task(use_children)
        with pytest.raises(TaskFailedError) as raised:
            failing.run().result(timeout=60)
        assert raised.value.kind == "OUT_OF_MEMORY"
    # A worker that ends waits 10 s at most; an engine that is slower removes them by itself.
    settle(lambda: listed(address) == [])


@pytest.fixture(scope="module")
def verdicts(address: str) -> dict[str, str]:
    """The verdict of each attempt."""
    with (
        tempfile.TemporaryDirectory(prefix="lattice-t-") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as unnamed,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other,
    ):
        abstract = f"\0lattice-test-{os.getpid()}"
        for sock, path in ((named, f"{folder}/s"), (unnamed, abstract)):
            sock.bind(path)
            sock.listen()
        for name in ("token", "public"):
            Path(folder, name).write_text(name)
        outside = {"token": f"{folder}/token", "public": f"{folder}/public", "pid": other.pid}
        outside |= {"port": server.getsockname()[1], "unix": f"{folder}/s", "abstract": abstract}
        source = str(Path(attempts.__file__).parent)

        def make(found: attempts.Outside) -> Any:
            sys.path.insert(0, source)
            import attempts

            return attempts.verdicts(found)

        yield value(address, make, outside, policy=dataclasses.replace(small(), read_paths=(source,)))
        other.communicate(b"\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", attempts.ATTEMPTS)
def test_attempt_has_the_verdict_of_the_level_seccomp(name: str, verdicts: dict[str, str]) -> None:
    expected = attempts.ATTEMPTS[name].seccomp
    # The control group counts processes independently of the limit of their user.
    if expected and name != "raise_limit_of_processes":
        assert verdicts[name].startswith(expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("function", "expected"),
    test_honest_code.EXPECTED,
    ids=[function.__name__ for function, _ in test_honest_code.EXPECTED],
)
def test_honest_code_works(address: str, function: Callable[[], object], expected: object) -> None:
    assert value(address, function, policy=container_policy()) == expected


@pytest.mark.exhaustive
def test_code_of_the_task_can_be_imported_and_not_changed(address: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "helper_of_task.py").write_text("ANSWER = 42\n")

    def run(folder: str) -> list[object]:
        sys.path.insert(0, folder)
        import helper_of_task  # type: ignore[import-not-found]

        try:
            Path(folder, "helper_of_task.py").write_text("")
        except OSError:
            return [helper_of_task.ANSWER, "refused"]
        return [helper_of_task.ANSWER, "changed"]

    assert value(address, run, str(bundle), policy=container_policy(str(bundle))) == [42, "refused"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "use",
    [
        attempts.use_private_memory,
        attempts.use_shared_memory,
        attempts.use_memory_in_children,
        attempts.use_files_in_memory,
        attempts.use_scratch,
    ],
)
def test_container_is_ended_when_it_uses_too_much_memory(address: str, use: Callable[..., None]) -> None:
    async def act(box: Box) -> tuple[int, Any]:
        box.watch(0)
        box.send(use)
        status = await box.end()
        return status, box.supervisor.crash(status, 0.0)

    status, failure = in_container(address, container_policy("", 100 * MIB), act)
    assert (status, failure) == (
        -signal.SIGKILL,
        ("out_of_memory", f"its container used more than {100 * MIB} bytes of memory"),
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM])
def test_container_ends_with_the_signal_that_killed_its_runner(address: str, number: int) -> None:
    async def act(box: Box) -> tuple[int, Any]:
        box.send(functools.partial(os.kill, 0, number))
        status = await box.end()
        return status, box.supervisor.crash(status, 0.0)

    assert in_container(address, small(), act) == (-number, None)


@pytest.mark.exhaustive
def test_crash_names_the_limit_of_processes_when_it_was_exceeded(address: str) -> None:
    def crash() -> None:
        try:
            for _ in range(100):
                if not os.fork():
                    time.sleep(60)
        except OSError:
            os.abort()

    async def act(box: Box) -> Any:
        box.send(crash)
        return box.supervisor.crash(await box.end(), 0.0)

    text = "it was killed by signal 6 after it had tried to have more than 50 processes and threads"
    assert in_container(address, small(), act) == ("crashed", text)


@pytest.mark.exhaustive
def test_container_ends_with_the_status_of_its_runner(address: str) -> None:
    async def act(box: Box) -> int:
        box.send(os._exit, 137)
        return await box.end()

    assert in_container(address, small(), act) == 137


@pytest.mark.exhaustive
def test_first_process_outlives_signals_of_the_task(address: str) -> None:
    def attack() -> list[str]:
        found = []
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGCHLD):
            os.kill(1, number)
        for path in ("/proc/1/mem", "/proc/1/environ"):
            try:
                Path(path).read_bytes()
            except OSError as error:
                found.append(type(error).__name__)
        return [*found, *os.listdir("/lattice")]

    assert value(address, attack) == ["PermissionError", "PermissionError"]


@pytest.fixture(scope="module")
def connected(address: str) -> dict[str, Any]:
    """How each attempt to connect to a server ended in one container, and the accesses of it."""
    command = [sys.executable, "-m", "tests.sandbox.egress_program", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["docker"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", connections.ROWS)
def test_connection_ends_as_its_row_says(name: str, connected: dict[str, Any]) -> None:
    row, outcome = connections.ROWS[name], connected["outcomes"][name]
    assert (outcome.startswith(row.outcome), row.text in outcome) == (True, True), outcome
    accesses = [f"{access['host']}:{access['port']} {access['verdict']}" for access in connected["final"]]
    assert not row.access or row.access in accesses


@pytest.mark.exhaustive
def test_container_is_refused_when_it_does_not_hand_its_listening_sockets_over(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_TEST_BREAK", "network")
    with pytest.raises(SandboxError, match="the listening sockets of its network"):
        value(address, os.getpid, policy=container_policy(network=("a.invalid:443",)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", ["scratch", "environment", "limits", "filter"])
def test_container_is_refused_when_a_step_of_its_seal_is_left_out(
    address: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_TEST_BREAK", step)
    with pytest.raises(SandboxError, match="docker: missing"):
        value(address, os.getpid, policy=container_policy())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("option", "setting", "said"),
    [
        ("SecurityOpt", ["no-new-privileges", "seccomp=unconfined"], "the engine's system call filter"),
        ("SecurityOpt", [], "filter: PermissionError"),
        ("ReadonlyRootfs", False, "a root folder that is read-only"),
        ("Memory", 0, "the memory limit"),
        ("NanoCpus", 0, "the CPU limit"),
        ("PidsLimit", 0, "the limit of processes"),
        ("CapDrop", [], "an empty bounding set"),
        ("IpcMode", "host", "an? ipc namespace"),
        ("PidMode", "host", "ended before it was sealed"),
        ("Tmpfs", {}, "."),
    ],
)
def test_container_is_refused_when_the_engine_leaves_a_part_out(
    address: str, option: str, setting: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lattice_worker.containers import spec

    body = spec.body

    def weaker(*args: Any) -> dict[str, Any]:
        made = body(*args)
        made["HostConfig"][option] = setting
        if option == "Memory":
            made["HostConfig"]["MemorySwap"] = 0
        return made

    monkeypatch.setattr(spec, "body", weaker)
    with pytest.raises(SandboxError, match=said):
        value(address, os.getpid, policy=container_policy())


@pytest.mark.exhaustive
def test_containers_are_gone_when_their_agent_was_killed(address: str, short_path: Path) -> None:
    program = f"""
import asyncio, os, time
from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.containers import Containers

async def main():
    containers = Containers(EngineConfig({address!r}))
    await containers.open()
    labels = {{{LABEL!r}: containers._folder}}
    await containers._engine.create("lattice-never-started", {{"Cmd": ["-V"], "Labels": labels}})
    from tests.containers.test_docker import ContainerSupervisor, Box, Path, container_policy
    policy = container_policy()
    supervisor = ContainerSupervisor(policy, containers)
    box = await Box(policy, Path(), supervisor).start(supervisor)
    box.send(time.sleep, 600)  # It reads nothing meanwhile.
    print("started", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    environment = {**os.environ, "TMPDIR": str(short_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"started\n"
        states = {each["State"] for each in listed(address)}
        agent.kill()
    assert states == {"running", "created"}
    # The engine removes the container whose connection ended. The next agent removes the unstarted one.
    settle(lambda: {each["State"] for each in listed(address)} == {"created"})
    assert value(address, abs, -1) == 1
    assert listed(address) == []


@pytest.mark.exhaustive
def test_containers_of_an_agent_that_lives_are_left_alone(address: str) -> None:
    async def act(box: Box) -> Any:
        assert await asyncio.to_thread(value, address, abs, -2) == 2
        return await box.run(abs, -1)

    assert in_container(address, small(), act) == 1


@pytest.mark.exhaustive
def test_containers_end_and_the_agent_connects_again_when_the_engine_is_lost(address: str, short_path: Path) -> None:
    async def scenario(gate: Gate) -> list[Any]:
        containers = Containers(EngineConfig(gate.address))
        found: list[Any] = []
        for _ in range(2):
            box = Box(small(), Path(), supervisor := ContainerSupervisor(small(), containers))
            await box.start(supervisor)
            found.append(await box.run(abs, -1))
            if len(found) == 1:
                gate.cut()
                found.append(await box.end())
            await box.close()
        await containers.close()
        return found

    with Gate(address, short_path) as gate:
        assert asyncio.run(scenario(gate)) == [1, -signal.SIGKILL, 1]
    settle(lambda: listed(address) == [])


@pytest.mark.exhaustive
def test_level_is_offered_when_there_is_an_engine_and_spares_end_with_the_pool(address: str, tmp_path: Path) -> None:
    async def scenario() -> list[Any]:
        pool = Pool(1, staging, engine=EngineConfig(address))
        try:
            offered = await pool.levels()
            before = await asyncio.to_thread(listed, address)
            runner = pool.take_idle(RunnerKey(isolation=DOCKER, owner="a"))
            assert pool.take_idle(RunnerKey(isolation=DOCKER, owner="b")) is None
            with pytest.raises(SandboxError, match="no GPU"):
                await pool.take(RunnerKey(isolation=DOCKER, owner="c", gpu_indices=(0,)))
            return [offered, len(before), runner is not None]
        finally:
            pool.close()
            await pool.wait_closed()

    staging = ArtifactStaging(str(tmp_path))
    with staging.opened():
        assert asyncio.run(scenario()) == [[*LEVELS, DOCKER], 1, True]
    assert listed(address) == []
