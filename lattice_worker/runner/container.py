"""The first process of a container: connects to the agent, forks the runner, and tells how it ended.

Rule: the container ends when the connection does. The engine starts this program; the socket is mounted in by the
agent, which sends one packet, JSON with the policy, with the descriptors that a zygote's request has. The answer is
`{"ended": STATUS, "cpu": SECONDS, "oom_kills": N, "pids_refused": N}`.
"""

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import lattice_worker.context  # noqa: F401  # tasks find it among the loaded modules
from lattice_worker.machine import cgroup
from lattice_worker.runner import process
from lattice_worker.runner.zygote import DESCRIPTORS, MAX_DESCRIPTORS, REQUEST_BYTES, become_runner
from lattice_worker.sandbox import facts, libc, seal, syscall_filter
from lattice_worker.sandbox.policy import Policy
from lattice_worker.sandbox.steps import CONTAINER, Sandbox

SOCKET = "/lattice/agent.sock"


def main() -> None:
    """Serve one agent, until the runner has ended or the agent has gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.connect(SOCKET)
        libc.prctl(libc.PR_SET_DUMPABLE, 0)
        syscall_filter.program()  # Before there is an invocation to wait for it.
        data, descriptors, _, _ = socket.recv_fds(agent, REQUEST_BYTES, MAX_DESCRIPTORS)
        if len(descriptors) >= DESCRIPTORS:
            wakeups, wakeup = os.pipe()
            os.set_blocking(wakeups, False)
            os.set_blocking(wakeup, False)
            signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
            signal.signal(signal.SIGCHLD, lambda *_: None)
            child = os.fork() or _run(Policy.from_json(json.loads(data)["policy"]), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            _serve(agent, wakeups, child)
    # The kernel ends all other processes of the container with its first one.
    os._exit(0)


def _serve(agent: socket.socket, wakeups: int, child: int) -> None:
    while True:
        ready, _, _ = select.select([agent.fileno(), wakeups], [], [])
        if agent.fileno() in ready:  # It sends nothing more: its end is closed.
            return
        os.read(wakeups, REQUEST_BYTES)
        with contextlib.suppress(ChildProcessError):
            while (found := os.wait4(-1, os.WNOHANG))[0]:
                if found[0] == child:
                    _tell(agent, os.waitstatus_to_exitcode(found[1]), found[2].ru_utime + found[2].ru_stime)
                    return


def _tell(agent: socket.socket, status: int, cpu_s: float) -> None:
    counts = {"oom_kills": cgroup.count("memory", "oom_kill"), "pids_refused": cgroup.count("pids", "max")}
    with contextlib.suppress(OSError):  # The agent has gone.
        agent.send(json.dumps({"ended": status, "cpu": cpu_s, **counts}).encode())


def _run(policy: Policy, descriptors: list[int]) -> int:
    """Become the runner; this never returns."""
    try:
        become_runner(1, descriptors)
        process.main("process", _sealed(policy))
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(1)


def _sealed(policy: Policy) -> dict[str, Any]:
    """Take the steps that the engine leaves, and return the report of this process about itself."""
    before = _status("Seccomp")
    sandbox = Sandbox(policy, "", os.getuid(), 1)
    try:
        for step in CONTAINER:
            seal.take(sandbox, step)
        return _facts(sandbox, before)
    except (seal.SealError, OSError) as error:
        process.refuse(str(error))
    except KeyError as error:  # Of a runtime with a kernel of its own.
        process.refuse(f"missing: the kernel does not say what {error} is")
    os._exit(1)


def _facts(sandbox: Sandbox, profile: str) -> dict[str, Any]:
    limits = cgroup.limits()
    return facts.gather(sandbox.scratch) | {
        "container": {
            "profile": profile,
            "root_is_read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
            "type_on_terminal": _errno_of(lambda: fcntl.ioctl(0, syscall_filter.TIOCSTI, b"x")),
            "memory_bytes": limits.memory_bytes,
            "cpus": limits.cpus,
            "processes": cgroup.processes(),
            "scratch_bytes": _size(sandbox.scratch),
            "shared_memory_bytes": _size("/dev/shm"),
            "python": sys.version,
        }
    }


def _status(name: str) -> str:
    with open("/proc/self/status") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith(f"{name}:")), "")


def _errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _size(path: str) -> int:
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


if __name__ == "__main__":
    main()
