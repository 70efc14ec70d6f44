"""The request for one container of a policy to the engine."""

import json
import os
import platform
from typing import Any

from lattice_worker.containers.profile import profile
from lattice_worker.runner.container import SOCKET
from lattice_worker.sandbox import network
from lattice_worker.sandbox.policy import Policy
from lattice_worker.sandbox.view import MAX_FILES, SCRATCH, SHARED_MEMORY

UID = 65532  # Of every container; the image names it.
PROGRAM = ["-I", "-m", "lattice_worker.runner.container"]


def body(
    policy: Policy, folder: str, runtime: str, labels: dict[str, str], environment: dict[str, str]
) -> dict[str, Any]:
    """Return the request for a container of a policy. `folder` has the agent's socket.

    Raises KeyError on an architecture that has no profile.
    """
    scratch = f"rw,exec,nosuid,nodev,size={policy.scratch_bytes},nr_inodes={MAX_FILES},mode=700,uid={UID},gid={UID}"
    shared = f"rw,noexec,nosuid,nodev,size={policy.shared_memory_bytes},nr_inodes={MAX_FILES},mode=700"
    rules = profile(platform.machine(), has_network=bool(policy.network))
    host: dict[str, Any] = {
        "AutoRemove": True,
        "CapDrop": ["ALL"],
        "CgroupnsMode": "private",
        "IpcMode": "none",
        "LogConfig": {"Type": "none"},
        "Memory": policy.memory_bytes,
        # The engine refuses a source that is not there; of `Binds` it would make one.
        "Mounts": [_shown(folder, os.path.dirname(SOCKET)), *(_shown(path, path) for path in policy.read_paths)],
        "MemorySwap": policy.memory_bytes,  # With swap included, so that none is used.
        "NanoCpus": policy.cpus * 1_000_000_000,
        "NetworkMode": "none",
        "OomScoreAdj": 1000,
        # The first process is one more.
        "PidsLimit": policy.processes + 1,
        "ReadonlyRootfs": True,
        "SecurityOpt": ["no-new-privileges", f"seccomp={json.dumps(rules)}"],
        "Tmpfs": {SCRATCH: scratch, SHARED_MEMORY: f"{shared},uid={UID},gid={UID}"},
    }
    if policy.network:
        host["ExtraHosts"] = [f"{name}:{address}" for name, address in network.hosts(policy.network).items()]
        # The listening sockets have the ports of the servers, and the container has no capabilities.
        host["Sysctls"] = {"net.ipv4.ip_unprivileged_port_start": "0"}
    if runtime:
        host["Runtime"] = runtime
    return {
        "Cmd": PROGRAM,
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "HostConfig": host,
        "Hostname": "lattice",
        "Labels": labels,
        # With a network the engine writes the names of the servers to `/etc/hosts`, and gives no interface either.
        "NetworkDisabled": not policy.network,
        "User": f"{UID}:{UID}",
    }


def _shown(source: str, target: str) -> dict[str, Any]:
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": True}
