"""Seals a process that was just forked, before it receives any code.

Rule: the steps of the seal run in the order of `OUTER` and `INNER`; a step that fails ends the process. The system
call filter is the last one, because the steps before it need calls that it refuses.

With namespaces there are three processes. The process that the zygote forked makes the namespaces and waits outside of
them. Its child is the first process of the new pid namespace: it builds the file system view, gives up its privileges
and waits for the processes below it. The child of that one becomes the runner. When either of the two that wait ends,
the kernel ends all processes of the namespace.
"""

import contextlib
import os
import resource
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from lattice_worker.sandbox import facts, landlock, libc, syscall_filter, view
from lattice_worker.sandbox.policy import (
    SYSTEM_FILES,
    SYSTEM_PATHS,
    USER_FILES,
    Policy,
    environment_of,
    interpreter_paths,
)

FIRST_UID = 0x70000000  # Above what systems give to people, services and containers.
FIRST_FREE_DESCRIPTOR = 6  # Below are the standard streams and the runner's own, see `runner.zygote`.
LAST_CAPABILITY = 63
SECURE_BITS = 0x1 | 0x2 | 0x20 | 0x40 | 0x80  # No privileges for root, no capabilities kept or raised; locked.
STATUS = struct.Struct("<i")


class SealError(Exception):
    """A step of the seal failed; the message names it."""


@dataclass(slots=True)
class Sandbox:
    """One process that is being sealed. `folder` is empty and its own; `parent` is whose end is to end it."""

    policy: Policy
    folder: str
    uid: int
    parent: int

    @property
    def scratch(self) -> str:
        """The only folder of files that may be written."""
        return view.SCRATCH if self.policy.has_namespaces else self.folder

    @property
    def read_paths(self) -> tuple[str, ...]:
        """The paths that may be read beside the system's files."""
        return (*interpreter_paths(), *self.policy.read_paths)


Step = tuple[str, Callable[[Sandbox], None]]


def seal(policy: Policy, folder: str) -> dict[str, Any]:
    """Seal this process and return the facts about it, see `facts.gather`. With namespaces it returns in a grandchild.

    Raises SealError.
    """
    uid = FIRST_UID + os.getpid() if policy.is_root else os.getuid()
    sandbox = Sandbox(policy, folder, uid, os.getppid())
    if policy.has_namespaces:
        before = facts.namespaces()
        _take(sandbox, ("namespaces", _namespaces))
        _become_first(sandbox)
        if facts.namespaces()["mnt"] == before["mnt"]:
            raise SealError("mount namespace: this process has none of its own")
        _take(sandbox, ("view", _view))
    for step in OUTER:
        _take(sandbox, step)
    if policy.has_namespaces:
        _become_runner(sandbox)
    for step in INNER:
        _take(sandbox, step)
    return facts.gather(sandbox.scratch)


def _take(sandbox: Sandbox, step: Step) -> None:
    name, run = step
    if name == sandbox.policy.skipped_step:
        return
    try:
        run(sandbox)
    except Exception as error:
        raise SealError(f"{name}: {type(error).__name__}: {error}") from error


# Steps of the first process of a namespace and of the runner.


def _namespaces(sandbox: Sandbox) -> None:
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


def _view(sandbox: Sandbox) -> None:
    view.build(sandbox.policy, sandbox.read_paths, sandbox.folder, sandbox.uid)


def _scratch(sandbox: Sandbox) -> None:
    os.umask(0o077)
    os.chdir(sandbox.scratch)


def _environment(sandbox: Sandbox) -> None:
    kept = environment_of(dict(os.environ))
    os.environ.clear()
    os.environ.update(kept | {"HOME": sandbox.scratch, "TMPDIR": sandbox.scratch, "USER": "task", "LOGNAME": "task"})


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


def _parent_death(sandbox: Sandbox) -> None:
    # After the change of the user, which clears it.
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != sandbox.parent:
        raise ProcessLookupError("the parent has ended")


def _dumpable(_sandbox: Sandbox) -> None:
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
    if policy.has_namespaces:
        resource.setrlimit(resource.RLIMIT_NPROC, (policy.processes, policy.processes))


def _landlock(sandbox: Sandbox) -> None:
    if not (version := landlock.abi()):
        return
    policy = sandbox.policy
    read = (*SYSTEM_PATHS, *SYSTEM_FILES, *USER_FILES, *sandbox.read_paths, "/proc")
    landlock.restrict(read, (sandbox.scratch, view.SHARED_MEMORY), policy.devices, version)


def _filter(sandbox: Sandbox) -> None:
    if sandbox.policy.has_filter:
        libc.load_filter(syscall_filter.program())


OUTER: tuple[Step, ...] = (
    ("scratch", _scratch),
    ("environment", _environment),
    ("bounding_set", _bounding_set),
    ("privileges", _privileges),
    ("no_new_privileges", _no_new_privileges),
)
INNER: tuple[Step, ...] = (
    ("parent_death", _parent_death),
    ("dumpable", _dumpable),
    ("limits", _limits),
    ("landlock", _landlock),
    ("filter", _filter),
)


# The processes that wait.


def _become_first(sandbox: Sandbox) -> None:
    """Fork the first process of the pid namespace and return in it; the calling process waits for it, and ends as the
    runner ended."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        _close_all_but(read)
        _dumpable(sandbox)
        _, status = os.waitpid(child, 0)
        told = os.read(read, STATUS.size)
        _end_like(STATUS.unpack(told)[0] if len(told) == STATUS.size else status)
    os.close(read)
    os.set_inheritable(write, False)
    os.dup2(write, FIRST_FREE_DESCRIPTOR, inheritable=False)
    if write != FIRST_FREE_DESCRIPTOR:
        os.close(write)
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    sandbox.parent = 0  # The parent has no id in the namespace.


def _become_runner(sandbox: Sandbox) -> None:
    """Fork the runner and return in it; the calling process, the first of the namespace, waits until it has ended."""
    first = os.getpid()
    if child := os.fork():
        try:
            _close_all_but(FIRST_FREE_DESCRIPTOR)
            _parent_death(sandbox)
            _dumpable(sandbox)
            while (found := os.waitpid(-1, 0))[0] != child:
                pass
            os.write(FIRST_FREE_DESCRIPTOR, STATUS.pack(found[1]))
        finally:
            os._exit(0)
    os.close(FIRST_FREE_DESCRIPTOR)
    sandbox.parent = first
    os.setsid()


def _close_all_but(kept: int) -> None:
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(0, kept)
    os.closerange(kept + 1, highest)


def _end_like(status: int) -> NoReturn:
    """End this process with the status that another one ended with."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))
