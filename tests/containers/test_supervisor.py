"""The check of a container by what its runner reports: each missing part is named, and no code is sent."""

import asyncio
import errno
import sys
from typing import Any

import pytest

from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.containers import Containers
from lattice_worker.containers.engine import Engine, EngineError
from lattice_worker.containers.supervisor import ContainerSupervisor, missing
from lattice_worker.sandbox.policy import MIB, container_policy
from lattice_worker.sandbox.supervisor import SandboxError

POLICY = container_policy("", 256 * MIB, 2)
HOLDS: dict[str, Any] = {
    "profile": "2",
    "root_is_read_only": True,
    "type_on_terminal": errno.EPERM,
    "memory_bytes": 256 * MIB,
    "cpus": 2.0,
    "processes": POLICY.processes + 1,
    "scratch_bytes": POLICY.scratch_bytes,
    "shared_memory_bytes": POLICY.shared_memory_bytes,
    "python": sys.version,
}


def test_nothing_is_missing_when_all_parts_hold() -> None:
    assert missing(POLICY, HOLDS) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("profile", "0", "the engine's system call filter"),
        ("root_is_read_only", False, "a root folder that is read-only"),
        ("type_on_terminal", errno.ENOTTY, "the exact system call filter"),
        ("memory_bytes", None, "the memory limit"),
        ("memory_bytes", 257 * MIB, "the memory limit"),
        ("cpus", None, "the CPU limit"),
        ("processes", None, "the limit of processes"),
        ("scratch_bytes", 1 << 40, "the size of the scratch folder"),
        ("shared_memory_bytes", 1 << 40, "the size of shared memory"),
        ("python", "3.9", f"Python {sys.version}"),
    ],
)
def test_part_is_named_when_it_does_not_hold(name: str, value: Any, said: str) -> None:
    assert missing(POLICY, HOLDS | {name: value}) == [said]


def test_lease_gets_the_reason_when_there_is_no_engine() -> None:
    async def scenario() -> None:
        supervisor = ContainerSupervisor(POLICY, Containers(EngineConfig()))
        with pytest.raises(SandboxError, match="docker: there is no container engine"):
            await supervisor.fork("process", ())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("", "there is no container engine"),
        ("unix:///nonexistent/docker.sock", "the container engine at unix:///nonexistent/docker.sock"),
        ("nonsense", "nonsense is no address of a container engine"),
    ],
)
def test_engine_that_cannot_be_reached_is_named(host: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        asyncio.run(Engine.connect(EngineConfig(host)))


def test_environment_of_the_worker_chooses_the_engine() -> None:
    assert EngineConfig.of({"DOCKER_HOST": "unix:///a"}).host == "unix:///a"
    assert EngineConfig.of({"DOCKER_HOST": "unix:///a", "LATTICE_DOCKER_HOST": ""}).host == ""
    chosen = EngineConfig.of({"LATTICE_DOCKER_IMAGE": "mine", "LATTICE_DOCKER_RUNTIME": "runsc"})
    assert (chosen.image, chosen.runtime) == ("mine", "runsc")
