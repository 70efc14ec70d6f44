"""The program of an instance as processes: its start, its environment, its end.

Rule: when it has ended, none of its processes is left, those with a session of their own included.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from lattice_worker.runner.surroundings.process_tree import children_of, end_children

# The libraries that engines compute with start a thread for each core of the machine, unless they are told.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LOOPBACK = "127.0.0.1"


def free_port(host: str) -> int:
    """Return a port of an address that was free just now. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def arguments_of(program: Mapping[str, Any], host: str, port: int) -> list[str]:
    """Return the command line of a program that has to listen at an address."""
    if not program["command"]:
        return [sys.executable, "-m", "lattice_worker.services.call"]
    return [part.replace("{host}", host).replace("{port}", str(port)) for part in program["command"]]


def environment_of(program: Mapping[str, Any], host: str, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a program; the service's own variables come last."""
    found = {**base, **dict.fromkeys(THREADS, str(program["threads"]))}
    # Else the lines of a Python program that prints little come only when it ends.
    found["PYTHONUNBUFFERED"] = "1"
    if not program["command"]:
        # As in this process, whose first entry is the folder of the modules that were sent.
        found["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        found["LATTICE_SERVICE_ENTRYPOINT"] = program["entrypoint"]
    found |= program["environment"]
    return found | {"LATTICE_SERVICE_HOST": host, "LATTICE_SERVICE_PORT": str(port)}


class Process:
    """A program that runs in a session of its own; `ended` has its status, as `subprocess` gives it.

    asyncio's own processes end only when all that they started has closed the pipe to them, which a child that is to be
    killed next does not do.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", output: asyncio.StreamReader) -> None:
        self.pid = process.pid
        self.output = output
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = loop.create_future()
        self._process = process
        self._watched = os.pidfd_open(process.pid)
        loop.add_reader(self._watched, self._note_end)

    @classmethod
    async def start(
        cls, program: Mapping[str, Any], arguments: Sequence[str], environment: Mapping[str, str]
    ) -> "Process":
        """Start a program. Raises OSError."""
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE if program["function"] else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=program["working_directory"] or None,
            env=dict(environment),
            start_new_session=True,
        )
        output = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(output)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, process.stdout)
        if process.stdin is not None:
            await asyncio.to_thread(_write, process.stdin, bytes.fromhex(program["function"]))
        return cls(process, output)

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._watched)
        os.close(self._watched)
        self.ended.set_result(self._process.wait())

    async def end(self, grace_s: float) -> int:
        """End it: SIGTERM, SIGKILL after `grace_s` seconds, and SIGKILL to all that it leaves. Return its status."""
        if not self.ended.done():
            self._signal(signal.SIGTERM)
            await asyncio.wait([self.ended], timeout=grace_s)
        if not self.ended.done():
            self._signal(signal.SIGKILL)
        status = await self.ended
        # Orphans of the program came to this process.
        while children_of(os.getpid()):
            await asyncio.to_thread(end_children)
        return status

    def _signal(self, number: int) -> None:
        """Send a signal to the process group that the program leads."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def _write(stream: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), stream:  # A program that ended at once is reported as its end.
        stream.write(data)
