"""The policy of a sandbox: access, limits, and the paths of this machine that it shows.

Rule: two attempts may use the same spare only if their policies are equal.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MIB = 1024 * 1024
SUBPROCESS, SECCOMP, DOCKER = "subprocess", "seccomp", "docker"
LEVELS = (SUBPROCESS, SECCOMP)  # Whose processes are forked and seal themselves.

# Parts of the machine that programs expect: the system's libraries and programs, and public settings.
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/sys/devices/system/cpu")
SYSTEM_FILES = (
    *("/etc/alternatives", "/etc/fonts", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/ca-certificates"),
    *("/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf", "/etc/services"),
    *("/etc/protocols", "/etc/localtime", "/etc/timezone", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"),
    *("/etc/mime.types", "/etc/os-release", "/etc/locale.alias", "/etc/debian_version"),
)
USER_FILES = ("/etc/passwd", "/etc/group")  # With namespaces these are the sandbox's own.
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# Variables that a sandboxed task sees, when the worker has them.
ENVIRONMENT = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "PYTHONHASHSEED", "PYTHONUTF8", "LATTICE_WORKER_ID"})
# Needed to start the interpreter of the sandboxes; what these name can be read in a sandbox.
INTERPRETER_ENVIRONMENT = frozenset({"PYTHONPATH", "LD_LIBRARY_PATH"})
# How many threads numerical libraries start; their own choice, one for each core, may be more than the policy allows.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
DEFAULT_MEMORY_BYTES = 2048 * MIB


@dataclass(frozen=True, slots=True)
class Policy:
    """The access and the limits of one process. Sizes in bytes, times in seconds.

    `is_bare` says that it gets neither namespaces nor a file system view of its own: only at `subprocess`, when the
    agent is not root and the machine allows its user no namespaces. `is_root` says that the agent, or the container
    engine, is root, so that the process gets another user. `read_paths` are seen beside the system's and the
    interpreter's. `network` are the servers that it may connect to, each `NAME:PORT`.
    `memory_bytes` and `time_s` are for tasks that set no limits of their own. `cpus` bounds a container.
    `skipped_step` is a step of the seal that a test leaves out.
    """

    level: str
    is_root: bool
    read_paths: tuple[str, ...] = ()
    devices: tuple[str, ...] = DEVICES
    network: tuple[str, ...] = ()
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    cpus: int = 0
    time_s: int = 300
    cpu_s: int = 300
    processes: int = 50
    descriptors: int = 256
    scratch_bytes: int = 512 * MIB
    shared_memory_bytes: int = 512 * MIB
    output_bytes: int = 64 * MIB
    skipped_step: str = ""
    is_bare: bool = False

    @property
    def has_namespaces(self) -> bool:
        return not self.is_bare

    @property
    def has_filter(self) -> bool:
        return self.level != SUBPROCESS

    @property
    def is_container(self) -> bool:
        return self.level == DOCKER

    @property
    def has_user_of_its_own(self) -> bool:
        """Whether no other process has its user, so that the kernel's limits for users are its own."""
        return self.has_namespaces and not self.is_container

    def to_json(self) -> dict[str, Any]:
        """Return the policy as the zygote is sent it."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Policy":
        """Return the policy that `to_json` made."""
        lists = {name: tuple(found[name]) for name in ("read_paths", "devices", "network")}
        return cls(**found | lists)


def policy_of(level: str, bundle: str = "", gpu_indices: tuple[int, ...] = (), network: tuple[str, ...] = ()) -> Policy:
    """Return the policy of a level on this machine, for code in a folder that uses these GPUs and servers."""
    return Policy(
        level,
        os.geteuid() == 0,
        (bundle,) if bundle else (),
        (*DEVICES, *gpu_devices(gpu_indices)),
        network,
        skipped_step=os.environ.get("LATTICE_TEST_BREAK", ""),
    )


def container_policy(bundle: str = "", memory_bytes: int = 0, cpus: int = 1, network: tuple[str, ...] = ()) -> Policy:
    """Return the policy of a container for code that lies in a folder. Without a memory limit it has the default."""
    return Policy(
        DOCKER,
        True,
        (bundle,) if bundle else (),
        network=network,
        memory_bytes=memory_bytes or DEFAULT_MEMORY_BYTES,
        cpus=cpus,
        skipped_step=os.environ.get("LATTICE_TEST_BREAK", ""),
    )


def interpreter_paths() -> tuple[str, ...]:
    """Return the folders that the interpreter of this process and its modules lie in."""
    entries = {sys.prefix, sys.base_prefix, *sys.path}
    found = {path for entry in entries if entry.startswith("/") for path in (entry, os.path.realpath(entry))}
    existing = {path for path in found if os.path.exists(path) and path != "/"}
    # A folder within another one is seen with that.
    return tuple(sorted(path for path in existing if not any(path.startswith(f"{other}/") for other in existing)))


def gpu_devices(indices: tuple[int, ...]) -> tuple[str, ...]:
    """Return the device files of some NVIDIA GPUs, and the device files that all GPUs share."""
    if not indices:
        return ()
    shared = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
    return tuple(filter(os.path.exists, (*shared, *(f"/dev/nvidia{index}" for index in indices))))


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an environment that a sandboxed task may see."""
    return {name: value for name, value in environment.items() if name in ENVIRONMENT or name.startswith("LC_")}


def interpreter_environment() -> dict[str, str]:
    """Return the environment of the process that sandboxes are forked from: all that its memory may hold."""
    return {name: os.environ[name] for name in INTERPRETER_ENVIRONMENT & os.environ.keys()} | environment_of(os.environ)
