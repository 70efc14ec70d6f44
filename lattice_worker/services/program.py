"""The program of an instance as processes: its start, its environment, its end.

Rule: when it has ended, none of its processes is left, those with a session of their own included.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lattice_worker.runner.process_tree import children_of, end_children

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


async def start(
    program: Mapping[str, Any], arguments: Sequence[str], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    """Start a program in a session of its own. Raises OSError."""
    stdin = asyncio.subprocess.PIPE if program["function"] else asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=program["working_directory"] or None,
        env=dict(environment),
        start_new_session=True,
    )
    if process.stdin is not None:
        process.stdin.write(bytes.fromhex(program["function"]))
        with contextlib.suppress(ConnectionError):  # It ended at once, which is reported as its end.
            await process.stdin.drain()
        process.stdin.close()
    return process


async def end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """End a program: SIGTERM, SIGKILL after `grace_s` seconds, and SIGKILL to all that it leaves."""
    if process.returncode is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    if process.returncode is None:
        _signal(process.pid, signal.SIGKILL)
        await process.wait()
    await end_rest()


async def end_rest() -> None:
    """Kill every process below this one; orphans of the program came to it."""
    while children_of(os.getpid()):
        await asyncio.to_thread(end_children)


def _signal(leader: int, number: int) -> None:
    """Send a signal to the process group that a process leads, and to the process in case it left the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)
