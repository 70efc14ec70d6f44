"""The runners of sandboxes: a level is offered only where it can be set up, and each runner serves one lease."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lattice_worker.pool.invocation import RunnerKey
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.pool.sandbox_runners import SandboxRunners
from lattice_worker.pool.zygote import Process, Zygote
from lattice_worker.sandbox.advice import advised
from lattice_worker.sandbox.policy import LEVELS, SECCOMP, SUBPROCESS
from lattice_worker.sandbox.supervisor import SandboxError
from lattice_worker.store.artifact_staging import ArtifactStaging

ALWAYS = 1000  # More often than a level is tried.


def with_pool(folder: Path, scenario: Callable[[Pool], Awaitable[Any]]) -> Any:
    async def play() -> Any:
        pool = Pool(1, staging)
        try:
            return await scenario(pool)
        finally:
            pool.close()

    staging = ArtifactStaging(str(folder))
    with staging.opened():
        return asyncio.run(play())


def test_levels_are_offered_when_a_process_of_each_was_accepted(tmp_path: Path) -> None:
    assert with_pool(tmp_path, lambda pool: pool.levels()) == list(LEVELS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("times", [1, 2, ALWAYS])
def test_levels_are_tried_again_when_the_zygote_is_killed(
    when: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, left = Zygote.fork, [None] * times
    is_killed: set[Zygote] = set()

    async def killed(self: Zygote, mode: str, descriptors: Any, sandbox: Any = None) -> Process:
        if sandbox is not None and left and self not in is_killed:
            left.pop()
            is_killed.add(self)
        if self in is_killed and when == "before":
            self.process.kill()
            await self.process.wait()
        process = await fork(self, mode, descriptors, sandbox)
        if self in is_killed:
            self.process.kill()
        return process

    monkeypatch.setattr(Zygote, "fork", killed)
    assert with_pool(tmp_path, lambda pool: pool.levels()) == ([] if times == ALWAYS else list(LEVELS))


def test_subprocess_is_offered_without_namespaces_where_a_plain_user_may_make_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def offers(self: SandboxRunners, level: str, network: tuple[str, ...] = ()) -> bool:
        is_offered = level == SUBPROCESS and self._policy(RunnerKey(isolation=level)).is_bare
        if not is_offered:
            self.refusals[level] = "namespaces: it is not permitted"
        return is_offered

    async def scenario(pool: Pool) -> Any:
        levels = await pool.levels()
        return levels, await pool._sandboxed.network_levels(levels), pool._sandboxed.refusals.get(SUBPROCESS)

    monkeypatch.setattr(SandboxRunners, "_offers", offers)
    assert with_pool(tmp_path, lambda pool: pool.levels()) == ([] if os.geteuid() == 0 else [SUBPROCESS])
    monkeypatch.setattr(SandboxRunners, "_may_be_bare", lambda self: True)
    assert with_pool(tmp_path, scenario) == ([SUBPROCESS], [], None)
    assert "subprocess has no namespaces here: namespaces: it is not permitted" in caplog.text


def test_no_level_is_offered_when_its_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LATTICE_TEST_BREAK", "limits")
    with caplog.at_level(logging.WARNING):
        assert with_pool(tmp_path, lambda pool: pool.levels()) == []
    assert "isolation by seccomp is not offered: missing: the limit CPU" in caplog.text


def test_refusal_advises_a_setting_when_its_cause_is_known() -> None:
    assert "unprivileged_userns_clone" in advised("namespaces: PermissionError: [Errno 1] Operation not permitted")
    assert "systempaths=unconfined" in advised("view: OSError: mount: /proc")
    assert advised("missing: the limit CPU") == "missing: the limit CPU"


def test_lease_gets_no_runner_when_the_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(pool: Pool) -> None:
        with pytest.raises(SandboxError, match="the limit CPU"):
            await pool.take(RunnerKey(isolation=SECCOMP, owner="lease"))

    monkeypatch.setenv("LATTICE_TEST_BREAK", "limits")
    with_pool(tmp_path, scenario)


def test_each_lease_gets_a_runner_of_its_own(tmp_path: Path) -> None:
    async def scenario(pool: Pool) -> int:
        keys = [RunnerKey(isolation=SECCOMP, owner=f"lease {number}") for number in range(3)]
        runners = [await pool.take(key) for key in keys]
        assert [runner.key for runner in runners] == keys
        return len(set(runners))

    assert with_pool(tmp_path, scenario) == 3
