"""The pool of runners: which are free, and for which key.

Rule: a runner serves one key. Spare runners have none until they are first used. The least recently used idle runner
makes room for others, and spares are replaced in the background.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Container, Iterable

from lattice_worker import background
from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.containers import Containers
from lattice_worker.containers.supervisor import ContainerSupervisor
from lattice_worker.egress.agent import Egress
from lattice_worker.pool.idle_runners import IdleRunners
from lattice_worker.pool.invocation import RunnerKey
from lattice_worker.pool.runner_counts import RunnerCounts
from lattice_worker.pool.runner_handle import Runner
from lattice_worker.pool.sandbox_runners import SandboxRunners
from lattice_worker.pool.shared_runners import SharedRunners
from lattice_worker.pool.zygotes import Zygotes
from lattice_worker.sandbox.supervisor import Supervisor
from lattice_worker.store.artifact_staging import ArtifactStaging

IDLE_PER_SPARE = 2


class Pool:
    """Runners. Process runners run one invocation at a time, async runners any number.

    `spares` is how many unused runners are kept ready; at most twice as many idle ones are kept besides. Idle runners
    of `retired` bundles are ended; `on_gone` is called when a runner has ended. `engine` makes containers.
    """

    def __init__(
        self,
        spares: int,
        staging: ArtifactStaging,
        zygotes: Zygotes | None = None,
        engine: EngineConfig | None = None,
        egress: Egress | None = None,
        named_group: str | None = None,
    ) -> None:
        self._wanted = spares
        self._staging = staging
        self._zygotes = zygotes or Zygotes()
        self._all: set[Runner] = set()
        self._spares: list[Runner] = []
        self._idle = IdleRunners()
        self._shared = SharedRunners()
        self._containers = Containers(engine or EngineConfig())
        self._egress = egress or Egress()
        self._sandboxed = SandboxRunners(
            lambda sandbox: self._start_unused(sandbox=sandbox), self._containers, self._egress, named_group
        )
        self._refilling: asyncio.Task[None] | None = None
        self._is_closed = False
        self.retired: Container[str] = ()
        self.counts = RunnerCounts()  # For metrics.
        self.on_gone: Callable[[], None] = lambda: None

    async def warm(self) -> None:
        """Start the spare runners."""
        self._refill()
        if self._refilling is not None:
            await self._refilling

    async def levels(self) -> list[str]:
        """Return the levels of isolation that can be set up on this machine."""
        return await self._sandboxed.levels()

    async def network_levels(self, levels: Iterable[str]) -> list[str]:
        """Return which of these levels restrict the servers that a task may connect to."""
        return await self._sandboxed.network_levels(levels)

    @property
    def has_groups(self) -> bool:
        """Whether the kernel limits the memory of sandboxes that are forked."""
        return self._sandboxed.has_groups

    def level_refusals(self) -> dict[str, str]:
        """Return by level why it cannot be set up on this machine; filled by `levels`."""
        return dict(self._sandboxed.refusals)

    async def take(self, key: RunnerKey) -> Runner:
        """Return a runner that can run one more invocation. Raises OSError and SandboxError."""
        if (idle := self.take_idle(key)) is not None:
            return idle
        self.counts.waited[key.isolation] += 1
        if key.isolation:
            return await self._sandboxed.take(key)
        if key.is_async:
            runner = await self._shared.get_or_start(key, self._start)
            self._idle.remove(runner)
            return runner
        return await self._start(key)

    def take_idle(self, key: RunnerKey) -> Runner | None:
        """Return a runner that can run one more invocation now, or None."""
        if key.isolation:
            return self._sandboxed.take_spare(key)
        runner = self._shared.get(key) if key.is_async else self._idle.take(key) or self._take_spare(key)
        if runner is not None:
            self._idle.remove(runner)
        return runner

    def _take_spare(self, key: RunnerKey) -> Runner | None:
        while self._spares:
            runner = self._spares.pop()
            if runner.is_fit:
                runner.adopt(key)
                self._refill()
                return runner
        return None

    def forget(self, digests: Iterable[str]) -> None:
        """Have every runner drop functions, and end the idle runners of retired bundles."""
        for runner in list(self._all):
            runner.functions.forget(digests)
        self._sandboxed.drop(self.retired)
        for runner in self._idle.all():
            if runner.key.bundle in self.retired:
                self._idle.remove(runner)
                runner.kill()

    def all(self) -> Collection[Runner]:
        """Return all runners."""
        return self._all

    def uses(self, bundle: str) -> bool:
        """Whether a runner has a bundle."""
        return any(bundle == runner.key.bundle or bundle in runner.read_paths for runner in self._all)

    def close(self) -> None:
        """Kill every runner."""
        self._is_closed = True
        if self._refilling is not None:
            self._refilling.cancel()
        self._sandboxed.close()
        for runner in list(self._all):
            runner.kill()
        self._zygotes.close()
        self._egress.close()

    async def wait_closed(self) -> None:
        """Wait until control groups and containers are removed. `close` comes first."""
        # Also when a second signal ends the worker at once: processes that were killed end soon.
        groups = asyncio.ensure_future(self._close_groups())
        try:
            await asyncio.shield(groups)
        except asyncio.CancelledError:
            await groups
            raise
        await self._egress.wait_closed()
        await self._containers.close()

    async def _close_groups(self) -> None:
        await self._zygotes.wait_closed()
        await self._sandboxed.close_groups()

    def check(self) -> None:
        """Assert that each runner that takes invocations runs one or can be taken."""
        self._idle.check()
        free = {*self._idle.all(), *self._spares, *self._shared.all()}
        fit = [runner for runner in self._all if runner.is_fit and runner.sandbox is None]
        assert all(runner in free or runner.running or runner.pipeline for runner in fit)
        assert not any(runner.running or runner.pipeline for runner in self._idle.all())

    async def _start(self, key: RunnerKey) -> Runner:
        runner = await self._start_unused(is_async=key.is_async)
        runner.adopt(key)
        return runner

    async def _start_unused(self, *, is_async: bool = False, sandbox: Supervisor | None = None) -> Runner:
        started, level = time.monotonic(), "" if sandbox is None else sandbox.policy.level
        runner = Runner(self._staging, self._put_back, self._forget, sandbox)
        starter = sandbox if isinstance(sandbox, ContainerSupervisor) else self._zygotes
        await runner.start(starter, is_async=is_async)
        self._all.add(runner)
        self.counts.started[level] += 1
        runner.when_ready(lambda: self.counts.note_ready(level, time.monotonic() - started))
        return runner

    def _refill(self) -> None:
        if not self._is_closed and (self._refilling is None or self._refilling.done()):
            self._refilling = background.start(self._start_spares(), background.only_log)

    async def _start_spares(self) -> None:
        # Where a process cannot be started now, the attempt that needs one reports it.
        with contextlib.suppress(OSError):
            while len(self._spares) < self._wanted:
                self._spares.append(await self._start_unused())

    def _put_back(self, runner: Runner) -> None:
        """Take a runner that became idle."""
        if runner.key.owner or runner.key.bundle in self.retired:
            runner.kill()
        if runner.is_fit and runner in self._all:
            self._idle.add(runner)
            if len(self._idle) > self._wanted * IDLE_PER_SPARE:
                self._idle.take_oldest().kill()

    def _forget(self, runner: Runner) -> None:
        self._all.discard(runner)
        self._idle.remove(runner)
        if runner in self._spares:
            self._spares.remove(runner)
        self._shared.remove(runner)
        self.on_gone()
