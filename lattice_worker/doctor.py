"""Owns the checks of this machine as a worker: `python -m lattice_worker.doctor`, which `lattice doctor` runs.

Rule: it prints one JSON object a line, `{"name", "status", "found", "advice"}`; the status is `ok`, `warning` or
`error`. It sets up each isolation level once, as a worker does, and leaves nothing behind.
"""

import os

# As in `__main__`; read when grpc is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import asyncio
import json
import logging
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lattice_worker.cli import MIN_SHARED_MEMORY_BYTES, SHARED_MEMORY
from lattice_worker.config import WorkerConfig
from lattice_worker.containers.config import EngineConfig
from lattice_worker.machine import cgroup, host
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.sandbox.policy import DOCKER, LEVELS
from lattice_worker.store.artifact_staging import ArtifactStaging

MIB, GIB = 2**20, 2**30
MIN_DISK_BYTES, FULL_DISK_BYTES = GIB, 64 * MIB
MIN_DESCRIPTORS = 4096
# The usual remedy for a failed step of a seal, by a part of its message.
CAUSES = {
    "container engine": "only tasks with isolation='docker' need it: docs/isolation.md says how to set it up",
    "image": "only tasks with isolation='docker' need it: docs/isolation.md says how it is built",
    "user namespace": "allow unprivileged user namespaces (sysctl, or AppArmor on Ubuntu), or run the worker as root",
    "unshare": "allow unprivileged user namespaces (sysctl, or AppArmor on Ubuntu), or run the worker as root",
    "mount": "the container must be allowed to mount /proc, or the worker must run as root",
    "Landlock": "a kernel from 5.19 with Landlock is needed",
    "setresuid": "the container's user namespace must map user ids above 1,879,048,192",
}
OTHER_CAUSE = "docs/isolation.md names the common reasons; tasks that ask for this level need another machine"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding, and what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""


def main() -> None:
    """Print the findings."""
    # The refusals of isolation levels are findings, not log records.
    logging.disable(logging.WARNING)
    host.adopt_orphans()
    for check in (*machine_checks(), *asyncio.run(isolation_checks())):
        print(json.dumps(asdict(check)), flush=True)


def machine_checks() -> Iterator[Check]:
    """Yield the checks of the resources of this machine."""
    offer = host.capacity(WorkerConfig(target="", worker_id="", node_id="", store_directory=""))
    gpus = f"{len(offer.gpus)} GPUs" if offer.gpus else "no GPU"
    text = f"a worker here offers {offer.cpu:g} CPUs, {offer.memory_bytes / GIB:.1f} GiB of memory, {gpus}"
    yield Check("resources", "ok", text)
    yield _cgroup()
    yield from _store()
    yield _disk(Path(tempfile.gettempdir()))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    has_enough = hard == resource.RLIM_INFINITY or hard >= MIN_DESCRIPTORS
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    advice = (
        ""
        if has_enough
        else f"raise the limit to {MIN_DESCRIPTORS} (`ulimit -Hn`): each process of a task needs several"
    )
    yield Check("open files", "ok" if has_enough else "warning", f"a process may open {shown} files", advice)


def _cgroup() -> Check:
    limits = cgroup.limits()
    parts = [f"{limits.cpus:g} CPUs"] if limits.cpus is not None else []
    # Version 1 says "no limit" with a number larger than any memory.
    if limits.memory_bytes is not None and limits.memory_bytes < 2**60:
        parts.append(f"{limits.memory_bytes / GIB:.1f} GiB of memory")
    text = f"the container limits this process to {' and '.join(parts)}" if parts else "no limit of CPUs or memory"
    return Check("cgroup", "ok", text)


def _store() -> Iterator[Check]:
    if not SHARED_MEMORY.is_dir():
        yield Check("shared memory", "warning", "there is no /dev/shm: large values are kept on disk, which is slower")
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"{free / MIB:.0f} MiB free in /dev/shm"
    if os.access(SHARED_MEMORY, os.W_OK | os.X_OK) and free >= MIN_SHARED_MEMORY_BYTES:
        yield Check("shared memory", "ok", text)
        return
    needed = f"{MIN_SHARED_MEMORY_BYTES // MIB} MiB"
    advice = f"give it {needed} that this user can write (docker run --shm-size)"
    yield Check("shared memory", "warning", f"{text}: large values are kept on disk, which is slower", advice)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free >= MIN_DISK_BYTES:
        return Check("disk", "ok", text)
    advice = "free some space, or let TMPDIR name a folder on another disk"
    return Check("disk", "error" if free < FULL_DISK_BYTES else "warning", text, advice)


async def isolation_checks() -> list[Check]:
    """Set up a process of each isolation level; return which can be offered, and why the others cannot."""
    with tempfile.TemporaryDirectory(prefix="lattice-doctor-") as folder:
        staging = ArtifactStaging(folder)
        with staging.opened():
            pool = Pool(0, staging, engine=EngineConfig.of(os.environ))
            try:
                offered = await pool.levels()
            finally:
                pool.close()
                await pool.wait_closed()
            refusals = pool.level_refusals()
    user = "as root" if os.geteuid() == 0 else "as another user than root"
    checks = []
    for level in (*LEVELS, DOCKER):
        if level in offered:
            checks.append(Check(f"isolation {level}", "ok", f"a worker that runs {user} offers it here"))
            continue
        reason = refusals.get(level, "it was not tried")
        advice = next((advice for sign, advice in CAUSES.items() if sign in reason), OTHER_CAUSE)
        checks.append(Check(f"isolation {level}", "warning", f"not offered here: {reason}", advice))
    return checks


if __name__ == "__main__":
    main()
