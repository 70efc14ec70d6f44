"""Sandboxes of workers that Ray starts, and of machines that joined: the same isolation as on a local worker."""

import ctypes
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lattice.v1 import resources_pb2

from lattice_client import LatticeClient, TaskFailedError, UntrustedPayloadError, secret, task
from tests.commands import LATTICE
from tests.e2e.clusters import cluster
from tests.e2e.conftest import served
from tests.e2e.net import needs_network
from tests.sandbox import plain_user

pytestmark = pytest.mark.exhaustive

LEVELS = ("subprocess", "seccomp")
MIB = 1024 * 1024


@contextmanager
def _on_ray(_folder: Path) -> Iterator[LatticeClient]:
    with served("--executor", "ray", "--num-cpus", "2") as address, LatticeClient(address) as client:
        yield client


@contextmanager
def _on_joined_machine(folder: Path) -> Iterator[LatticeClient]:
    with cluster(folder, "local", machines=1) as found:
        found.join(found.machines[0], "a", "--num-cpus", "2")
        yield found.client


@contextmanager
def _on_machine_that_joined_ray(folder: Path) -> Iterator[LatticeClient]:
    with cluster(folder, "ray", machines=1) as found:
        found.join(found.machines[0], "a", "--num-cpus", "2")
        yield found.client


@contextmanager
def _of_plain_user(folder: Path) -> Iterator[LatticeClient]:
    """A client of a server and a worker of a user that is not root."""
    os.chown(folder, plain_user.UID, plain_user.UID)
    own = {"HOME": str(folder), "TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    command = [sys.executable, "-m", "tests.sandbox.plain_user", LATTICE, "start", "--head", "--port", "0"]
    command += ["--executor", "local", "--num-cpus", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | own) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            with LatticeClient(found.group()) as client:
                yield client
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def plain() -> Iterator[LatticeClient]:
    """A client of a server and a worker of a user that is not root."""
    # Its folders have to be reachable for that user, which those of pytest are not.
    with tempfile.TemporaryDirectory(prefix="lattice-tests-") as folder, _of_plain_user(Path(folder)) as client:
        yield client


# Hosts are network namespaces, which are root's to make.
@pytest.fixture(
    scope="module",
    params=[
        _on_ray,
        pytest.param(_on_joined_machine, marks=needs_network),
        pytest.param(_on_machine_that_joined_ray, marks=needs_network),
    ],
)
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LatticeClient]:
    """A client of a cluster whose worker was started by Ray, or on another machine."""
    with request.param(tmp_path_factory.mktemp("elsewhere")) as client:
        yield client


def user_of_its_own() -> bool:
    return os.getuid() not in {0, 65534} and os.getuid() == os.geteuid()


def no_capabilities() -> bool:
    status = Path("/proc/self/status").read_text()
    return all(f"{name}:\t{'0' * 16}" in status for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"))


def no_network() -> bool:
    try:
        return not [name for _, name in socket.if_nameindex() if name != "lo"]
    except PermissionError:  # Also the sockets that list interfaces are refused.
        return True


def no_files_of_others() -> bool:
    return not any(map(os.path.exists, ("/home", "/var", "/etc/shadow", "/run/lattice", "/opt")))


def no_processes_of_others() -> bool:
    return len([name for name in os.listdir("/proc") if name.isdigit()]) <= 4


def no_shared_memory_of_others() -> bool:
    return os.listdir("/dev/shm") == []


def no_secrets() -> bool:
    return not [name for name in os.environ if "TOKEN" in name or "SECRET" in name or "RAY" in name]


def no_new_privileges() -> bool:
    return "NoNewPrivs:\t1" in Path("/proc/self/status").read_text()


def system_is_read_only() -> bool:
    try:
        Path(os.__file__).with_name("lattice_was_here.py").write_text("")
    except OSError:
        return True
    return False


def scratch_can_be_written() -> bool:
    Path("kept").write_text("x")
    return Path.cwd() == Path("/tmp") and os.listdir() == ["kept"]


def cannot_mount() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == -1)


ROWS = [
    user_of_its_own,
    no_capabilities,
    no_network,
    no_files_of_others,
    no_processes_of_others,
    no_shared_memory_of_others,
    no_secrets,
    no_new_privileges,
    system_is_read_only,
    scratch_can_be_written,
    cannot_mount,
]


def run(client: LatticeClient, function: Callable[..., Any], level: str, **settings: Any) -> Any:
    workflow = client.create_workflow()
    workflow.add_task(task(isolation=level, **settings)(function))
    return workflow.run().result(timeout=100)["result"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("holds", ROWS)
def test_sandbox_holds(elsewhere: LatticeClient, holds: Callable[[], bool], level: str) -> None:
    assert run(elsewhere, holds, level)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a plain user that can read the interpreter")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("holds", ROWS)
def test_sandbox_of_a_plain_user_holds(plain: LatticeClient, holds: Callable[[], bool], level: str) -> None:
    assert run(plain, holds, level)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a plain user that can read the interpreter")
def test_worker_of_a_plain_user_restricts_servers_at_each_level(plain: LatticeClient) -> None:
    (node,) = plain.nodes()
    found = [resources_pb2.Isolation.Name(level) for level in node.network_isolations]
    assert found == ["ISOLATION_SUBPROCESS", "ISOLATION_SECCOMP"]


@pytest.mark.parametrize("level", LEVELS)
def test_pickle_of_a_sandbox_is_refused(elsewhere: LatticeClient, level: str) -> None:
    class Value:
        pass

    with pytest.raises(UntrustedPayloadError):
        run(elsewhere, Value, level)

    @task(isolation=level)
    def make() -> Any:
        return Value()

    workflow = elsewhere.create_workflow()
    workflow.add_task(lambda value: 1, {"value": workflow.add_task(make).output})
    with pytest.raises(TaskFailedError) as raised:
        workflow.run().result(timeout=100)
    assert raised.value.kind == "UNTRUSTED_INPUT"


@pytest.mark.parametrize("level", LEVELS)
def test_limits_hold(elsewhere: LatticeClient, level: str) -> None:
    def use_memory() -> int:
        kept = bytearray(os.urandom(MIB) * 400)
        time.sleep(60)
        return len(kept)

    with pytest.raises(TaskFailedError) as raised:
        run(elsewhere, use_memory, level, resources={"cpu": 1, "cpu_mem": 200})
    assert raised.value.kind == "OUT_OF_MEMORY"
    with pytest.raises(TaskFailedError) as raised:
        run(elsewhere, lambda: bytes(80 * MIB), level)
    assert raised.value.kind == "OUTPUT_SIZE"


def test_node_offers_both_levels(elsewhere: LatticeClient) -> None:
    levels = {resources_pb2.Isolation.Name(level) for node in elsewhere.nodes() for level in node.isolations}
    assert {"ISOLATION_SUBPROCESS", "ISOLATION_SECCOMP"} <= levels


@pytest.mark.parametrize("level", ["none", *LEVELS])
def test_a_secret_reaches_a_task_and_is_masked_in_its_log(
    elsewhere: LatticeClient, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "key-of-a-distant-task")

    def tell() -> str:
        print(f"the key is {os.environ['KEY']}")
        return os.environ["KEY"]

    workflow = elsewhere.create_workflow(env={"KEY": secret("THE_KEY")})
    workflow.add_task(task(isolation=level)(tell))
    found = workflow.run()
    assert found.result(timeout=100)["result"] == "key-of-a-distant-task"
    assert [event.data["text"] for event in found.events() if event.type == "task_log"] == ["the key is ***\n"]
