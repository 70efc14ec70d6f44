"""Tasks with a list of servers, through a server and its worker. `network_program` runs them."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from lattice_client import TaskDefinitionError
from lattice_client.graph.settings import TaskSettings
from tests.e2e.network_program import LEVELS

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2"
)
API = {"task_id": "fetch_both", "attempt": 1, "host": "api.test", "port": 80, "message": "", "address": "11.1.0.1"}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The events and errors that callers get."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.network_program"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@needs_namespaces
@pytest.mark.parametrize("level", LEVELS)
def test_task_connects_to_the_servers_it_lists_and_its_run_says_so(level: str, found: dict[str, Any]) -> None:
    assert found[level]["result"] == {"result": ["GET /x HTTP/1.1 | api.test | 0", "refused: not_listed"]}
    first, refused, *final = found[level]["accesses"]
    assert first == API | {
        "verdict": "allowed", "connections": 1, "sent_bytes": 0, "received_bytes": 0, "final": False
    }  # fmt: skip
    assert (refused["host"], refused["verdict"], refused["final"]) == ("other.test", "not_listed", False)
    assert refused["message"] == "the task does not list other.test:80"
    assert [(access["host"], access["verdict"], access["final"]) for access in final] == [
        ("api.test", "allowed", True),
        ("other.test", "not_listed", True),
    ]
    assert final[0]["sent_bytes"] > 50
    assert final[0]["received_bytes"] > 50
    assert found[level]["types"][-2:] == ["task_succeeded", "run_finished"]


@needs_namespaces
def test_totals_of_an_attempt_that_is_killed_come_before_its_end(found: dict[str, Any]) -> None:
    assert "TIMEOUT" in found["timeout"]["error"]
    assert found["timeout"]["types"][2:] == ["task_network_access"] * 2 + ["task_failed", "run_finished"]


@needs_namespaces
def test_spawned_task_connects_to_servers_of_its_parent_only(found: dict[str, Any]) -> None:
    results = found["spawn"]["result"]["spawn_wider/child"]["result"]
    assert results == ["GET / HTTP/1.1 | api.test | 0", "refused: not_listed"]


@needs_namespaces
def test_sandbox_has_no_network_when_no_server_is_listed(found: dict[str, Any]) -> None:
    assert "name resolution" in found["none"]["error"]
    assert found["none"]["accesses"] == []


@needs_namespaces
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("address", "InvalidArgumentError: tasks[0].sandbox.network[0]: must be a host name"),
        ("port", "InvalidArgumentError: tasks[0].sandbox.network[0]: must be a host name"),
        ("many", "InvalidArgumentError: tasks[0].sandbox.network: has 65 entries; the most are 64"),
        ("docker", "PreconditionError: no node could ever run"),
    ],
)
def test_task_is_refused_when_its_servers_cannot_be_restricted(name: str, reason: str, found: dict[str, Any]) -> None:
    assert found[name].startswith(reason)


@needs_namespaces
def test_node_says_at_which_levels_it_restricts_servers(found: dict[str, Any]) -> None:
    assert found["nodes"] == [[2, 3]]


def test_servers_need_isolation_and_are_a_list() -> None:
    with pytest.raises(TaskDefinitionError, match="network must be used together with isolation, one of subprocess"):
        TaskSettings(network=["a.b:443"]).to_proto("t")
    for wrong in ("a.b:443", [1]):
        with pytest.raises(TaskDefinitionError, match=r"network must be a list of texts"):
            TaskSettings(network=wrong, isolation="seccomp").to_proto("t")  # type: ignore[arg-type]
