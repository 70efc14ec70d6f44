"""The facts that a sealed process reports of itself, and the check of them by the agent.

Rule: a process is sent code only when `missing` finds nothing. The facts are gathered before there is any code of a
user in the process, so they can be believed.
"""

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable, Mapping
from typing import Any

from lattice_worker.sandbox import landlock, libc, network
from lattice_worker.sandbox.policy import ENVIRONMENT, Policy

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "user")
LIMITS = ("CPU", "NOFILE", "FSIZE", "CORE", "NPROC")
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapAmb")
OWN_VARIABLES = frozenset({"HOME", "TMPDIR", "USER", "LOGNAME", "LC_CTYPE"})  # Python itself may set the last one.
LAST_DESCRIPTOR = 5  # See `runner.zygote`.


def namespaces() -> dict[str, str]:
    """Return the names of the namespaces that this process is in."""
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES}


def gather(scratch: str) -> dict[str, Any]:
    """Return the facts about this process. `scratch` is its scratch folder."""
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return {
        "status": {name: status[name] for name in (*CAPABILITIES, "CapBnd", "NoNewPrivs", "Seccomp", "Threads", "Uid")},
        "groups": os.getgroups(),
        "namespaces": namespaces(),
        "limits": {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in LIMITS},
        "dumpable": libc.prctl(libc.PR_GET_DUMPABLE),
        "parent_death": libc.parent_death_signal(),
        "root_device": os.stat("/").st_dev,
        "directory": os.getcwd(),
        "scratch": scratch,
        "variables": sorted(os.environ),
        "home": os.environ.get("HOME", ""),
        "descriptors": _descriptors(),
        "interfaces": network.interfaces(),
        "group": memory_group(),
        "probes": {name: _errno_of(probe) for name, probe in PROBES.items()},
    }


def memory_group() -> str:
    """Return the path of this process's control group for memory; empty for none."""
    found = ""
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if "memory" in controllers.split(","):
                return path
            if not controllers:  # The group of version 2, which has the memory unless version 1 has it.
                found = path
    return found


def _descriptors() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # The one by which the list was read.
            os.fstat(int(name))
            found.append(int(name))
    return sorted(found)


def _errno_of(probe: Callable[[], object]) -> int:
    try:
        probe()
    except OSError as error:
        return error.errno or -1
    return 0


def _write_scratch() -> None:
    with open("lattice-probe", "x"):
        os.unlink("lattice-probe")


# Each ends with an error number, 0 for none.
PROBES: dict[str, Callable[[], object]] = {
    "list_root": lambda: os.listdir("/"),
    "write_root": lambda: os.mkdir("/lattice-probe"),
    "write_scratch": _write_scratch,
    "unshare_nothing": lambda: libc.unshare(0),
    "open_stream": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
    "open_datagrams": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
}


def missing(policy: Policy, facts: Mapping[str, Any], own: Mapping[str, str], root_device: int) -> list[str]:
    """Return which parts of a policy do not hold in a process, for people; an empty list when all of them hold.

    `own` are the namespaces of the agent, and `root_device` is the device of its root folder.
    """
    status, probes, limits = facts["status"], facts["probes"], facts["limits"]
    wanted_limits = {
        "CPU": policy.cpu_s,
        "NOFILE": policy.descriptors,
        "FSIZE": policy.scratch_bytes,
        "CORE": 0,
        **({"NPROC": policy.processes} if policy.has_user_of_its_own else {}),
    }
    allowed = ENVIRONMENT | OWN_VARIABLES | (network.VARIABLES.keys() if policy.network else set())
    extra = [name for name in facts["variables"] if name not in allowed and not name.startswith("LC_")]
    uids = {int(uid) for uid in status["Uid"].split()}
    checks = {
        "no capabilities": all(int(status[name], 16) == 0 for name in CAPABILITIES),
        "no_new_privs": status["NoNewPrivs"] == "1",
        "one thread": status["Threads"] == "1",
        "not dumpable": facts["dumpable"] == 0,
        "end with the parent": facts["parent_death"] == 9,
        "the scratch folder as working directory": facts["directory"] == facts["scratch"],
        "a scratch folder that can be written": probes["write_scratch"] == 0,
        "no file outside of the scratch folder": probes["write_root"] != 0,
        "the scratch folder as home": facts["home"] == facts["scratch"],
        f"no variable {', '.join(extra)}": not extra,
        "no inherited descriptor": max(facts["descriptors"]) <= LAST_DESCRIPTOR,
        **{f"the limit {name}": limits[name] == wanted for name, wanted in wanted_limits.items()},
    }
    if policy.is_root:
        groups = {*facts["groups"]} - (uids if policy.is_container else set())
        checks["a user of its own"] = 0 not in uids and len(uids) == 1 and not groups
    if policy.has_namespaces:
        checks["an empty bounding set"] = int(status["CapBnd"], 16) == 0
        checks["a file system view of its own"] = facts["root_device"] != root_device
        kinds = [kind for kind in NAMESPACES if kind != "user" or not policy.is_root]
        checks["no network interface but the loopback"] = set(facts["interfaces"]) <= {"lo"}
        checks |= {f"a {kind} namespace": facts["namespaces"][kind] != own[kind] for kind in kinds}
    if landlock.abi() and not policy.is_container:
        checks["Landlock"] = probes["list_root"] == errno.EACCES
    if policy.has_filter:
        is_filtered = status["Seccomp"] == "2" and probes["unshare_nothing"] == errno.EPERM
        checks["a system call filter"] = is_filtered
        checks["no internet sockets but those of TCP"] = probes["open_datagrams"] == errno.EPERM
        if not policy.network:
            checks["no internet sockets"] = probes["open_stream"] == errno.EPERM
    return [name for name, holds in checks.items() if not holds]
