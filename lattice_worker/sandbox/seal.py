"""Seals a process that was just forked, before it receives any code.

Rule: a step of the seal that fails ends the process.

With namespaces there are three processes. The process that the zygote forked makes the namespaces and waits outside of
them. Its child is the first process of the new pid namespace: it builds the file system view, gives up its privileges
and waits for the processes below it. The child of that one becomes the runner. When either of the two that wait ends,
the kernel ends all processes of the namespace.
"""

import os
import resource
import signal
import struct
from typing import Any, NoReturn

from lattice_worker.sandbox import facts, libc
from lattice_worker.sandbox.policy import Policy
from lattice_worker.sandbox.steps import (
    INNER,
    OUTER,
    Sandbox,
    Step,
    enter_group,
    make_namespaces,
    make_network,
    make_undumpable,
    make_view,
    set_parent_death,
)

FIRST_UID = 0x70000000  # Above the user ids that systems give to people, services and containers.
FIRST_FREE_DESCRIPTOR = 6  # Below are the standard streams and the runner's own, see `runner.zygote`.
STATUS = struct.Struct("<i")


class SealError(Exception):
    """A step of the seal failed; the message names it."""


def seal(policy: Policy, folder: str, group: str = "") -> dict[str, Any]:
    """Seal this process and return the facts about it, see `facts.gather`. With namespaces it returns in a grandchild.

    Raises SealError.
    """
    uid = FIRST_UID + os.getpid() if policy.is_root else os.getuid()
    sandbox = Sandbox(policy, folder, uid, os.getppid(), group)
    take(sandbox, ("group", enter_group))
    if policy.has_namespaces:
        before = facts.namespaces()
        take(sandbox, ("namespaces", make_namespaces))
        take(sandbox, ("network", make_network))
        _become_first(sandbox)
        if facts.namespaces()["mnt"] == before["mnt"]:
            raise SealError("mount namespace: this process has none of its own")
        take(sandbox, ("view", make_view))
    for step in OUTER:
        take(sandbox, step)
    if policy.has_namespaces:
        _become_runner(sandbox)
    for step in INNER:
        take(sandbox, step)
    return facts.gather(sandbox.scratch)


def take(sandbox: Sandbox, step: Step) -> None:
    """Take a step, unless a test leaves it out. Raises SealError."""
    name, run = step
    if name == sandbox.policy.skipped_step:
        return
    try:
        run(sandbox)
    except Exception as error:
        raise SealError(f"{name}: {type(error).__name__}: {error}") from error


# The processes that wait.


def _become_first(sandbox: Sandbox) -> None:
    """Fork the first process of the pid namespace and return in it; the calling process waits for it, and ends as the
    runner ended."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        _close_all_but(read)
        make_undumpable(sandbox)
        status = _status_of(child)
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
            set_parent_death(sandbox)
            make_undumpable(sandbox)
            os.write(FIRST_FREE_DESCRIPTOR, STATUS.pack(_status_of(child)))
        finally:
            os._exit(0)
    os.close(FIRST_FREE_DESCRIPTOR)
    sandbox.parent = first
    os.setsid()


def _status_of(child: int) -> int:
    """Wait for the end of a child; return its status."""
    while True:
        found, status = os.waitpid(-1, 0)
        if os.WIFSTOPPED(status):
            # It has made this process its tracer, and would wait for it.
            os.kill(found, signal.SIGKILL)
        elif found == child:
            return status


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
