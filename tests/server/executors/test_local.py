"""The local executor when a worker cannot be started."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent, WorkerLost
from lattice_server.engine.ports import Contact
from lattice_server.executors import local


def test_a_worker_that_could_not_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        lost: asyncio.Queue[WorkerLost] = asyncio.Queue()

        def post(events: Sequence[SchedulerEvent]) -> None:
            for event in events:
                assert isinstance(event, WorkerLost)
                lost.put_nowait(event)

        commands = iter([["/nowhere"], [sys.executable, "-c", "raise SystemExit(3)"]])
        monkeypatch.setattr(local, "worker_command", lambda *_: next(commands))
        executor = local.LocalExecutor(ServerConfig(num_cpus=1), tmp_path)
        async with asyncio.timeout(60):
            await executor.start(
                Contact("unix:none", "none", lambda node_id, subject: "", lambda token: None, lambda error: None), post
            )
            assert "could not be started" in (await lost.get()).reason
            assert "status 3" in (await lost.get()).reason
        await executor.stop()

    asyncio.run(scenario())
