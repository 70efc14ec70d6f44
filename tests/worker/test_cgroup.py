"""The limits of a container, as files of both versions of cgroups state them."""

from pathlib import Path

import pytest

from lattice_worker.machine import cgroup
from lattice_worker.machine.cgroup import Limits

GIB = 2**30
UNLIMITED = "9223372036854771712\n"
MOUNT_V2 = "30 23 0:26 {shown} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNTS_V1 = """23 1 0:21 / /proc rw - proc proc rw
31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
32 31 0:29 {shown} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 {shown} /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write files below a folder that stands for the root of a machine."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_are_none_when_there_are_no_groups(tmp_path: Path) -> None:
    assert cgroup.limits(tmp_path) == Limits(None, None)


def test_version_2_limits_are_read_at_the_mount_of_the_container(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": MOUNT_V2.format(shown="/"),
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
    }
    assert cgroup.limits(tree(tmp_path, files)) == Limits(1.5, 2 * GIB)


def test_limits_of_version_2_are_the_lowest_when_groups_above_have_limits_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/kubepods/pod1/container\n",
        "proc/self/mountinfo": MOUNT_V2.format(shown="/"),
        "sys/fs/cgroup/kubepods/cpu.max": "max 100000\n",
        "sys/fs/cgroup/kubepods/memory.max": f"{3 * GIB}\n",
        "sys/fs/cgroup/kubepods/pod1/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/kubepods/pod1/memory.max": "max\n",
        "sys/fs/cgroup/kubepods/pod1/container/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/kubepods/pod1/container/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/other/memory.max": "1\n",
    }
    assert cgroup.limits(tree(tmp_path, files)) == Limits(0.5, 3 * GIB)


@pytest.mark.parametrize("shown", ["/", "/docker/abc"])
def test_limits_of_version_1_are_found_when_the_path_is_that_of_the_host(shown: str, tmp_path: Path) -> None:
    below = "" if shown != "/" else "/docker/abc"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n",
        "proc/self/mountinfo": MOUNTS_V1.format(shown=shown),
        f"sys/fs/cgroup/cpu,cpuacct{below}/cpu.cfs_quota_us": "250000\n",
        f"sys/fs/cgroup/cpu,cpuacct{below}/cpu.cfs_period_us": "100000\n",
        f"sys/fs/cgroup/memory{below}/memory.limit_in_bytes": f"{GIB}\n",
    }
    assert cgroup.limits(tree(tmp_path, files)) == Limits(2.5, GIB)


def test_limits_of_version_1_are_those_of_a_group_above_when_its_own_has_none(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/a/b\n4:memory:/a/b\n",
        "proc/self/mountinfo": MOUNTS_V1.format(shown="/"),
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": UNLIMITED,
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}\n",
    }
    assert cgroup.limits(tree(tmp_path, files)) == Limits(2.0, GIB)


def test_limits_are_none_when_the_files_cannot_be_read_as_numbers(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": MOUNT_V2.format(shown="/"),
        "sys/fs/cgroup/cpu.max": "",
        "sys/fs/cgroup/memory.max": "much\n",
    }
    assert cgroup.limits(tree(tmp_path, files)) == Limits(None, None)


VERSION_2 = {"proc/self/cgroup": "0::/agent\n", "proc/self/mountinfo": MOUNT_V2.format(shown="/")}
VERSION_1 = {"proc/self/cgroup": "4:memory:/agent\n", "proc/self/mountinfo": MOUNTS_V1.format(shown="/")}
KILLS = {"proc/vmstat": "nr_free_pages 5\noom_kill 40\n"}


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, 0),
        (KILLS, 40),
        (VERSION_2 | KILLS, 40),
        (VERSION_2 | KILLS | {"sys/fs/cgroup/agent/memory.events.local": "max 9\noom_kill 2\n"}, 2),
        (VERSION_1 | KILLS | {"sys/fs/cgroup/memory/agent/memory.oom_control": "under_oom 0\noom_kill 3\n"}, 3),
        (VERSION_1 | KILLS | {"sys/fs/cgroup/memory/agent/memory.oom_control": "under_oom 0\n"}, 40),
    ],
)
def test_processes_of_other_groups_that_ran_out_of_memory_do_not_count(
    files: dict[str, str], kills: int, tmp_path: Path
) -> None:
    others = {"sys/fs/cgroup/agent/1/memory.events.local": "oom_kill 7\n"}
    others |= {"sys/fs/cgroup/memory/agent/1/memory.oom_control": "oom_kill 7\n"}
    others |= {"sys/fs/cgroup/agent/memory.events": "oom_kill 9\n"}  # Those of the groups below are in it.
    assert cgroup.own_oom_kills(tree(tmp_path, others | files)) == kills
