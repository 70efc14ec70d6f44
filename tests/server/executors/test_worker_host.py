"""The host of a worker: the environment and flags of the worker, and the end of all orphaned processes."""

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lattice_server.executors import ray_actor
from lattice_server.executors.processes import MARK
from lattice_server.executors.ray_actor import RAY_TOKEN, TARGET, WorkerHost

STATUS = 3
# Tells how it was started, leaves a process behind that has nothing to do with it any more, and ends.
WORKER = """
import json, os, subprocess, sys
out = sys.argv[1]
left = subprocess.Popen(["sleep", "600"], start_new_session=True)
shown = open(int(sys.argv[sys.argv.index("--token-fd") + 1])).read() if "--token-fd" in sys.argv else ""
told = {"argv": sys.argv[2:], "environment": dict(os.environ), "left": left.pid, "token": shown}
with open(out, "w") as file:
    json.dump(told, file)
os._exit(int(sys.argv[2]))
"""


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a worker in a host; return its status and its report."""
    out = tmp_path / "told"

    def command(target: str, flags: list[str]) -> list[str]:
        return [sys.executable, "-c", WORKER, str(out), str(STATUS), target, *flags]

    def run(*, follows_node: bool, **environment: str) -> dict[str, Any]:
        status = WorkerHost().serve(["--flag"], "server:1", {MARK: "w-1", **environment}, follows_node)
        assert status == STATUS
        told: dict[str, Any] = json.loads(out.read_text())
        return told

    monkeypatch.setattr(ray_actor, "worker_command", command)
    monkeypatch.setattr(ray_actor, "_hide", lambda: None)  # it would be this very process
    monkeypatch.setenv(RAY_TOKEN, "Ray's")
    monkeypatch.delenv(TARGET, raising=False)
    return run


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_worker_is_told_where_the_server_is_and_nothing_of_rays(serve: Any) -> None:
    told = serve(follows_node=False, LATTICE_TOKEN="secret")
    assert told["argv"][1:4] == ["server:1", "--flag", "--host-fd"]
    assert told["token"] == "secret"
    assert "secret" not in json.dumps([told["argv"], told["environment"]])
    assert told["environment"][MARK] == "w-1"
    assert RAY_TOKEN not in told["environment"]


@pytest.mark.parametrize("follows_node", [True, False])
def test_only_a_worker_of_a_joined_machine_uses_the_address_of_its_agent(
    follows_node: bool, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TARGET, "agent:2")
    told = serve(follows_node=follows_node, LATTICE_TOKEN="its own", LATTICE_INSECURE="1")
    assert (told["argv"][1], told["token"]) == ("agent:2" if follows_node else "server:1", "its own")
    assert ("LATTICE_INSECURE" in told["environment"]) == (not follows_node)
    assert told["environment"][MARK] == "w-1"


def test_a_worker_that_ended_leaves_nothing(serve: Any) -> None:
    told = serve(follows_node=False)
    assert not is_alive(told["left"])
