"""The agent's connection to one zygote: asks it to fork processes, and learns of their end.

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
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from lattice_worker.machine import host

PROGRAM = Path(__file__).parent.parent / "runner" / "__main__.py"
REPLY_BYTES = 4096
DIED = "the process that starts others has died"


class Process:
    """One process; `ended` is its exit status, as `subprocess` gives it."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self.pid = 0
        self.cpu_s = 0.0  # Processor time of it and its children, once it has ended.
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        """Kill the process and its descendants."""
        if not self.ended.done():
            self._kill()


class Zygote:
    """One zygote. `on_gone` is called when it has died, or is told to end."""

    def __init__(
        self, control: socket.socket, process: asyncio.subprocess.Process, on_gone: "Callable[[Zygote], None]"
    ) -> None:
        self._control, self.process, self._on_gone = control, process, on_gone
        self._numbers = count(1)
        self._forking: dict[int, asyncio.Future[int]] = {}
        self._processes: dict[int, Process] = {}
        self.is_gone = False
        asyncio.get_running_loop().add_reader(control, self._read)

    @classmethod
    async def start(
        cls, on_gone: "Callable[[Zygote], None]", environment: Mapping[str, str], preload: Sequence[str] = ()
    ) -> "Zygote":
        """Start a zygote that imports modules first. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    str(PROGRAM),
                    str(theirs.fileno()),
                    str(host.descriptor_limit()),
                    *preload,
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

    async def fork(self, mode: str, descriptors: Sequence[int], sandbox: Mapping[str, Any] | None = None) -> Process:
        """Return a new process that has these descriptors, and seals itself for a `sandbox`. Raises OSError."""
        if self.is_gone:
            raise ConnectionError(DIED)
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        process = self._processes[number] = Process(partial(self.kill, number))
        forked = self._forking[number] = loop.create_future()
        try:
            request: dict[str, Any] = {"fork": number, "mode": mode}
            if sandbox is not None:
                request["sandbox"] = sandbox
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
            self._wake()
            process.pid = await forked
        except BaseException as error:
            self._processes.pop(number, None)
            self._forking.pop(number, None)
            if isinstance(error, asyncio.CancelledError):
                self.kill(number)
            elif isinstance(error, ConnectionError):
                # Before the end of the socket is read, so that the next fork has another zygote.
                self.close()
            raise
        del self._forking[number]
        return process

    def kill(self, number: int) -> None:
        """Kill a process, and its descendants unless the zygote cannot be told."""
        try:
            self._control.send(json.dumps({"kill": number}).encode())
            self._wake()
        except OSError:  # The zygote has died, and its processes with it; or its socket is full.
            if (process := self._processes.get(number)) is not None and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _wake(self) -> None:
        """Continue the zygote if a task has stopped it: it is the parent of every task."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the zygote, and with it its processes."""
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
        """End all processes: the zygote has died, or is told to end."""
        self.is_gone = True
        self._wake()
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        for forked in self._forking.values():
            if not forked.done():
                forked.set_exception(ConnectionError(DIED))
        processes, self._processes = self._processes, {}
        for process in processes.values():
            if not process.ended.done():
                process.ended.set_result(-signal.SIGKILL)
        self._on_gone(self)
