"""The agent's side of one sandbox: verifies the seal, watches memory and time, and says why the process ended.

Rule: no code is sent before `verify` has accepted the facts that the process reports of itself.
"""

import asyncio
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from lattice_worker import background
from lattice_worker.egress.agent import Egress
from lattice_worker.egress.sandbox_network import SandboxNetwork
from lattice_worker.sandbox import facts, memory
from lattice_worker.sandbox.cpu import ProcessorTime
from lattice_worker.sandbox.memory_groups import MemoryGroup, MemoryGroups
from lattice_worker.sandbox.policy import MIB, Policy
from lattice_worker.sandbox.results import require_values

log = logging.getLogger(__name__)

WATCH_S = 0.05


class SandboxError(Exception):
    """A sandbox could not be set up; the message says which part of it."""


class ProcessLostError(SandboxError):
    """The process of a sandbox was lost during the set-up, perhaps killed; another try may succeed."""


class Supervisor:
    """Supervises the process of one sandbox."""

    def __init__(self, policy: Policy, egress: Egress | None = None, groups: MemoryGroups | None = None) -> None:
        self.policy = policy
        self._limit_bytes = policy.memory_bytes
        self._groups = groups
        self._group: MemoryGroup | None = None
        self.network = SandboxNetwork(policy.network, egress)
        # A view of its own is built on an empty folder. Without one the process is given a folder on disk.
        self._scratch = "" if policy.has_namespaces else tempfile.mkdtemp(prefix="lattice-scratch-")
        self.sealed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A refusal that no attempt waits for is not logged as an error.
        self.sealed.add_done_callback(lambda sealed: sealed.cancelled() or sealed.exception())
        self._watching: asyncio.Task[None] | None = None

    @property
    def frame_bytes(self) -> int:
        """The largest frame that is accepted from the process: its outputs, and a header."""
        return self.policy.output_bytes + MIB

    def request(self, folder: str) -> dict[str, Any]:
        """Return the request for the zygote; `folder` is empty and the process's own. Raises OSError."""
        if self._groups is not None:
            self._group = self._groups.make(self.policy.memory_bytes)
        entry = "" if self._group is None else self._group.entry
        return {"policy": self.policy.to_json(), "folder": self._scratch or folder, "group": entry}

    def inspect(self, header: Mapping[str, Any]) -> None:
        """Act on a frame of the process before anything else does. Raises ProtocolError when it must not be sent."""
        match header["kind"]:
            case "ready":
                self.verify(header["facts"])
            case "unsealed":
                self.refuse(str(header["reason"]))
            case "spawn":
                require_values(header["task"]["inputs"].values())
            case "chunk":
                require_values([{"type": header["type"], "blob": 0}])
            case "ask":
                require_values([header["payload"]])

    def verify(self, found: Mapping[str, Any]) -> None:
        """Accept a process or refuse it, by the facts it reports of itself."""
        missing = facts.missing(self.policy, found, facts.namespaces(), os.stat("/").st_dev) + self.network.missing()
        if self._group is not None and not found["group"].endswith(f"/{self._group.name}"):
            missing.append("a control group of its own")
        if missing:
            self.refuse(f"missing: {'; '.join(missing)}")
        elif not self.sealed.done():
            self.sealed.set_result(None)

    def refuse(self, reason: str) -> None:
        """Refuse the process; no effect after it was accepted."""
        self._refuse(SandboxError(f"{self.policy.level}: {reason}"))

    def _refuse(self, error: SandboxError) -> None:
        if not self.sealed.done():
            self.sealed.set_exception(error)

    def watch(self, pid: int, limit_bytes: int, cpus: int, on_excess: Callable[[str, str], None]) -> None:
        """Measure the memory and the processor time of a process and all below it, up to `cpu_s` for each of `cpus`.

        `on_excess` is called once, with the kind and the message of the failure, when one is above its limit.
        """
        limit_bytes = limit_bytes or self.policy.memory_bytes
        if self._group is not None:
            try:
                self._group.limit(limit_bytes)
            except OSError as error:
                on_excess("sandbox_setup", f"its memory could not be limited to {limit_bytes} bytes: {error}")
                return

        def end_unwatched(error: BaseException) -> None:
            on_excess(
                "internal", f"its memory and processor time could not be measured: {type(error).__name__}: {error}"
            )

        watching = self._watch(pid, limit_bytes, self.policy.cpu_s * cpus, on_excess)
        self._watching = background.start(watching, end_unwatched)

    async def _watch(self, pid: int, limit_bytes: int, limit_s: int, on_excess: Callable[[str, str], None]) -> None:
        # Neither gives notice of its growth. With a group the kernel kills one process, and the others are ended here.
        time, self._limit_bytes = ProcessorTime(pid), limit_bytes
        while True:
            if text := await asyncio.to_thread(self._memory_excess, pid, limit_bytes):
                on_excess("out_of_memory", text)
                return
            if (used_s := await asyncio.to_thread(time.used_s)) > limit_s:
                text = f"its processes used {used_s:.1f} s of processor time, and the limit is {limit_s} s"
                on_excess("cpu_time", text)
                return
            await asyncio.sleep(WATCH_S)

    def _memory_excess(self, pid: int, limit_bytes: int) -> str:
        """Return how the processes are above their limit of memory; empty when they are not."""
        if self._group is not None:
            return f"its processes ran out of memory, and the limit is {limit_bytes}" if self._group.has_run_out else ""
        used_bytes = memory.used_bytes(pid, limit_bytes)
        if used_bytes <= limit_bytes:
            return ""
        return f"its processes used {used_bytes} bytes of memory, and the limit is {limit_bytes}"

    def crash(self, status: int, cpu_s: float) -> tuple[str, str] | None:
        """Return the kind and the message of the failure that an exit status stands for, or None for none of a limit.

        `cpu_s` is the processor time that the process and its children had.
        """
        if self._group is not None and status == -signal.SIGKILL and self._group.has_run_out:
            return "out_of_memory", f"its processes ran out of memory, and the limit is {self._limit_bytes}"
        is_late = cpu_s >= self.policy.cpu_s
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and is_late):
            return "cpu_time", f"it used more than {self.policy.cpu_s} s of processor time"
        if status == -signal.SIGSYS:
            return "policy", "it made a system call of another architecture, which the sandbox does not allow"
        return None

    def close(self) -> None:
        """Stop watching: the process has ended."""
        self._refuse(ProcessLostError(f"{self.policy.level}: the process ended before it was sealed"))
        self.network.close()
        if self._watching is not None:
            self._watching.cancel()

    def discard(self) -> None:
        """Delete the files that the process wrote, and its group. Its descendants have to have ended."""
        if self._group is not None and self._groups is not None:
            self._groups.remove(self._group)
        if self._scratch:
            # By descriptors, so that links lead nowhere.
            shutil.rmtree(self._scratch, ignore_errors=True)
