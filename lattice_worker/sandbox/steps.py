"""The steps of the seal of a sandbox, in the order of `OUTER` and `INNER`.

Rule: the system call filter is the last step, because the steps before it need calls that it refuses.
"""

import contextlib
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

from lattice_worker.sandbox import landlock, libc, network, syscall_filter, view
from lattice_worker.sandbox.policy import (
    SYSTEM_FILES,
    SYSTEM_PATHS,
    USER_FILES,
    Policy,
    environment_of,
    interpreter_paths,
)

LAST_CAPABILITY = 63
SECURE_BITS = 0x1 | 0x2 | 0x20 | 0x40 | 0x80  # No privileges for root, no capabilities kept or raised; locked.


@dataclass(slots=True)
class Sandbox:
    """One process that is being sealed. `folder` is empty and its own; `parent` is whose end is to end it.

    `group` is the file by which it enters its control group; empty for none.
    """

    policy: Policy
    folder: str
    uid: int
    parent: int
    group: str = ""

    @property
    def scratch(self) -> str:
        """The only folder of files that may be written."""
        return view.SCRATCH if self.policy.has_namespaces else self.folder

    @property
    def read_paths(self) -> tuple[str, ...]:
        """The paths that may be read beside the system's files."""
        return (*interpreter_paths(), *self.policy.read_paths)


Step = tuple[str, Callable[[Sandbox], None]]


# Steps of the first process of a namespace and of the runner.


def enter_group(sandbox: Sandbox) -> None:
    """Enter the control group that limits the memory of this process and of all that it starts."""
    if sandbox.group:
        with open(sandbox.group, "w") as file:
            file.write("0")


def make_namespaces(sandbox: Sandbox) -> None:
    """Leave the namespaces of the machine for new ones."""
    kinds = {
        "mount": libc.CLONE_NEWNS,
        "pid": libc.CLONE_NEWPID,
        "net": libc.CLONE_NEWNET,
        "ipc": libc.CLONE_NEWIPC,
        "uts": libc.CLONE_NEWUTS,
    }
    if not sandbox.policy.is_root:
        kinds["user"] = libc.CLONE_NEWUSER
    gid = os.getgid()
    libc.unshare(sum(flag for kind, flag in kinds.items() if kind != sandbox.policy.skipped_step))
    if "user" in kinds:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{sandbox.uid} {sandbox.uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def make_network(sandbox: Sandbox) -> None:
    """Hand the listening sockets of an allow list to the agent."""
    if sandbox.policy.network:
        network.hand_over(sandbox.policy.network)


def make_view(sandbox: Sandbox) -> None:
    """Move into a file system view of the sandbox's own."""
    view.build(sandbox.policy, sandbox.read_paths, sandbox.folder, sandbox.uid)


def _scratch(sandbox: Sandbox) -> None:
    os.umask(0o077)
    os.chdir(sandbox.scratch)


def _environment(sandbox: Sandbox) -> None:
    kept = environment_of(dict(os.environ))
    os.environ.clear()
    own = {"HOME": sandbox.scratch, "TMPDIR": sandbox.scratch, "USER": "task", "LOGNAME": "task"}
    os.environ.update(kept | own | (network.VARIABLES if sandbox.policy.network else {}))


def _bounding_set(sandbox: Sandbox) -> None:
    if not sandbox.policy.has_namespaces:
        return  # A user without privileges has no set to drop; no_new_privs keeps it from being used.
    libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    libc.prctl(libc.PR_SET_SECUREBITS, SECURE_BITS)
    for capability in range(LAST_CAPABILITY + 1):
        with contextlib.suppress(OSError):  # One that this kernel does not have.
            libc.prctl(libc.PR_CAPBSET_DROP, capability)


def _privileges(sandbox: Sandbox) -> None:
    if sandbox.policy.is_root:
        os.setgroups([])
        os.setresgid(sandbox.uid, sandbox.uid, sandbox.uid)
        os.setresuid(sandbox.uid, sandbox.uid, sandbox.uid)
    libc.drop_capabilities()


def _no_new_privileges(_sandbox: Sandbox) -> None:
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)


def set_parent_death(sandbox: Sandbox) -> None:
    """Have this process end with its parent."""
    # After the change of the user, which clears it.
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != sandbox.parent:
        raise ProcessLookupError("the parent has ended")


def make_undumpable(_sandbox: Sandbox) -> None:
    """Refuse other processes of the same user the memory of this one."""
    libc.prctl(libc.PR_SET_DUMPABLE, 0)


# Steps of the runner.


def _limits(sandbox: Sandbox) -> None:
    policy = sandbox.policy
    for kind, soft, hard in (
        # At the first limit the kernel sends a signal that says why, at the second one it kills.
        (resource.RLIMIT_CPU, policy.cpu_s, policy.cpu_s + 1),
        (resource.RLIMIT_NOFILE, policy.descriptors, policy.descriptors),
        (resource.RLIMIT_FSIZE, policy.scratch_bytes, policy.scratch_bytes),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    # The kernel counts all processes of a user: the limit is only for one that no other process has.
    if policy.has_user_of_its_own:
        resource.setrlimit(resource.RLIMIT_NPROC, (policy.processes, policy.processes))


def _landlock(sandbox: Sandbox) -> None:
    if not (version := landlock.abi()):
        return
    policy = sandbox.policy
    read = (*SYSTEM_PATHS, *SYSTEM_FILES, *USER_FILES, *sandbox.read_paths, "/proc")
    landlock.restrict(read, (sandbox.scratch, view.SHARED_MEMORY), policy.devices, version)


def _filter(sandbox: Sandbox) -> None:
    if sandbox.policy.has_filter:
        libc.load_filter(syscall_filter.program(has_network=bool(sandbox.policy.network)))


OUTER: tuple[Step, ...] = (
    ("scratch", _scratch),
    ("environment", _environment),
    ("bounding_set", _bounding_set),
    ("privileges", _privileges),
    ("no_new_privileges", _no_new_privileges),
)
INNER: tuple[Step, ...] = (
    ("parent_death", set_parent_death),
    ("dumpable", make_undumpable),
    ("limits", _limits),
    ("landlock", _landlock),
    ("filter", _filter),
)
# The steps that a container engine leaves to the runner.
CONTAINER: tuple[Step, ...] = (
    ("network", make_network),
    ("scratch", _scratch),
    ("environment", _environment),
    ("limits", _limits),
    ("filter", _filter),
)
