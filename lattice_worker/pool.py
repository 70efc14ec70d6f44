"""Owns the pool of runners: which are idle, which are shared, and what those that died left behind.

Rule: a runner is given to what its key fits only, and what a dead one left running is ended.
"""

import asyncio
import contextlib
import os

import psutil

from lattice_worker import host
from lattice_worker.drafts import Drafts
from lattice_worker.runners import Key, Runner, kill_tree

SWEEP_S = 0.1


class Pool:
    """Runners, by key. Process runners run one invocation at a time, async runners any number."""

    def __init__(self, spare: int, drafts: Drafts) -> None:
        self._spare = spare
        self._drafts = drafts
        self._idle: dict[Key, list[Runner]] = {}
        self._shared: dict[Key, asyncio.Future[Runner]] = {}
        self._all: set[Runner] = set()
        # A process that does not adopt orphans has children that are none of this pool's business.
        self._adopts = host.adopts_orphans()
        self._starting = 0
        self._sweeping: asyncio.Task[None] | None = None

    async def warm(self, count: int) -> None:
        """Start runners ahead of need."""
        for runner in await asyncio.gather(*(self._start(Key()) for _ in range(count))):
            self._put_back(runner)

    async def take(self, key: Key) -> Runner:
        """Return a runner that is free to run one more invocation."""
        if key.is_async:
            shared = self._usable(key)
            if shared is None:
                shared = self._shared[key] = asyncio.ensure_future(self._start(key))
            return await asyncio.shield(shared)
        return self.take_idle(key) or await self._start(key)

    def take_idle(self, key: Key) -> Runner | None:
        """Return a free runner without waiting, or None."""
        if key.is_async:
            shared = self._usable(key)
            return shared.result() if shared is not None and shared.done() else None
        idle = self._idle.get(key, [])
        while idle:
            if (runner := idle.pop()).is_fit:
                return runner
        return None

    def _usable(self, key: Key) -> asyncio.Future[Runner] | None:
        """Return the shared runner of a key, or the one that is being started; none that failed or is being killed."""
        shared = self._shared.get(key)
        if shared is not None and shared.done() and (shared.exception() or not shared.result().is_fit):
            return None
        return shared

    def close(self) -> None:
        """Kill every runner."""
        for runner in list(self._all):
            runner.kill()

    async def _start(self, key: Key) -> Runner:
        runner = Runner(key, self._drafts, self._put_back, self._forget)
        self._starting += 1
        try:
            await runner.start()
            self._all.add(runner)
        finally:
            self._starting -= 1
        return runner

    def _put_back(self, runner: Runner) -> None:
        if runner.key.is_async or runner not in self._all:
            return
        self._idle.setdefault(runner.key, []).append(runner)
        if sum(map(len, self._idle.values())) > self._spare:
            # The least recently used key gives one up.
            key = next(iter(self._idle))
            self._idle[key].pop(0).kill()
            if not self._idle[key]:
                del self._idle[key]

    def sweep(self) -> None:
        """Kill what a runner that is gone left behind, which is below this process now, if that adopts orphans."""
        if not self._adopts:
            return
        if self._starting or (self._sweeping is not None and not self._sweeping.done()):
            # A process that is being started is not known by its id yet, and would be taken for a left one.
            asyncio.get_running_loop().call_later(SWEEP_S, self.sweep)
            return
        known = {runner.pid for runner in self._all}
        left = [child.pid for child in psutil.Process().children() if child.pid not in known]
        if left:
            for pid in left:
                kill_tree(pid)
            self._sweeping = asyncio.get_running_loop().create_task(self._reap(left))

    async def _reap(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                await asyncio.to_thread(os.waitpid, pid, 0)
        # What those had below them is here now.
        asyncio.get_running_loop().call_soon(self.sweep)

    def _forget(self, runner: Runner) -> None:
        self._all.discard(runner)
        self.sweep()
        if runner.key.is_async:
            shared = self._shared.get(runner.key)
            if shared is not None and shared.done() and not shared.exception() and shared.result() is runner:
                del self._shared[runner.key]
        elif runner in (idle := self._idle.get(runner.key, [])):
            idle.remove(runner)
