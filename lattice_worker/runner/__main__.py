"""The program of a runner: serves the agent on a socket. Standard library and cloudpickle only."""

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import os
import signal
import socket
import sys
import threading
from collections import deque
from typing import Any

# User code finds modules as a script would: this folder is not one of its own.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

from lattice_worker.runner.frames import Channel  # noqa: E402
from lattice_worker.runner.invocations import Program  # noqa: E402
from lattice_worker.runner.output import Stream  # noqa: E402

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Claims:
    """The numbers of the invocations that were sent ahead and not taken back; the agent reads the same pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = 0

    def owns(self, number: int) -> bool:
        """Whether this process may run the invocation `number`. Asked in order of the numbers."""
        while self._held < number:
            try:
                self._held = int.from_bytes(os.read(self._descriptor, 8), "little")
            except BlockingIOError:
                return False
        return self._held == number


def _serve(channel: Channel, claims: Claims) -> None:
    program = Program(channel, is_alone=True)
    frames = channel.frames()
    waiting: deque[tuple[dict[str, Any], list[bytes]]] = deque()
    while (frame := waiting.popleft() if waiting else next(frames, None)) is not None:
        header, blobs = frame
        if header["kind"] == "function":
            program.define(header, blobs)
        elif ("claim" not in header or claims.owns(header["claim"])) and program.run(header, blobs):
            # What the agent has not read yet it would take for the next invocation's.
            for later in frames:
                if later[0]["kind"] == "drained":
                    break
                waiting.append(later)


async def _serve_async(channel: Channel) -> None:
    program = Program(channel, is_alone=False)
    loop = asyncio.get_running_loop()
    frames: asyncio.Queue[tuple[dict[str, Any], list[bytes]] | None] = asyncio.Queue()
    running: dict[str, asyncio.Task[None]] = {}

    def read() -> None:
        for frame in channel.frames():
            loop.call_soon_threadsafe(frames.put_nowait, frame)
        loop.call_soon_threadsafe(frames.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    while (frame := await frames.get()) is not None:
        header, blobs = frame
        if header["kind"] == "function":
            program.define(header, blobs)
        elif header["kind"] == "cancel":
            if task := running.get(header["id"]):
                task.cancel()
        else:
            task = loop.create_task(program.run_async(header, blobs))
            running[header["id"]] = task
            task.add_done_callback(functools.partial(lambda name, _: running.pop(name, None), header["id"]))


def main() -> None:
    """Serve the agent on a socket, by the arguments: its descriptor, that of the pipe of claims, `process` or `async`,
    and the agent's process id."""
    descriptor, claims, mode, parent = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # What a task starts and leaves behind stays below this process, where it can be found and ended.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    # When the machine runs out of memory the kernel takes a task, not the worker or the server.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    if os.getppid() != parent:  # the agent died before the line above
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    os.set_inheritable(claims, False)
    sys.stdout, sys.stderr = Stream("stdout", 1), Stream("stderr", 2)
    # A crash in native code then leaves its Python stack in the attempt's log.
    faulthandler.enable(file=2, all_threads=True)
    channel = Channel(sock)
    channel.send({"kind": "ready"})
    if mode == "async":
        asyncio.run(_serve_async(channel))
    else:
        _serve(channel, Claims(claims))


if __name__ == "__main__":
    # Pickles made by user code in this process name `__main__`; it must not be this program.
    sys.modules["lattice_worker.runner.__main__"] = sys.modules.pop("__main__")
    sys.modules["__main__"] = type(sys)("__main__")
    main()
