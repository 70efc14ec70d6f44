"""The zygotes of one agent: at most one lives, and another is started when it has died.

Rule: the processes that a dead zygote leaves behind are killed.
"""

import asyncio
import contextlib
import os
from collections.abc import Sequence

from lattice_worker import host
from lattice_worker.runner.process_tree import children_of, kill_tree
from lattice_worker.zygote import Process, Zygote

# Names the worker to all processes that its tasks start; it is how they are found when the worker was killed.
MARK = "LATTICE_WORKER_ID"


class Zygotes:
    """Forks processes, from a zygote that is started when needed. Clients in tasks dial `server`, if it is given."""

    def __init__(self, server: str = "") -> None:
        self._environment = _environment() | ({"LATTICE_TARGET": server} if server else {})
        self._current: Zygote | None = None
        self._starting = asyncio.Lock()
        self._cleaning: set[asyncio.Task[None]] = set()

    async def fork(self, mode: str, descriptors: Sequence[int]) -> Process:
        """Return a new process that has these descriptors. Raises OSError."""
        async with self._starting:
            if self._current is None or self._current.is_gone:
                self._current = await Zygote.start(self._clean, self._environment)
        return await self._current.fork(mode, descriptors)

    def close(self) -> None:
        """End the zygote, and with it every process it forked."""
        if self._current is not None:
            self._current.close()

    def _clean(self, zygote: Zygote) -> None:
        task = asyncio.get_running_loop().create_task(self._end_orphans(zygote))
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    async def _end_orphans(self, zygote: Zygote) -> None:
        """Kill the descendants of a dead zygote. They are children of this process now, if it adopts orphans."""
        await zygote.process.wait()
        if not host.adopts_orphans():
            return
        async with self._starting:
            known = None if self._current is None else self._current.process.pid
            while orphans := [pid for pid in children_of(os.getpid()) if pid != known]:
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
