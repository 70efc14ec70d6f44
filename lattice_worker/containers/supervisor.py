"""The agent's side of one container: starts it, verifies it from inside, and says why it ended.

Rule: as for every sandbox, no code is sent before `verify` has accepted the facts that the runner reports of itself.
"""

import errno
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lattice_worker.containers.containers import Container, Containers
from lattice_worker.containers.engine import EngineError
from lattice_worker.egress.agent import Egress
from lattice_worker.pool.zygote import Process
from lattice_worker.sandbox.policy import Policy
from lattice_worker.sandbox.supervisor import SandboxError, Supervisor


class ContainerSupervisor(Supervisor):
    """Supervises one container, and starts it in the place of a zygote."""

    def __init__(self, policy: Policy, containers: Containers, egress: Egress | None = None) -> None:
        super().__init__(policy, egress)
        self._containers = containers
        self._container: Container | None = None
        self._on_excess: Callable[[str, str], None] = lambda _kind, _message: None

    async def fork(self, mode: str, descriptors: Sequence[int], sandbox: Mapping[str, Any] | None = None) -> Process:
        """Return the runner of a new container, which has these descriptors. Raises SandboxError."""
        try:
            container = await self._containers.start(self.policy, descriptors)
        except EngineError as error:
            raise SandboxError(f"docker: {error}") from None
        container.on_oom = lambda: self._on_excess("out_of_memory", self._excess())
        self._container = container
        return container

    def verify(self, found: Mapping[str, Any]) -> None:
        """Accept the container or refuse it, by the facts that its runner reports of itself."""
        if lacks := missing(self.policy, found["container"]):
            self.refuse(f"missing: {'; '.join(lacks)}")
        super().verify(found)

    def watch(self, pid: int, limit_bytes: int, cpus: int, on_excess: Callable[[str, str], None]) -> None:
        """Call `on_excess` when memory runs out in the container: the kernel counts it, and the engine tells."""
        self._on_excess = on_excess
        if self._container is not None and self._container.oom_kills:
            on_excess("out_of_memory", self._excess())

    def crash(self, status: int, cpu_s: float) -> tuple[str, str] | None:
        """Return the kind and the message of the failure of a limit that an exit status stands for, or None."""
        if status == -signal.SIGKILL and self._container is not None and self._container.oom_kills:
            return "out_of_memory", self._excess()
        if (failure := super().crash(status, cpu_s)) is None and self._container is not None:
            return _refusal(self.policy, status, self._container.pids_refused)
        return failure

    def _excess(self) -> str:
        return f"its container used more than {self.policy.memory_bytes} bytes of memory"


def missing(policy: Policy, found: Mapping[str, Any]) -> list[str]:
    """Return which of the engine's parts of a policy do not hold in a container, for people."""
    checks = {
        "the engine's system call filter": found["profile"] == "2",
        "a root folder that is read-only": found["root_is_read_only"],
        # The engine's profile cannot refuse this.
        "the exact system call filter": found["type_on_terminal"] == errno.EPERM,
        "the memory limit": _is_limited(found["memory_bytes"], policy.memory_bytes),
        "the CPU limit": _is_limited(found["cpus"], policy.cpus),
        "the limit of processes": _is_limited(found["processes"], policy.processes + 1),
        "the size of the scratch folder": found["scratch_bytes"] <= policy.scratch_bytes,
        "the size of shared memory": found["shared_memory_bytes"] <= policy.shared_memory_bytes,
        f"Python {sys.version}": found["python"] == sys.version,
    }
    return [name for name, holds in checks.items() if not holds]


def _refusal(policy: Policy, status: int, pids_refused: int) -> tuple[str, str] | None:
    """Return the failure of a runner that crashed after it was refused a process; libraries end themselves then."""
    if not pids_refused or not status:
        return None
    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    text = f"it {how} after it had tried to have more than {policy.processes} processes and threads"
    return "crashed", text


def _is_limited(found: float | None, wanted: float) -> bool:
    return found is not None and found <= wanted
