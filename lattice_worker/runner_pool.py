"""The pool of runner processes: which are free, and for whom.

Rule: a process works for one key only. Spare processes belong to none until they are first used; a free process that
was used longest ago makes room for others, and spares are replaced in the background.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container, Iterable

from lattice_worker.artifact_staging import Drafts
from lattice_worker.runner_process import Key, Runner
from lattice_worker.sandbox.policy import LEVELS, Policy, policy_of
from lattice_worker.sandbox.spares import Spares
from lattice_worker.sandbox.supervisor import SandboxError, Supervisor
from lattice_worker.zygote import Zygotes

log = logging.getLogger(__name__)

SEALED_SPARES = 1  # Of each policy.
SEAL_S = 10.0
IDLE_PER_SPARE = 2


class Pool:
    """Runners. Process runners run one invocation at a time, async runners any number. `spares` is how many unused
    processes are kept ready; at most twice as many used ones are kept besides. Those of `retired` bundles are ended as
    soon as they are free; `on_gone` is told that a runner has ended. Runners of a level of isolation are sealed by its
    policy and used once."""

    def __init__(self, spares: int, drafts: Drafts, zygotes: Zygotes | None = None) -> None:
        self._wanted = spares
        self._drafts = drafts
        self._zygotes = zygotes or Zygotes()
        self._sealed: Spares[Runner] = Spares(self._start_sealed, SEALED_SPARES)
        self._spares: list[Runner] = []
        self._idle: dict[Runner, None] = {}  # Used longest ago first.
        self._by_key: dict[Key, list[Runner]] = {}
        self._shared: dict[Key, asyncio.Future[Runner]] = {}
        self._all: set[Runner] = set()
        self._refilling: asyncio.Task[None] | None = None
        self._is_closed = False
        self.retired: Container[str] = ()
        self.on_gone: Callable[[], None] = lambda: None

    async def warm(self) -> None:
        """Start the spare processes."""
        self._refill()
        if self._refilling is not None:
            await self._refilling

    async def levels(self) -> list[str]:
        """Return the levels of isolation that can be set up here: a process was sealed for each and accepted."""
        offered = await asyncio.gather(*map(self._offers, LEVELS))
        return [level for level, is_offered in zip(LEVELS, offered, strict=True) if is_offered]

    async def _offers(self, level: str) -> bool:
        policy = policy_of(level)
        try:
            self._sealed.add(policy, await self._start_sealed(policy))
        except (OSError, SandboxError) as error:
            log.warning("isolation by %s is not offered: %s", level, error)
            return False
        return True

    async def take(self, key: Key) -> Runner:
        """Return a runner that is free to run one more invocation. Raises OSError and SandboxError."""
        if key.isolation:
            runner = await self._sealed.take(policy_of(key.isolation, key.bundle, key.gpu_indices))
            runner.adopt(key)
            return runner
        if key.is_async:
            shared = self._usable(key)
            if shared is None:
                shared = self._shared[key] = asyncio.ensure_future(self._start(key))
            runner = await asyncio.shield(shared)
            self._leave_idle(runner)
            return runner
        return self.take_idle(key) or await self._start(key)

    def take_idle(self, key: Key) -> Runner | None:
        """Return a free runner without waiting, or None."""
        if key.isolation:
            sealed = self._sealed.take_waiting(policy_of(key.isolation, key.bundle, key.gpu_indices))
            if sealed is not None:
                sealed.adopt(key)
            return sealed
        if key.is_async:
            shared = self._usable(key)
            if shared is None or not shared.done():
                return None
            self._leave_idle(shared.result())
            return shared.result()
        # The one used last: it has its memory in the caches, and the others can go.
        while (runner := next(reversed(self._by_key.get(key, [])), None)) is not None:
            self._leave_idle(runner)
            if runner.is_fit:
                return runner
        while self._spares:
            runner = self._spares.pop()
            if runner.is_fit:
                runner.adopt(key)
                self._refill()
                return runner
        return None

    def _usable(self, key: Key) -> asyncio.Future[Runner] | None:
        """Return the shared runner of a key, or the one that is being started; none that failed or is being killed."""
        shared = self._shared.get(key)
        if shared is not None and shared.done() and (shared.exception() or not shared.result().is_fit):
            return None
        return shared

    def forget(self, digests: Iterable[str]) -> None:
        """Have every runner drop functions, and end the free ones of retired bundles."""
        for runner in list(self._all):
            runner.forget(digests)
        self._sealed.drop(lambda policy: any(path in self.retired for path in policy.read_paths))
        for runner in [runner for runner in self._idle if runner.key.bundle in self.retired]:
            self._leave_idle(runner)
            runner.kill()

    def uses(self, bundle: str) -> bool:
        """Whether a runner has a bundle."""
        return any(bundle == runner.key.bundle or bundle in runner.read_paths for runner in self._all)

    def close(self) -> None:
        """Kill every runner."""
        self._is_closed = True
        if self._refilling is not None:
            self._refilling.cancel()
        self._sealed.close()
        for runner in list(self._all):
            runner.kill()
        self._zygotes.close()

    async def _start(self, key: Key) -> Runner:
        runner = await self._start_spare(is_async=key.is_async)
        runner.adopt(key)
        return runner

    async def _start_spare(self, *, is_async: bool = False) -> Runner:
        runner = Runner(self._drafts, self._put_back, self._forget)
        await runner.start(self._zygotes, is_async=is_async)
        self._all.add(runner)
        return runner

    async def _start_sealed(self, policy: Policy) -> Runner:
        """Start a process that is sealed and accepted. Raises OSError and SandboxError."""
        sandbox = Supervisor(policy)
        runner = Runner(self._drafts, self._put_back, self._forget, sandbox)
        try:
            await runner.start(self._zygotes, is_async=False)
            self._all.add(runner)
            async with asyncio.timeout(SEAL_S):
                await sandbox.sealed
        except TimeoutError:
            runner.kill()
            raise SandboxError(f"{policy.level}: the process was not sealed within {SEAL_S:g} s") from None
        except BaseException:
            if runner in self._all:
                runner.kill()
            else:
                sandbox.discard()
            raise
        return runner

    def _refill(self) -> None:
        if not self._is_closed and (self._refilling is None or self._refilling.done()):
            self._refilling = asyncio.get_running_loop().create_task(self._start_spares())

    async def _start_spares(self) -> None:
        # Where a process cannot be started now, the attempt that needs one says so.
        with contextlib.suppress(OSError):
            while len(self._spares) < self._wanted:
                self._spares.append(await self._start_spare())

    def _put_back(self, runner: Runner) -> None:
        """Note that a runner has nothing to do."""
        if runner.key.owner or runner.key.bundle in self.retired:
            runner.kill()
        if not runner.is_fit or runner not in self._all:
            return
        self._idle[runner] = None
        if not runner.key.is_async:
            self._by_key.setdefault(runner.key, []).append(runner)
        if len(self._idle) > self._wanted * IDLE_PER_SPARE:
            oldest = next(iter(self._idle))
            self._leave_idle(oldest)
            oldest.kill()

    def _leave_idle(self, runner: Runner) -> None:
        if runner in self._idle:
            del self._idle[runner]
            same = self._by_key.get(runner.key, [])
            if runner in same:
                same.remove(runner)
            if not same:
                self._by_key.pop(runner.key, None)

    def _forget(self, runner: Runner) -> None:
        self._all.discard(runner)
        self._leave_idle(runner)
        if runner in self._spares:
            self._spares.remove(runner)
        shared = self._shared.get(runner.key)
        if shared is not None and shared.done() and not shared.exception() and shared.result() is runner:
            del self._shared[runner.key]
        self.on_gone()
