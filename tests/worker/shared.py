"""One worker for several tests, since a start takes a second of processor time.

Rule: each scenario has a session of its own, which begins without leases and artifacts of another one.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from tests.worker.head import TIMEOUT_S, Pair, pair

GONE_S = 30


class SharedWorker:
    """Plays scenarios with one worker, and starts another one when a scenario fails or ends the worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runner = asyncio.Runner()
        self._started = AsyncExitStack()
        self._both: Pair | None = None
        self._children: set[psutil.Process] = set()

    def play(self, scenario: Callable[[Pair], Coroutine[Any, Any, None]]) -> None:
        """Play a scenario in a session of its own."""
        self._runner.run(self._play(scenario))

    def close(self) -> None:
        """End the worker; nothing that it had started at the end of a scenario may outlive it."""
        self._runner.run(self._end())
        self._runner.close()

    async def _play(self, scenario: Callable[[Pair], Coroutine[Any, Any, None]]) -> None:
        if self._both is None:
            self._both = await self._started.enter_async_context(pair(self.folder))
        else:
            await self._begin(self._both)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario(self._both)
                if self._both.process.returncode is not None:
                    await self._end()
                else:
                    self._children.update(psutil.Process(self._both.process.pid).children(recursive=True))
                    await self._forget(self._both)
        except BaseException:
            await self._end()
            raise

    async def _begin(self, both: Pair) -> None:
        both.stream, both.hello = await both.head.dialled_anew()
        both.stream.welcome()

    async def _forget(self, both: Pair) -> None:
        """Begin a session of which the server knows no lease and no artifact."""
        stream, hello = await both.head.dialled_anew()
        artifacts = (*hello.stored_artifact_ids, *hello.reported_artifact_ids)
        stream.welcome(f"after-{uuid4().hex}", drop_artifacts=artifacts)

    async def _end(self) -> None:
        self._both = None
        await self._started.aclose()
        _, left = await asyncio.to_thread(psutil.wait_procs, self._children, GONE_S)
        self._children.clear()
        assert not left, f"the worker left {left}"
