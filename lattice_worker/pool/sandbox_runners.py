"""The runners of sandboxes: each is sealed by the policy of its key, is verified, and serves one lease."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import replace

from lattice_worker.containers.containers import Containers
from lattice_worker.containers.engine import EngineError
from lattice_worker.containers.supervisor import ContainerSupervisor
from lattice_worker.egress.agent import Egress
from lattice_worker.pool.invocation import RunnerKey
from lattice_worker.pool.runner_handle import Runner
from lattice_worker.sandbox.advice import advised
from lattice_worker.sandbox.memory_groups import GroupError, MemoryGroups
from lattice_worker.sandbox.policy import DOCKER, LEVELS, SUBPROCESS, Policy, container_policy, policy_of
from lattice_worker.sandbox.spares import Spares
from lattice_worker.sandbox.supervisor import ProcessLostError, SandboxError, Supervisor

log = logging.getLogger(__name__)

SPARES = 1  # Of each policy.
SEAL_S = 60.0
TRIES = 3  # A level is tried again when its process, or the zygote, is lost in the self-test.
NETWORK = ("lattice.invalid:443",)  # For the self-test; no process connects to this name.


class SandboxRunners:
    """Starts and keeps sealed runners. `start` starts the process of a runner with a supervisor.

    `refusals` are the levels that cannot be set up here, with the reasons, once `levels` has tried.
    """

    def __init__(
        self,
        start: Callable[[Supervisor], Awaitable[Runner]],
        containers: Containers,
        egress: Egress,
        named_group: str | None = None,
    ) -> None:
        self._start = start
        self._containers = containers
        self._egress = egress
        self._named_group = named_group
        self._groups: MemoryGroups | None = None
        self.refusals: dict[str, str] = {}
        self._is_bare = False
        self._spares: Spares[Runner] = Spares(self._seal, SPARES)

    async def levels(self) -> list[str]:
        """Return the levels of isolation that can be set up here: a process was sealed for each and accepted."""
        try:
            self._groups = await MemoryGroups.open(self._named_group)
        except GroupError as error:
            log.warning("isolation by %s is not offered: %s", " and ".join(LEVELS), error)
            self.refusals |= dict.fromkeys(LEVELS, str(error))
            return [DOCKER] if await self._offers_containers() else []
        offered = await asyncio.gather(*map(self._offers, LEVELS), self._offers_containers())
        if not offered[0] and self._may_be_bare():
            self._is_bare = True
            log.warning("%s has no namespaces here: %s", SUBPROCESS, self.refusals.pop(SUBPROCESS))
            offered[0] = await self._offers(SUBPROCESS)
        return [level for level, is_offered in zip((*LEVELS, DOCKER), offered, strict=True) if is_offered]

    @property
    def has_groups(self) -> bool:
        """Whether the kernel limits the memory of forked processes."""
        return self._groups is not None

    async def network_levels(self, levels: Iterable[str]) -> list[str]:
        """Return which of these levels restrict a task to some servers: a process was sealed for each and accepted."""
        found = [level for level in levels if level != SUBPROCESS or not self._is_bare]
        offered = await asyncio.gather(*(self._offers(level, NETWORK) for level in found))
        return [level for level, is_offered in zip(found, offered, strict=True) if is_offered]

    async def take(self, key: RunnerKey) -> Runner:
        """Return a runner that was never used. Raises OSError and SandboxError."""
        runner = await self._spares.take(self._policy(key))
        runner.adopt(key)
        return runner

    def take_spare(self, key: RunnerKey) -> Runner | None:
        """Return a runner that was never used, if one waits."""
        try:
            runner = self._spares.take_waiting(self._policy(key))
        except SandboxError:  # It is raised again by `take`, for the attempt.
            return None
        if runner is not None:
            runner.adopt(key)
        return runner

    def drop(self, bundles: Container[str]) -> None:
        """End the runners that wait for leases of some bundles."""
        self._spares.drop(lambda policy: any(path in bundles for path in policy.read_paths))

    def close(self) -> None:
        """End the runners that wait."""
        self._spares.close()

    async def close_groups(self) -> None:
        """Remove the control groups. All processes have to have ended."""
        if self._groups is not None:
            await asyncio.to_thread(self._groups.close)
            self._groups = None

    async def _offers(self, level: str, network: tuple[str, ...] = ()) -> bool:
        policy = self._policy(RunnerKey(isolation=level, network=network))
        try:
            runner = await self._try(policy)
            if network:
                runner.kill()
                return True
            self._spares.add(policy, runner)
        except (OSError, SandboxError) as error:
            if network:
                log.warning("servers that a task may connect to are not restricted at %s: %s", level, error)
                return False
            self.refusals[level] = advised(str(error).removeprefix(f"{level}: "))
            log.warning("isolation by %s is not offered: %s", level, self.refusals[level])
            return False
        return True

    def _may_be_bare(self) -> bool:
        """Whether sandboxes of this agent's user may be without namespaces, where the machine allows none."""
        policy = policy_of(SUBPROCESS)
        return not policy.is_root and not policy.skipped_step

    async def _try(self, policy: Policy) -> Runner:
        """Seal a process, and another one if it is lost. Raises OSError and SandboxError."""
        for left in reversed(range(TRIES)):
            try:
                return await self._seal(policy)
            except (ConnectionError, ProcessLostError) as error:
                if not left:
                    raise
                log.warning("%s is tried again: %s", policy.level, error)
        raise AssertionError("the last try raises")

    async def _offers_containers(self) -> bool:
        try:
            await self._containers.open()
        except EngineError as error:
            # Most machines have no engine, and no need for one.
            log.info("isolation by docker is not offered: %s", error)
            self.refusals[DOCKER] = str(error)
            return False
        return await self._offers(DOCKER)

    async def _seal(self, policy: Policy) -> Runner:
        """Start a runner that is sealed and accepted. Raises OSError and SandboxError."""
        if policy.is_container:
            supervisor: Supervisor = ContainerSupervisor(policy, self._containers, self._egress)
        else:
            supervisor = Supervisor(policy, self._egress, self._groups)
        try:
            runner = await self._start(supervisor)
        except BaseException:
            supervisor.discard()
            raise
        try:
            async with asyncio.timeout(SEAL_S):
                await supervisor.sealed
        except BaseException as error:
            runner.kill()
            if isinstance(error, TimeoutError):
                raise SandboxError(f"{policy.level}: the process was not sealed within {SEAL_S:g} s") from None
            raise
        return runner

    def _policy(self, key: RunnerKey) -> Policy:
        if key.isolation == DOCKER:
            if key.gpu_indices:
                raise SandboxError("docker: a container is given no GPU; isolation='seccomp' gives one")
            return container_policy(key.bundle, key.memory_bytes, key.threads, key.network)
        policy = policy_of(key.isolation, key.bundle, key.gpu_indices, key.network)
        if key.isolation != SUBPROCESS or not self._is_bare:
            return policy
        if policy.network:
            text = "a worker whose user may make no namespaces restricts no network; isolation='seccomp' does"
            raise SandboxError(f"{key.isolation}: {text}")
        return replace(policy, is_bare=True)
