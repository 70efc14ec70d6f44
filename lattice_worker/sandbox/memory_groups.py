"""Control groups (cgroups) by which the kernel limits the memory of sandboxes, version 1 or 2.

Rule: groups are made only below a delegated group: the group that `LATTICE_CGROUP` names, or in version 2 the parent of
the agent's own group when systemd has marked it. Each agent has a folder there that it locks; the next agent
removes the folders of agents that have ended.
"""

import asyncio
import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from lattice_worker.machine import cgroup
from lattice_worker.store.artifact_staging import locked

PREFIX = "lattice-"
PROCESSES = "cgroup.procs"
CONTROLLERS = "cgroup.subtree_control"
DELEGATED = "user.delegate"  # The attribute by which systemd marks a group that it leaves to others.
TRIAL_BYTES = 64 * 1024 * 1024


class GroupError(Exception):
    """Groups cannot be made here; the message says why."""


class MemoryGroup:
    """The group of one sandbox. The process enters it before it is sealed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._limit_bytes = 0

    @property
    def name(self) -> str:
        """The end of its path, which no other group has."""
        return f"{self._folder.parent.name}/{self._folder.name}"

    @property
    def entry(self) -> str:
        """The file by which a process enters."""
        return str(self._folder / PROCESSES)

    def limit(self, limit_bytes: int) -> None:
        """Limit the memory of all processes together, swapped memory included. Raises OSError."""
        memory, swap = self._folder / "memory.max", self._folder / "memory.swap.max"
        if memory.exists():
            memory.write_text(str(limit_bytes))
            (self._folder / "memory.oom.group").write_text("1")
            if swap.exists():
                swap.write_text("0")
            return
        both = [self._folder / "memory.limit_in_bytes", self._folder / "memory.memsw.limit_in_bytes"]
        # The second one must not be lower than the first one at any time.
        for file in both if limit_bytes < self._limit_bytes or not self._limit_bytes else reversed(both):
            if file.exists():
                file.write_text(str(limit_bytes))
        self._limit_bytes = limit_bytes

    @property
    def has_run_out(self) -> bool:
        """Whether the kernel has killed a process of it because memory ran out."""
        return cgroup.count_in(self._folder, "memory", "oom_kill") > 0

    def remove(self) -> bool:
        """Remove it; return whether it is gone. A process of it that is about to end keeps it."""
        try:
            self._folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


class MemoryGroups:
    """The groups of one agent. `open` returns them, or None where the agent has no group to divide."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder, self._lock = folder, lock
        self._number = 0
        self._left: list[MemoryGroup] = []

    @classmethod
    async def open(cls, named: str | None) -> "MemoryGroups | None":
        """Return the groups below the `named` group, or else below a delegated one; None for an empty name.

        Raises GroupError when no groups can be made below the named group.
        """
        base = _base() if named is None else Path(named) if named else None
        if base is None:
            return None
        try:
            groups = await asyncio.to_thread(cls._made, base)
        except OSError as error:
            if named is None:
                return None
            raise GroupError(f"there can be no groups in {base}: {error}") from None
        try:
            await groups._try()
        except OSError as error:
            groups.close()
            if named is None:
                return None
            raise GroupError(f"the groups in {base} limit no memory: {error}") from None
        return groups

    @classmethod
    def _made(cls, base: Path) -> "MemoryGroups":
        for left in base.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError), locked(left):
                _remove(left)
        _divide(base)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():  # Else another agent took it for one that was left.
                break
            os.close(lock)
        groups = cls(folder, lock)
        try:
            _divide(folder)
        except OSError:
            groups.close()
            raise
        return groups

    async def _try(self) -> None:
        """Have a process enter a group with a limit. Raises OSError."""
        group = self.make(TRIAL_BYTES)
        command = ("/bin/sh", "-c", 'echo 0 > "$0"', group.entry)
        null = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, stdin=null, stdout=null, stderr=null)
        if await process.wait():
            raise OSError("no process can enter a group")
        self.remove(group)

    def make(self, limit_bytes: int) -> MemoryGroup:
        """Return a new group. Raises OSError."""
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        group = MemoryGroup(folder)
        try:
            group.limit(limit_bytes)
        except OSError:
            group.remove()
            raise
        return group

    def remove(self, group: MemoryGroup) -> None:
        """Remove a group whose processes have ended, now or with the next one."""
        self._left = [each for each in (*self._left, group) if not each.remove()]

    def close(self) -> None:
        """Remove all groups that have no process; the next agent removes the others."""
        _remove(self._folder)
        os.close(self._lock)


def _base() -> Path | None:
    """Return the group that systemd has delegated, if there is one."""
    own = cgroup.own("")
    if own is None or own.parent == own:
        return None
    try:
        return own.parent if os.getxattr(own.parent, DELEGATED) == b"1" else None
    except OSError:
        return None


def _divide(folder: Path) -> None:
    """Have the groups in a folder count memory. Version 1 always does."""
    file = folder / CONTROLLERS
    if file.exists() and "memory" not in file.read_text().split():
        file.write_text("+memory")


def _remove(folder: Path) -> None:
    for each in (*(path for path in folder.iterdir() if path.is_dir()), folder):
        with contextlib.suppress(OSError):
            each.rmdir()
