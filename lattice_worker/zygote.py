"""The agent's side of the zygote: asks it for processes, and learns of their end.

Rule: each process that was forked ends once, also when the zygote itself dies.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lattice_worker import host
from lattice_worker.runner.reset import children_of, kill_tree
from lattice_worker.sandbox.policy import interpreter_environment

PROGRAM = Path(__file__).parent / "runner" / "__main__.py"
# Names the worker to all that its tasks start; whoever started the worker finds them by it when the worker is killed.
MARK = "LATTICE_WORKER_ID"
REPLY_BYTES = 4096


class Process:
    """One process; `ended` is its exit status, as `subprocess` gives it."""

    def __init__(self, zygote: "_Zygote", number: int) -> None:
        self._zygote = zygote
        self._number = number
        self.pid = 0
        self.cpu_s = 0.0  # Processor time that it and its children had, when it has ended.
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        """End it, and what it started."""
        if not self.ended.done():
            self._zygote.kill(self._number)


class Zygotes:
    """The zygotes there are, and the next ones when those have died. Clients in tasks dial `server`, if it is given.

    Sandboxes have a zygote of their own: its children inherit its memory, which must hold no secrets.
    """

    def __init__(self, server: str = "") -> None:
        self._environment = _environment() | ({"LATTICE_TARGET": server} if server else {})
        self._current: dict[bool, _Zygote] = {}  # By whether it is the one of the sandboxes.
        self._starting = asyncio.Lock()
        self._cleaning: set[asyncio.Task[None]] = set()

    async def fork(self, mode: str, descriptors: Sequence[int], sandbox: Mapping[str, Any] | None = None) -> Process:
        """Return a new process that has these descriptors, and seals itself for a `sandbox`. Raises OSError."""
        is_for_sandboxes = sandbox is not None
        async with self._starting:
            zygote = self._current.get(is_for_sandboxes)
            if zygote is None or zygote.is_gone:
                environment = interpreter_environment() if is_for_sandboxes else self._environment
                zygote = self._current[is_for_sandboxes] = await _Zygote.start(self._clean, environment)
        return await zygote.fork(mode, descriptors, sandbox)

    def close(self) -> None:
        """End the zygotes, and with them every process they forked."""
        for zygote in self._current.values():
            zygote.close()

    def _clean(self, zygote: "_Zygote") -> None:
        task = asyncio.get_running_loop().create_task(self._end_orphans(zygote))
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    async def _end_orphans(self, zygote: "_Zygote") -> None:
        """End what a zygote that died had below it, which is below this process now, if that adopts orphans."""
        await zygote.process.wait()
        if not host.adopts_orphans():
            return
        async with self._starting:
            known = {current.process.pid for current in self._current.values()}
            while orphans := [pid for pid in children_of(os.getpid()) if pid not in known]:
                for pid in orphans:
                    kill_tree(pid)
                    with contextlib.suppress(ChildProcessError):
                        await asyncio.to_thread(os.waitpid, pid, 0)


class _Zygote:
    def __init__(
        self, control: socket.socket, process: asyncio.subprocess.Process, on_gone: "Callable[[_Zygote], None]"
    ) -> None:
        self._control, self.process, self._on_gone = control, process, on_gone
        self._numbers = count(1)
        self._forking: dict[int, asyncio.Future[int]] = {}
        self._processes: dict[int, Process] = {}
        self.is_gone = False
        asyncio.get_running_loop().add_reader(control, self._read)

    @classmethod
    async def start(cls, on_gone: "Callable[[_Zygote], None]", environment: Mapping[str, str]) -> "_Zygote":
        """Start a zygote. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    str(PROGRAM),
                    str(theirs.fileno()),
                    str(host.descriptor_limit()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        return cls(ours, process, on_gone)

    async def fork(self, mode: str, descriptors: Sequence[int], sandbox: Mapping[str, Any] | None) -> Process:
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        process = self._processes[number] = Process(self, number)
        forked = self._forking[number] = loop.create_future()
        try:
            request: dict[str, Any] = {"fork": number, "mode": mode}
            if sandbox is not None:
                request["sandbox"] = sandbox
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
            process.pid = await forked
        except BaseException as error:
            self._processes.pop(number, None)
            if isinstance(error, asyncio.CancelledError):
                self.kill(number)
            raise
        finally:
            self._forking.pop(number, None)
        return process

    def kill(self, number: int) -> None:
        try:
            self._control.send(json.dumps({"kill": number}).encode())
        except OSError:  # It is gone, and with it all it forked; or it is behind.
            if (process := self._processes.get(number)) is not None and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def close(self) -> None:
        if not self.is_gone:
            self._lose()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = self._control.recv(REPLY_BYTES)
                except ConnectionResetError:
                    data = b""
                if not data:
                    self._lose()
                    return
                self._take(json.loads(data))

    def _take(self, reply: dict[str, Any]) -> None:
        if (number := reply.get("ended")) is not None:
            process = self._processes.pop(number, None)
            if process is not None and not process.ended.done():
                process.cpu_s = reply["cpu"]
                process.ended.set_result(reply["status"])
            return
        forked = self._forking.get(reply["forked" if "forked" in reply else "failed"])
        if forked is not None and not forked.done():
            if "forked" in reply:
                forked.set_result(reply["pid"])
            else:
                forked.set_exception(OSError(reply["errno"], os.strerror(reply["errno"])))

    def _lose(self) -> None:
        """The zygote has died, or is told to end: so have, or will, its processes."""
        self.is_gone = True
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        for forked in self._forking.values():
            if not forked.done():
                forked.set_exception(ConnectionError("the process that starts others has died"))
        processes, self._processes = self._processes, {}
        for process in processes.values():
            if not process.ended.done():
                process.ended.set_result(-signal.SIGKILL)
        self._on_gone(self)


def _environment() -> dict[str, str]:
    """Return this process's environment without what is only its own business."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "GRPC_ENABLE_FORK_SUPPORT" and (name == MARK or not name.startswith("LATTICE_"))
    }
