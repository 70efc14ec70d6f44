"""The seal: a process reports what holds, and is refused when anything is missing."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lattice_worker.sandbox import facts, steps
from lattice_worker.sandbox.policy import LEVELS, SECCOMP, policy_of
from lattice_worker.sandbox.supervisor import SandboxError
from tests.sandbox.boxes import boxes, in_box

# A process that changed its user cannot be dumped anyway.
REDUNDANT = {"dumpable"} if os.geteuid() == 0 else {"bounding_set", "parent_death"}
SERVERS = ("a.invalid:443",)
needs_views = pytest.mark.skipif(os.geteuid() != 0, reason="a sandbox at `subprocess` has a network for root only")
STEPS = [name for name, _ in (*steps.OUTER, *steps.INNER)] + ["view", "mount", "pid", "net", "ipc", "uts"]


@pytest.mark.parametrize("level", LEVELS)
def test_sealed_process_is_accepted_when_every_step_was_taken(level: str, tmp_path: Path) -> None:
    async def scenario() -> dict[str, Any]:
        async with boxes(tmp_path) as start:
            return dict((await start(policy_of(level))).facts)

    found = asyncio.run(scenario())
    assert facts.missing(policy_of(level), found, facts.namespaces(), os.stat("/").st_dev) == []
    assert found["status"]["Seccomp"] == ("2" if level == SECCOMP else "0")


@pytest.mark.parametrize("level", LEVELS)
def test_process_is_refused_when_a_step_of_the_seal_is_left_out(level: str, tmp_path: Path) -> None:
    async def scenario() -> set[str]:
        accepted = set()
        async with boxes(tmp_path) as start:
            for step in STEPS:
                try:
                    await start(dataclasses.replace(policy_of(level), skipped_step=step))
                except SandboxError:
                    continue
                accepted.add(step)
        return accepted

    assert asyncio.run(scenario()) <= REDUNDANT | (set() if level == SECCOMP else {"filter"})


@needs_views
@pytest.mark.parametrize("level", LEVELS)
def test_process_with_servers_is_refused_when_a_step_is_left_out(level: str, tmp_path: Path) -> None:
    async def scenario() -> set[str]:
        accepted = set()
        async with boxes(tmp_path) as start:
            await start(policy_of(level, network=SERVERS))
            for step in ("network", "net", "view", "filter", "environment"):
                try:
                    await start(dataclasses.replace(policy_of(level, network=SERVERS), skipped_step=step))
                except SandboxError:
                    continue
                accepted.add(step)
        return accepted

    assert asyncio.run(scenario()) == (set() if level == SECCOMP else {"filter"})


@pytest.mark.parametrize(
    ("servers", "name", "value", "said"),
    [
        ((), "interfaces", ["lo", "eth0"], "no network interface but the loopback"),
        (SERVERS, "interfaces", ["lo", "eth0"], "no network interface but the loopback"),
        ((), "open_stream", 0, "no internet sockets"),
        ((), "open_datagrams", 0, "no internet sockets but those of TCP"),
        (SERVERS, "open_datagrams", 0, "no internet sockets but those of TCP"),
    ],
)
def test_part_is_named_when_the_network_is_open(
    servers: tuple[str, ...], name: str, value: Any, said: str, tmp_path: Path
) -> None:
    async def scenario() -> dict[str, Any]:
        async with boxes(tmp_path) as start:
            return dict((await start(policy_of(SECCOMP, network=servers))).facts)

    found = asyncio.run(scenario())
    place = found["probes"] if name in found["probes"] else found
    place[name] = value
    policy = policy_of(SECCOMP, network=servers)
    assert facts.missing(policy, found, facts.namespaces(), os.stat("/").st_dev) == [said]


def test_step_to_leave_out_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_TEST_BREAK", "limits")
    assert policy_of(SECCOMP).skipped_step == "limits"


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_runs_a_function(level: str, tmp_path: Path) -> None:
    assert in_box(policy_of(level), tmp_path, lambda a, b: a + b, 1, 2) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a plain user that can read the interpreter")
def test_agent_that_is_not_root_seals_its_sandboxes_too() -> None:
    program = [sys.executable, "-m", "tests.sandbox.plain_user"]
    found = json.loads(subprocess.run(program, capture_output=True, check=True, timeout=60).stdout)
    assert {level: each["missing"] for level, each in found.items()} == {level: [] for level in (*LEVELS, "bare")}
    assert found["bare"]["result"] == {
        "list_root": "PermissionError",
        "signal_agent": "PermissionError",
        "read_agent": "PermissionError",
        "write_scratch": "done",
        "write_outside": "PermissionError",
    }
    for level in LEVELS:
        assert found[level]["network"] == "HTTP/1.1 403 Forbidden not_listed"
        assert found[level]["result"] == {
            "list_root": "PermissionError",
            "signal_agent": "ProcessLookupError",
            "read_agent": "FileNotFoundError",
            "write_scratch": "done",
            "write_outside": "FileNotFoundError",
        }
