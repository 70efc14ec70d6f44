"""The zygotes of one agent: one for ordinary runners and one for sandboxes. Another is started when one has died.

Rule: the processes that a dead zygote leaves behind are killed.
"""

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lattice_worker import background
from lattice_worker.machine import host
from lattice_worker.pool.zygote import Process, Zygote
from lattice_worker.runner.surroundings.process_tree import children_of, kill_tree
from lattice_worker.sandbox.policy import interpreter_environment

# Names the worker to all processes that its tasks start; it is how they are found when the worker was killed.
MARK = "LATTICE_WORKER_ID"
# Tells the gateway of the node at which port it listens for other gateways.
GATEWAY_PORT = "LATTICE_GATEWAY_PORT"


class Zygotes:
    """Forks processes, from zygotes that are started when needed. Clients in tasks dial `server`, if it is given.

    The gateway listens for other gateways at `gateway_port`, if it is given.
    Sandboxes have a zygote of their own: its children inherit its memory, which must hold no secrets. The other one has
    imported the modules of `preload`.
    """

    def __init__(self, server: str = "", gateway_port: int = 0, preload: Sequence[str] = ()) -> None:
        self._preload = tuple(preload)
        given = {"LATTICE_TARGET": server, GATEWAY_PORT: str(gateway_port or "")}
        self._environment = _environment() | {name: value for name, value in given.items() if value}
        self._current: dict[bool, Zygote] = {}  # By whether it is the one of the sandboxes.
        self._starting = asyncio.Lock()
        self._is_closed = False

    async def fork(self, mode: str, descriptors: Sequence[int], sandbox: Mapping[str, Any] | None = None) -> Process:
        """Return a new process that has these descriptors, and seals itself for a `sandbox`. Raises OSError."""
        is_for_sandboxes = sandbox is not None
        async with self._starting:
            if self._is_closed:
                raise ConnectionError("the worker ends, and starts no more processes")
            zygote = self._current.get(is_for_sandboxes)
            if zygote is None or zygote.is_gone:
                environment = interpreter_environment() if is_for_sandboxes else self._environment
                preload = () if is_for_sandboxes else self._preload
                zygote = self._current[is_for_sandboxes] = await Zygote.start(self._clean, environment, preload)
            if self._is_closed:  # While it started.
                zygote.close()
        return await zygote.fork(mode, descriptors, sandbox)

    def close(self) -> None:
        """End the zygotes, and with them every process they forked; start no more."""
        self._is_closed = True
        for zygote in self._current.values():
            zygote.close()

    async def wait_closed(self) -> None:
        """Wait until the zygotes, and with them all processes, have ended. `close` comes first."""
        async with self._starting:
            zygotes = list(self._current.values())
        for zygote in zygotes:
            await zygote.process.wait()

    def _clean(self, zygote: Zygote) -> None:
        # Processes that are left end with this one.
        background.start(self._end_orphans(zygote), background.only_log)

    async def _end_orphans(self, zygote: Zygote) -> None:
        """Kill the descendants of a dead zygote. They are children of this process now, if it adopts orphans."""
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


def _environment() -> dict[str, str]:
    """Return this process's environment without the variables that configure this process alone."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "GRPC_ENABLE_FORK_SUPPORT" and (name == MARK or not name.startswith("LATTICE_"))
    }
