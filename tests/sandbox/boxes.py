"""A sandbox without the rest of the worker: a real zygote, a sealed process, and the frames between it and a test."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import cloudpickle

from lattice_worker.egress.agent import Egress
from lattice_worker.pool.control_socket import Control
from lattice_worker.pool.runner_process import Starter
from lattice_worker.pool.zygote import Process
from lattice_worker.pool.zygotes import Zygotes
from lattice_worker.runner.encoding.values import decode_value
from lattice_worker.sandbox.memory_groups import MemoryGroups
from lattice_worker.sandbox.policy import Policy
from lattice_worker.sandbox.supervisor import Supervisor

TIMEOUT_S = 60.0
LOG_BYTES = 100_000


class Box:
    """One sealed process."""

    def __init__(
        self,
        found: Policy,
        folder: Path,
        supervisor: Supervisor | None = None,
        egress: Egress | None = None,
        groups: MemoryGroups | None = None,
    ) -> None:
        self.supervisor = supervisor or Supervisor(found, egress, groups)
        self.accesses: list[dict[str, Any]] = []
        self.has_lost_network = False
        self._folder = str(folder)
        self.facts: dict[str, Any] = {}
        self.logs = ""
        self.excess = ""
        self._answer: asyncio.Future[tuple[dict[str, Any], list[bytes]]] = asyncio.get_running_loop().create_future()

    async def start(self, starter: Starter) -> Self:
        """Fork the process and wait until it is accepted. Raises SandboxError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open(os.devnull, os.O_RDWR)
        marks = os.memfd_create("marks")
        try:
            given = [theirs.fileno(), null, 2, null, marks]
            network = self.supervisor.network.handover()
            if network is not None:
                given.append(network.fileno())
            self.process: Process = await starter.fork("process", given, self.supervisor.request(self._folder))
        finally:
            theirs.close()
            os.close(null)
            os.close(marks)
            if network is not None:
                network.close()
        self.control = Control(ours, self._take, print, lambda: None)
        self.process.ended.add_done_callback(self._end)
        async with asyncio.timeout(TIMEOUT_S):
            await self.supervisor.sealed
        self.supervisor.network.open(self.accesses.append, self._lose_network)
        return self

    def _lose_network(self) -> None:
        self.has_lost_network = True

    def _end(self, _ended: "asyncio.Future[int]") -> None:
        self.control.drain()
        self.supervisor.refuse("the process ended before it was sealed")
        if not self._answer.done():
            self._answer.cancel()

    def _take(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        self.supervisor.inspect(header)
        match header["kind"]:
            case "ready":
                self.facts = header["facts"]
            case "log":
                self.logs += "".join(text for _, text in header["parts"])
            case "result" if not self._answer.done():
                self._answer.set_result((header, blobs))

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the value of a function in the sandbox, or its failure."""
        self.send(function, *args)
        async with asyncio.timeout(TIMEOUT_S):
            header, blobs = await self._answer
        if "failure" in header:
            return header["failure"]
        found = header["outputs"]["result"]
        return decode_value(found["type"], blobs[found["blob"]])

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the sandbox call a function."""
        code = {"code": "pickle", "bundle": "", "name": "f", "function": "", "entrypoint": ""}
        styles = {"call_style": "keywords", "return_style": "value"}
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.control.send({"kind": "adopt", "environment": environment, "has_secrets": False, "is_hidden": False})
        pickle = cloudpickle.dumps(lambda: function(*args))
        self.control.send({"kind": "function", "digest": "d", **code, **styles}, [pickle])
        header = {"kind": "invoke", "id": "i", "digest": "d", "attempts": [["r", "t", 1]], "items": [{}]}
        header |= {"batched": False, "outputs": [], "split": [], "memory_limit": 0, "store": "", "folder": ""}
        limits = {"inline_limit": 1 << 40, "log_limit": LOG_BYTES, "question_limit": LOG_BYTES, "number": 1}
        self.control.send(header | limits)

    async def end(self) -> int:
        """Return the status with which the process ends."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.process.ended

    def watch(self, limit_bytes: int) -> None:
        """Limit the memory, and the processor time to that of one CPU."""

        def kill(kind: str, message: str) -> None:
            self.excess = f"{kind}: {message}"
            self.process.kill()

        self.supervisor.watch(self.process.pid, limit_bytes, 1, kill)

    async def close(self) -> None:
        """End the process."""
        if hasattr(self, "process"):
            self.process.kill()
            await self.end()
            self.control.drain()
            self.control.close()
        self.supervisor.close()
        self.supervisor.discard()


@contextlib.asynccontextmanager
async def boxes(
    folder: Path, egress: Egress | None = None, named_group: str = ""
) -> AsyncIterator[Callable[[Policy], Any]]:
    """Have a zygote while the block runs; the block gets a function that starts a box of a policy."""
    groups = await MemoryGroups.open(named_group)
    zygotes = Zygotes()
    made: list[Box] = []

    async def start(found: Policy) -> Box:
        own = folder / str(len(made))
        own.mkdir()
        made.append(Box(found, own, None, egress, groups))
        return await made[-1].start(zygotes)

    try:
        yield start
    finally:
        for box in made:
            await box.close()
        zygotes.close()
        for zygote in zygotes._current.values():
            await zygote.process.wait()
        if groups is not None:
            groups.close()


def in_box(found: Policy, folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Return the value of a function in a sandbox of its own."""

    async def scenario() -> Any:
        async with boxes(folder) as start:
            return await (await start(found)).run(function, *args)

    return asyncio.run(scenario())
