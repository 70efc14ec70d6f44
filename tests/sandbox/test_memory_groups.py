"""The control groups of sandboxes: limits, the end by the kernel, and what agents leave."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lattice_worker.pool.runner_pool import Pool
from lattice_worker.sandbox.memory_groups import GroupError, MemoryGroup, MemoryGroups
from lattice_worker.sandbox.policy import LEVELS, MIB, policy_of
from lattice_worker.sandbox.supervisor import SandboxError
from lattice_worker.store.artifact_staging import ArtifactStaging
from tests.sandbox.boxes import boxes

HUNDRED = 100 * MIB


def held(limit_bytes: int) -> int:
    """Use memory, and return how much."""
    return len(bytearray(os.urandom(1024)) * (limit_bytes // 1024))


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_has_a_group_of_its_own_that_is_removed(level: str, delegated_group: Path, tmp_path: Path) -> None:
    async def scenario() -> tuple[list[str], list[int]]:
        async with boxes(tmp_path, named_group=str(delegated_group)) as start:
            one, two = await start(policy_of(level)), await start(policy_of(level))
            return [one.facts["group"], two.facts["group"]], [
                await one.run(held, HUNDRED),
                await two.run(held, HUNDRED),
            ]

    names, sizes = asyncio.run(scenario())
    assert names[0] != names[1]
    assert all(f"/{delegated_group.name}/lattice-" in name for name in names)
    assert sizes == [HUNDRED, HUNDRED]


def test_limit_is_raised_and_lowered(delegated_group: Path, tmp_path: Path) -> None:
    async def scenario() -> tuple[int, str]:
        async with boxes(tmp_path, named_group=str(delegated_group)) as start:
            roomy, tight = await start(policy_of("seccomp")), await start(policy_of("seccomp"))
            roomy.watch(4096 * MIB)
            tight.watch(64 * MIB)
            size = await roomy.run(held, HUNDRED)
            tight.send(held, HUNDRED)
            return size, tight.excess or str(tight.supervisor.crash(await tight.end(), 0.0))

    size, refused = asyncio.run(scenario())
    assert size == HUNDRED
    assert "out_of_memory" in refused
    assert f"its processes ran out of memory, and the limit is {64 * MIB}" in refused


def test_process_is_refused_when_it_did_not_enter_its_group(delegated_group: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with boxes(tmp_path, named_group=str(delegated_group)) as start:
            await start(replace(policy_of("seccomp"), skipped_step="group"))

    with pytest.raises(SandboxError, match="missing: a control group of its own"):
        asyncio.run(scenario())


def test_groups_of_an_agent_that_was_killed_are_removed_by_the_next(delegated_group: Path) -> None:
    program = f"""
import asyncio, os, signal
from lattice_worker.sandbox.memory_groups import MemoryGroups
groups = asyncio.run(MemoryGroups.open({str(delegated_group)!r}))
groups.make(1 << 30)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    (left,) = delegated_group.glob("lattice-*")

    async def scenario() -> list[Path]:
        one = await MemoryGroups.open(str(delegated_group))
        two = await MemoryGroups.open(str(delegated_group))
        assert one is not None
        assert two is not None
        found = list(delegated_group.glob("lattice-*"))
        one.close()
        two.close()
        return found

    found = asyncio.run(scenario())
    assert len(found) == 2
    assert left not in found


@pytest.mark.parametrize("named", ["/proc/self", "/nonexistent"])
def test_levels_are_refused_when_the_named_group_cannot_be_divided(named: str, tmp_path: Path) -> None:
    async def scenario() -> tuple[list[str], dict[str, str]]:
        staging = ArtifactStaging(str(tmp_path))
        with staging.opened():
            pool = Pool(1, staging, named_group=named)
            levels = await pool.levels()
            refusals = pool.level_refusals()
            pool.close()
            await pool.wait_closed()
        return levels, refusals

    levels, refusals = asyncio.run(scenario())
    assert levels == []
    assert all(refusals[level].startswith(f"there can be no groups in {named}") for level in LEVELS)


def test_no_group_is_used_when_none_is_named_or_delegated() -> None:
    assert asyncio.run(MemoryGroups.open("")) is None
    with pytest.raises(GroupError):
        asyncio.run(MemoryGroups.open("/nonexistent"))


def test_group_of_version_2_bounds_swap_too_and_ends_as_a_whole(tmp_path: Path) -> None:
    for name in ("memory.max", "memory.swap.max", "memory.oom.group"):
        (tmp_path / name).write_text("")
    (tmp_path / "memory.events").write_text("oom 1\noom_kill 0\n")
    group = MemoryGroup(tmp_path)
    group.limit(64 * MIB)
    assert [(tmp_path / f"memory.{name}").read_text() for name in ("max", "swap.max", "oom.group")] == [
        str(64 * MIB),
        "0",
        "1",
    ]
    assert not group.has_run_out
    (tmp_path / "memory.events").write_text("oom 1\noom_kill 3\n")
    assert group.has_run_out
