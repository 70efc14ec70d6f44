"""The pool of runners when processes cannot be started."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from lattice_worker.pool.invocation import RunnerKey
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.runner.surroundings.process_tree import children_of
from lattice_worker.store.artifact_staging import INCOMING, PREFIX, REPORTED, ArtifactStaging


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_start_that_fails_leaves_nothing_behind_and_is_tried_again(
    is_async: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        pool, key = Pool(1, staging), RunnerKey(is_async=is_async)
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", str(tmp_path / "missing"))
            before = descriptors()
            for _ in range(3):
                with pytest.raises(FileNotFoundError):
                    await pool.take(key)
            assert pool.take_idle(key) is None
            assert descriptors() <= before
            assert {path.name for path in tmp_path.glob(f"{PREFIX}*/*")} == {REPORTED, INCOMING}
        runner = await pool.take(key)
        assert runner.is_fit
        pool.close()
        assert pool.take_idle(key) is None
        with pytest.raises(ConnectionError, match="the worker ends"):
            await pool.take(key)
        await pool.wait_closed()

    staging = ArtifactStaging(str(tmp_path))
    with staging.opened():
        asyncio.run(scenario())


def test_a_process_that_is_being_started_ends_when_the_pool_is_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        before = {*children_of(os.getpid())}  # Of other tests in this process.
        pool = Pool(0, staging)
        taking = asyncio.ensure_future(pool.take(RunnerKey()))
        while not pool._zygotes._starting.locked():
            await asyncio.sleep(0)
        pool.close()
        async with asyncio.timeout(60):
            await pool.wait_closed()
            with pytest.raises(OSError):  # noqa: PT011
                await taking
        assert {*children_of(os.getpid())} <= before

    staging = ArtifactStaging(str(tmp_path))
    with staging.opened():
        asyncio.run(scenario())


def test_a_key_shows_the_names_of_variables_and_no_value() -> None:
    shown = repr(RunnerKey("tenant", variables=(("API_KEY", "canary"),)))
    assert "API_KEY" in shown
    assert "canary" not in shown
