"""The limits that a container sets this process: CPUs and memory of its control group (cgroup), version 1 or 2.

Rule: a limit counts wherever it is set, at the group of this process or at any group above it that can be seen.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Version 2 counts a group without those below it in the first one, and version 1 in the second one.
_OOM_COUNTERS = ("memory.events.local", "memory.oom_control")


@dataclass(frozen=True, slots=True)
class Limits:
    """The lowest limits; None where there is none. `cpus` may be a fraction."""

    cpus: float | None
    memory_bytes: int | None


def limits(root: Path = ROOT) -> Limits:
    """Return the limits of this process. `root` is the folder in which `proc` and `sys` lie."""
    cpus: list[float] = []
    memory_bytes: list[int] = []
    for controller, group in _groups(root):
        if controller in {"", "cpu"}:
            cpus += _cpus(group)
        if controller in {"", "memory"}:
            memory_bytes += _memory_bytes(group)
    return Limits(min(cpus, default=None), min(memory_bytes, default=None))


def processes(root: Path = ROOT) -> int | None:
    """Return the lowest limit of processes and threads; None where there is none."""
    found: list[int] = []
    for controller, group in _groups(root):
        if controller in {"", "pids"}:
            with suppress(OSError, ValueError):
                found.append(int((group / "pids.max").read_text()))
    return min(found, default=None)


def count(controller: str, name: str, root: Path = ROOT) -> int:
    """Return a counter of the events of this process's own group, such as `oom_kill` of `memory`; 0 where unknown."""
    group = own(controller, root) or own("", root)
    return 0 if group is None else count_in(group, controller, name)


def count_in(group: Path, controller: str, name: str) -> int:
    """Return a counter of the events of a group; 0 where unknown."""
    files = (f"{controller}.events", f"{controller}.oom_control")
    return next((found for file in files if (found := _value(group / file, name)) is not None), 0)


def own_oom_kills(root: Path = ROOT) -> int:
    """Return how many processes of this process's own group the kernel has killed because memory ran out.

    Processes of the groups below it do not count. Where the group counts none, those of the whole machine do.
    """
    group = own("memory", root) or own("", root)
    files = [] if group is None else [group / name for name in _OOM_COUNTERS]
    counts = (_value(file, "oom_kill") for file in (*files, root / "proc/vmstat"))
    return next((count for count in counts if count is not None), 0)


def own(controller: str, root: Path = ROOT) -> Path | None:
    """Return this process's group of a controller of version 1, or with an empty name its group of version 2."""
    return next((group for found, group in _groups(root) if found == controller), None)


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield each group of this process and those above it, with its controller, which is empty in version 2."""
    mounts = _mounts(root)
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if (mount := mounts.get(controller)) is None:
                continue
            shown, folder = mount
            # In a container only its own group may be mounted: the paths of `proc` start above it.
            below = path.removeprefix(shown.rstrip("/")).strip("/") if path.startswith(shown) else ""
            group = folder / below
            yield controller, group
            yield from ((controller, parent) for parent in group.parents if parent.is_relative_to(folder))


def _mounts(root: Path) -> dict[str, tuple[str, Path]]:
    """Return which group is mounted where, by controller."""
    mounts: dict[str, tuple[str, Path]] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        # ID PARENT DEVICE SHOWN FOLDER OPTIONS... - TYPE SOURCE OPTIONS
        before, _, after = line.partition(" - ")
        shown, folder = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        controllers = {"cgroup2": [""], "cgroup": options.split(",")}.get(kind, [])
        for controller in controllers:
            mounts.setdefault(controller, (shown, root / folder.lstrip("/")))
    return mounts


def _cpus(group: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()  # Microseconds, or `max`.
        yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota_us = int((group / "cpu.cfs_quota_us").read_text())  # -1 for no limit.
        if quota_us > 0:
            yield quota_us / int((group / "cpu.cfs_period_us").read_text())


def _memory_bytes(group: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):  # `max`, or a huge number, for no limit.
        with suppress(OSError, ValueError):
            yield int((group / name).read_text())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _value(path: Path, name: str) -> int | None:
    """Return a number of a file whose lines are names and numbers; None where it has none of that name."""
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return None
