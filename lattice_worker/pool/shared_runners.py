"""The async runners, each shared by all invocations of its key. Rule: a key has at most one that takes invocations."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from lattice_worker import background
from lattice_worker.pool.invocation import RunnerKey
from lattice_worker.pool.runner_handle import Runner


class SharedRunners:
    """Async runners by key, started or being started."""

    def __init__(self) -> None:
        self._by_key: dict[RunnerKey, asyncio.Future[Runner]] = {}

    def get(self, key: RunnerKey) -> Runner | None:
        """Return the runner of a key, unless there is none, it is still being started, or it is being killed."""
        found = self._usable(key)
        return found.result() if found is not None and found.done() else None

    async def get_or_start(self, key: RunnerKey, start: Callable[[RunnerKey], Coroutine[Any, Any, Runner]]) -> Runner:
        """Return the runner of a key; `start` starts it if there is none. Raises OSError."""
        found = self._usable(key)
        if found is None:
            found = self._by_key[key] = background.share(start(key))
        return await asyncio.shield(found)

    def remove(self, runner: Runner) -> None:
        """Remove a runner that has ended."""
        found = self._by_key.get(runner.key)
        if found is not None and found.done() and not found.exception() and found.result() is runner:
            del self._by_key[runner.key]

    def all(self) -> list[Runner]:
        """Return all runners that have started."""
        return [found.result() for found in self._by_key.values() if found.done() and not found.exception()]

    def _usable(self, key: RunnerKey) -> asyncio.Future[Runner] | None:
        found = self._by_key.get(key)
        if found is not None and found.done() and (found.exception() or not found.result().is_fit):
            return None
        return found
