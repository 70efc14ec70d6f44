"""The agent's side of one sandbox: verifies the seal, watches memory and time, and says why the process ended.

Rule: no code is sent before `verify` has accepted the facts that the process reports of itself.
"""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from lattice_worker.egress.agent import Egress
from lattice_worker.egress.sandbox_network import SandboxNetwork
from lattice_worker.sandbox import facts, memory
from lattice_worker.sandbox.cpu import ProcessorTime
from lattice_worker.sandbox.policy import MIB, Policy
from lattice_worker.sandbox.results import require_values

WATCH_S = 0.05


class SandboxError(Exception):
    """A sandbox could not be set up; the message says which part of it."""


class Supervisor:
    """Supervises the process of one sandbox."""

    def __init__(self, policy: Policy, egress: Egress | None = None) -> None:
        self.policy = policy
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
        """Return the request for the zygote; `folder` is empty and the process's own."""
        return {"policy": self.policy.to_json(), "folder": self._scratch or folder}

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
        if missing:
            self.refuse(f"missing: {'; '.join(missing)}")
        elif not self.sealed.done():
            self.sealed.set_result(None)

    def refuse(self, reason: str) -> None:
        """Refuse the process; no effect after it was accepted."""
        if not self.sealed.done():
            self.sealed.set_exception(SandboxError(f"{self.policy.level}: {reason}"))

    def watch(self, pid: int, limit_bytes: int, cpus: int, on_excess: Callable[[str, str], None]) -> None:
        """Measure the memory and the processor time of a process and all below it, up to `cpu_s` for each of `cpus`.

        `on_excess` is called once, with the kind and the message of the failure, when one is above its limit.
        """
        watching = self._watch(pid, limit_bytes or self.policy.memory_bytes, self.policy.cpu_s * cpus, on_excess)
        self._watching = asyncio.get_running_loop().create_task(watching)

    async def _watch(self, pid: int, limit_bytes: int, limit_s: int, on_excess: Callable[[str, str], None]) -> None:
        # Neither gives notice of its growth; where there is no cgroup, both have to be asked for.
        time = ProcessorTime(pid)
        while True:
            if (used_bytes := await asyncio.to_thread(memory.used_bytes, pid, limit_bytes)) > limit_bytes:
                text = f"its processes used {used_bytes} bytes of memory, and the limit is {limit_bytes}"
                on_excess("out_of_memory", text)
                return
            if (used_s := await asyncio.to_thread(time.used_s)) > limit_s:
                text = f"its processes used {used_s:.1f} s of processor time, and the limit is {limit_s} s"
                on_excess("cpu_time", text)
                return
            await asyncio.sleep(WATCH_S)

    def crash(self, status: int, cpu_s: float) -> tuple[str, str] | None:
        """Return the kind and the message of the failure that an exit status stands for, or None for none of a limit.

        `cpu_s` is the processor time that the process and its children had.
        """
        is_late = cpu_s >= self.policy.cpu_s
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and is_late):
            return "cpu_time", f"it used more than {self.policy.cpu_s} s of processor time"
        if status == -signal.SIGSYS:
            return "policy", "it made a system call of another architecture, which the sandbox does not allow"
        return None

    def close(self) -> None:
        """Stop watching: the process has ended."""
        self.refuse("the process ended before it was sealed")
        self.network.close()
        if self._watching is not None:
            self._watching.cancel()

    def discard(self) -> None:
        """Delete the files that the process wrote. Its descendants have to have ended."""
        if self._scratch:
            # By descriptors, so that links lead nowhere.
            shutil.rmtree(self._scratch, ignore_errors=True)
