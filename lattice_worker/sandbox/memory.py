"""How much memory the processes of one sandbox use together.

Rule: no limit of the kernel counts what several processes share or keep in files in memory, so the agent measures.
Memory that processes share is counted once.
"""

import contextlib
import os
from pathlib import Path

from lattice_worker.runner.surroundings.process_tree import children_of
from lattice_worker.sandbox.view import SCRATCH, SHARED_MEMORY

KIB = 1024


def used_bytes(pid: int, limit_bytes: int) -> int:
    """Return how much a process and its descendants use.

    Exact only above the limit: below, memory that forked processes share is counted for each, which is cheaper.
    """
    pids = tree(pid)
    in_files = max(map(_in_file_systems, pids), default=0) + _in_memfds(pids)
    private, shared = _sum(pids, "status", "RssAnon", "RssShmem")
    if private + max(shared, in_files) > limit_bytes:
        private, shared = _sum(pids, "smaps_rollup", "Pss_Anon", "Pss_Shmem")
    # The mapped pages of files in memory are counted in both.
    return private + max(shared, in_files)


def tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for each in found:
        found += children_of(each)
    return found


def _sum(pids: list[int], file: str, *names: str) -> list[int]:
    totals = [0] * len(names)
    for pid in pids:
        fields: dict[str, str] = {}
        for source in (file, "status"):
            # The exact figures of a process that cannot be dumped are for root only. Others have ended meanwhile.
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/{source}").read_text().splitlines()
                fields = dict(line.split(":", 1) for line in lines if ":" in line)
                break
        for index, name in enumerate(names):
            value = fields.get(name) or fields.get(name.replace("Pss_", "Rss"), "0")
            totals[index] += int(value.split()[0]) * KIB
    return totals


def _in_file_systems(pid: int) -> int:
    """Return the size of the files in memory that a process in a view of its own has made."""
    total = 0
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            for path in (SCRATCH, SHARED_MEMORY):
                status = os.statvfs(f"/proc/{pid}/root{path}")
                total += (status.f_blocks - status.f_bfree) * status.f_frsize
    return total


def _in_memfds(pids: list[int]) -> int:
    """Return the size of files in memory that have no path."""
    sizes: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).startswith("/memfd:"):
                        found = os.stat(entry.path)
                        sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())
