"""Runners without a process: a test, or an honest script, speaks at the other end of the socket."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lattice_worker.pool.zygote import Process
from lattice_worker.pool.zygotes import Zygotes
from lattice_worker.runner.frames import LENGTH, PACKET_BYTES, WHOLE, Assembler, packets_of, parse


def succeeded(header: dict[str, Any], blobs: list[bytes], value: Any = 1) -> dict[str, Any]:
    """Return a valid answer to an invocation; the value is the output of every member."""
    blobs.append(json.dumps(value).encode())
    outputs = {name: {"type": "application/json", "blob": len(blobs) - 1} for name in header["outputs"]}
    member = {"outputs": outputs, "split": {}}
    head = {"kind": "result", "id": header["id"], "made": [], "duration": 0.001, "has_raw": False}
    return head | ({"items": [member] * len(header["items"])} if header["batched"] else member)


def packet_of(header: dict[str, Any], blobs: Sequence[bytes]) -> bytes:
    """Return a frame whose header may hold values that no runner sends: huge integers, half surrogates, NaN."""
    encoded = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    return WHOLE + LENGTH.pack(len(encoded)) + encoded + b"".join(blobs)


class FakeProcess(Process):
    """The far end of a runner. It answers every invocation with success unless it is `silent`."""

    def __init__(self, given: Sequence[int], *, silent: bool) -> None:
        self.pid = 0
        self.silent = silent
        self.ended = asyncio.get_running_loop().create_future()
        self.invocations: list[dict[str, Any]] = []
        self.sock = socket.socket(fileno=os.dup(given[0]))
        self.sock.setblocking(False)
        self._assembler = Assembler()
        asyncio.get_running_loop().add_reader(self.sock, self._read)
        self.say({"kind": "ready"})

    def say(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send a frame."""
        for packet in packets_of(header, blobs):
            self.send(packet)

    def send(self, packet: bytes) -> None:
        """Send a packet, unless the other end is closed."""
        try:
            self.sock.send(packet)
        except OSError:
            return

    def _read(self) -> None:
        try:
            packet = self.sock.recv(PACKET_BYTES)
        except OSError:
            packet = b""
        if not packet:
            asyncio.get_running_loop().remove_reader(self.sock)
            return
        for frame in self._assembler.feed(packet):
            header, _ = parse(frame)
            if header["kind"] == "invoke":
                self.invocations.append(header)
                if not self.silent:
                    blobs: list[bytes] = []
                    self.say(succeeded(header, blobs), blobs)

    def end(self, status: int) -> None:
        """End with a status."""
        if not self.ended.done():
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()
            self.ended.set_result(status)

    def kill(self) -> None:
        """End as a killed process does: a little later."""
        asyncio.get_running_loop().call_soon(self.end, -signal.SIGKILL)


class FakeZygotes(Zygotes):
    """Makes fake processes; `silent` ones while `is_silent` is set."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.is_silent = False

    async def fork(self, mode: str, descriptors: Sequence[int], sandbox: Mapping[str, Any] | None = None) -> Process:
        """Return a new process at the other end of these descriptors."""
        self.processes.append(FakeProcess(descriptors, silent=self.is_silent))
        return self.processes[-1]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.end(-signal.SIGKILL)


async def settle(is_settled: Callable[[], bool], rounds: int = 10_000) -> None:
    """Run the event loop until a condition holds."""
    for _ in range(rounds):
        if is_settled():
            return
        await asyncio.sleep(0)
    raise AssertionError("the event loop ran, and the expected state was not reached")
