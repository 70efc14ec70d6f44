"""The zygote: a process that has imported the runner and the modules of `LATTICE_PRELOAD`, and forks on request.

Rule: one thread, and never gRPC, so that a fork of it is a clean process. It is the parent of all runners and adopts
their orphans: it tells the agent of each runner that ended, and kills every other descendant. When the agent closes the
socket, or dies, it kills all of them and exits.

The agent sends JSON, one object a packet: `{"fork": ID, "mode": MODE}` with the descriptors of the control socket, the
standard output, the standard error, the claims and the marks, and of the socket that takes the listening sockets of a
sandbox with a network; and `{"kill": ID}`. With `"sandbox": {"policy": POLICY, "folder": PATH, "group": PATH}` the
runner seals itself first. The zygote answers `{"forked": ID, "pid": PID}` or `{"failed": ID, "errno": N}`, and sends
`{"ended": ID, "status": STATUS, "cpu": SECONDS}` once for each.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import lattice_worker.context  # noqa: F401  # tasks find it among the loaded modules
from lattice_worker.runner import process
from lattice_worker.runner.surroundings.process_tree import children_of
from lattice_worker.sandbox import seal, syscall_filter
from lattice_worker.sandbox.policy import Policy

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
REQUEST_BYTES = 65536
DESCRIPTORS = 5
MAX_DESCRIPTORS = 6  # With that of a sandbox's network.
HIGH = 64  # Above all that a runner's descriptors are moved to.
_libc = ctypes.CDLL(None, use_errno=True)


def main(descriptor: int, limit: int, preload: Sequence[str] = ()) -> None:
    """Fork runners for the agent at the other end of a socket, until it closes it.

    A runner may have `limit` descriptors unless it asks for more, and finds the modules of `preload` imported.
    """
    if preload and (problem := import_problem(preload)):
        # An import cannot be taken back, and tasks run without it, only later.
        print(f"lattice_worker: nothing is imported before tasks start: {problem}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(preload)]])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        tempfile.gettempdir()  # Python looks for it once, by a file; a runner that is killed then would leave the file.
    zygote = Zygote(control)
    if syscall_filter.is_supported():
        syscall_filter.program()  # Once, and not in each sandbox.
    gc.collect()
    gc.freeze()  # Collections in a runner then leave the pages it shares with the others alone.
    zygote.serve()


def import_problem(modules: Sequence[str]) -> str:
    """Import modules; return why a process that has imported them cannot be forked, or nothing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            return f"import of {name!r}: {type(error).__name__}: {error}"
        if len(os.listdir("/proc/self/task")) > 1:
            return f"import of {name!r} starts threads, which a fork does not have"
        if "grpc" in sys.modules:
            return f"import of {name!r} imports grpc, which does not work in a fork"
    return ""


class Zygote:
    """The runners that were forked and have not ended, by the agent's ids of them."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pids: dict[int, int] = {}
        self._wakeups, wakeup = os.pipe()
        os.set_blocking(self._wakeups, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Serve the agent until it closes the socket."""
        while True:
            ready, _, _ = select.select([self._control.fileno(), self._wakeups], [], [])
            if self._wakeups in ready:
                os.read(self._wakeups, REQUEST_BYTES)
                self._reap()
            if self._control.fileno() in ready and not self._take():
                break
        self._pids.clear()
        while children_of(os.getpid()):
            self._kill_orphans()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)

    def _take(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, REQUEST_BYTES, MAX_DESCRIPTORS)
        except ConnectionResetError:
            return False
        if not data:
            return False
        request: dict[str, Any] = json.loads(data)
        if (number := request.get("kill")) is not None:
            # A process that has ended is not here any more: its id may be another process's by now.
            if number in self._pids:
                os.kill(self._pids[number], signal.SIGKILL)
            return True
        try:
            if len(descriptors) < DESCRIPTORS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            pid = self._fork(request["mode"], descriptors, request.get("sandbox"))
            self._pids[request["fork"]] = pid
            self._tell({"forked": request["fork"], "pid": pid})
        except OSError as error:
            self._tell({"failed": request["fork"], "errno": error.errno})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _fork(self, mode: str, descriptors: list[int], sandbox: dict[str, Any] | None) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        # The child never returns from here: it must not continue as a second zygote.
        try:
            become_runner(parent, descriptors)
            process.main(mode, None if sandbox is None else _sealed(sandbox))
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(1)

    def _reap(self) -> None:
        names = {pid: number for number, pid in self._pids.items()}
        with contextlib.suppress(ChildProcessError):
            while (found := os.wait4(-1, os.WNOHANG))[0]:
                if os.WIFSTOPPED(found[1]):
                    # It has made this process its tracer, and would wait for it.
                    os.kill(found[0], signal.SIGKILL)
                    continue
                number = names.get(found[0])
                if number is not None:
                    del self._pids[number]
                    cpu_s = found[2].ru_utime + found[2].ru_stime
                    self._tell({"ended": number, "status": os.waitstatus_to_exitcode(found[1]), "cpu": cpu_s})
        # Children of a runner that ended are children of this process now.
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        known = set(self._pids.values())
        for pid in children_of(os.getpid()):
            if pid not in known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # The agent is gone, which `_take` finds out.
            self._control.send(json.dumps(message).encode())


def _sealed(sandbox: dict[str, Any]) -> dict[str, Any]:
    """Seal this process and return its report about itself. A process that cannot be sealed reports that and ends."""
    try:
        return seal.seal(Policy.from_json(sandbox["policy"]), sandbox["folder"], sandbox.get("group", ""))
    except seal.SealError as error:
        process.refuse(str(error))
        os._exit(1)


def become_runner(parent: int, descriptors: list[int]) -> None:
    """Turn a process that was just forked into a runner: a session of its own that dies with the zygote and has no
    descriptors but those it was given."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Orphans of a task stay descendants of this process, where they are found and killed.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # The zygote died before the line above.
        os._exit(1)
    os.setsid()
    # When the machine runs out of memory the kernel takes a task, not the worker or the server.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    control, out, err, claims, marks, *network = (os.dup2(d, HIGH + i) for i, d in enumerate(descriptors))
    null = os.open(os.devnull, os.O_RDONLY)
    kept = (null, out, err, control, claims, marks, *network)
    for target, source in enumerate(kept):
        os.dup2(source, target, inheritable=target < 3)
    os.closerange(len(kept), HIGH + MAX_DESCRIPTORS)
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= len(kept):
            with contextlib.suppress(OSError):  # The one by which the list was read.
                os.close(int(name))
