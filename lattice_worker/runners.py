"""Owns the runner processes: starts one, hands it invocations, learns of its death.

Rule: a runner that died, or was killed, never runs anything again; what it ran is told as one outcome each.
"""

import asyncio
import codecs
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from lattice_worker.drafts import Drafts

PROGRAM = Path(__file__).parent / "runner" / "__main__.py"
# Names the worker to all that its tasks start; whoever started the worker finds them by it when the worker is killed.
MARK = "LATTICE_WORKER_ID"
RAW_READ_BYTES = 1 << 16
HANG_UP_S = 0.5
MAX_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Key:
    """What runners are kept apart by."""

    bundle: str = ""
    gpu_indices: tuple[int, ...] = ()
    is_async: bool = False


@dataclass(slots=True)
class Invocation:
    """One call of a function. `on_log` takes (stream, text, truncated); the others a header and its blobs.

    `claim` numbers one that was sent ahead; `ending` is the answer of one that is being ended, whatever it says itself.
    """

    name: str
    header: dict[str, Any]
    blobs: Sequence[bytes]
    on_log: Callable[[str, str, bool], None]
    on_spawn: Callable[[dict[str, Any], list[bytes]], None]
    on_end: Callable[[dict[str, Any], list[bytes]], None]
    raw_left: int = 0
    ending: dict[str, Any] | None = field(default=None)
    claim: int = 0


class Runner(asyncio.Protocol):
    """One process. All methods run on the agent's event loop.

    Invocations may be sent ahead, so that the process goes on without waiting for the agent. Their numbers lie in a
    pipe that both sides can read: the process reads one before it runs its invocation, the agent reads them to take
    back what has not begun. Whoever has read a number, and the kernel gives each to one reader only, owns it; an
    invocation whose number is not there any more is not run.
    """

    def __init__(
        self, key: Key, drafts: Drafts, on_idle: Callable[["Runner"], None], on_gone: Callable[["Runner"], None]
    ) -> None:
        self.key = key
        self.folder = ""
        self._drafts = drafts
        self.known: set[str] = set()
        self.running: dict[str, Invocation] = {}
        self.ahead: dict[str, Invocation] = {}
        self._claims = count(1)
        self._claim_read, self._claim_write = -1, -1
        self._has_hung_up = asyncio.Event()
        self._is_killed = False
        self._is_ready = False
        self._when_ready: list[Callable[[], None]] = []
        self._on_idle, self._on_gone = on_idle, on_gone
        self._buffer = bytearray()
        self._raw: dict[int, tuple[str, codecs.IncrementalDecoder]] = {}
        self._control: socket.socket | None = None
        self._writer: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._oom_kills = oom_kills()

    async def start(self) -> None:
        """Start the process. Raises OSError, and leaves nothing behind then."""
        with contextlib.ExitStack() as undo:
            await self._start(undo)
            undo.pop_all()

    async def _start(self, undo: contextlib.ExitStack) -> None:
        self.folder = self._drafts.folder()
        undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        undo.callback(self.kill)
        with theirs, contextlib.ExitStack() as done:
            out_read, out_write = _pipe(undo, done)
            err_read, err_write = _pipe(undo, done)
            self._claim_read, self._claim_write = _pipe(undo, undo)
            for descriptor in (self._claim_read, self._claim_write):
                os.set_blocking(descriptor, False)
            self._process = await self._spawn(theirs.fileno(), out_write, err_write)
        loop = asyncio.get_running_loop()
        self._control = ours
        ours.setblocking(False)
        transport, _ = await loop.create_connection(lambda: self, sock=ours)
        self._writer = transport
        decoder = codecs.getincrementaldecoder("utf-8")
        self._raw = {out_read: ("stdout", decoder("replace")), err_read: ("stderr", decoder("replace"))}
        for descriptor in self._raw:
            os.set_blocking(descriptor, False)
            loop.add_reader(descriptor, self._on_raw, descriptor)
        self._watcher = loop.create_task(self._watch())

    async def _spawn(self, control: int, out: int, err: int) -> asyncio.subprocess.Process:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name != "GRPC_ENABLE_FORK_SUPPORT" and (name == MARK or not name.startswith("LATTICE_"))
        }
        # Always: a task that asked for no device must not find one that others count on.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.key.gpu_indices))
        # The order in which the indices were counted; CUDA's own puts the fastest first.
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        return await asyncio.create_subprocess_exec(
            sys.executable,
            str(PROGRAM),
            str(control),
            str(self._claim_read),
            "async" if self.key.is_async else "process",
            str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=[control, self._claim_read],
            env=environment,
            start_new_session=True,
        )

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call once the process has started up and can run something; at once when it has."""
        if self._is_ready:
            call()
        else:
            self._when_ready.append(call)

    def define(self, digest: str, header: dict[str, Any], blob: bytes) -> None:
        """Send a function, once."""
        if digest not in self.known:
            self.known.add(digest)
            self._send(header, [blob])

    def invoke(self, invocation: Invocation) -> None:
        """Run one invocation."""
        self.running[invocation.name] = invocation
        self._send(invocation.header, invocation.blobs)

    def send_ahead(self, invocation: Invocation) -> None:
        """Have an invocation run after those that run or were sent ahead before; `begin` tells when its turn comes."""
        invocation.claim = invocation.header["claim"] = next(self._claims)
        self.ahead[invocation.name] = invocation
        os.write(self._claim_write, struct.pack("<Q", invocation.claim))
        self._send(invocation.header, invocation.blobs)

    def begin(self, name: str) -> Invocation:
        """Note that it is the turn of an invocation sent ahead."""
        invocation = self.running[name] = self.ahead.pop(name)
        return invocation

    def take_back(self, name: str) -> bool:
        """Take back an invocation sent ahead; False when the process has begun it.

        What else it has not begun comes back too, to be sent anew: a number put back into the pipe could come too late
        for a process that has found the pipe empty.
        """
        try:
            data = os.read(self._claim_read, 8 * MAX_AHEAD)
        except BlockingIOError:
            return False
        unread = frozenset(struct.unpack(f"<{len(data) // 8}Q", data))
        self.ahead = {other: found for other, found in self.ahead.items() if found.claim not in unread}
        for invocation in self.running.values():
            if invocation.claim in unread:
                # Its turn has come, and the process has not got to it yet.
                del invocation.header["claim"]
                self._send(invocation.header, invocation.blobs)
        return name not in self.ahead

    def cancel(self, name: str) -> None:
        """Ask an async invocation to end."""
        self._send({"kind": "cancel", "id": name}, [])

    @property
    def pid(self) -> int | None:
        """The process's id; None before it started."""
        return None if self._process is None else self._process.pid

    def kill(self) -> None:
        """End the process and all its descendants, those in sessions of their own included."""
        process = self._process
        self._is_killed = True
        if process is not None and process.returncode is None:
            kill_tree(process.pid)

    @property
    def is_fit(self) -> bool:
        """Whether the process takes invocations, as far as is known: it is not being killed and has not hung up."""
        return not (self._is_killed or self._has_hung_up.is_set())

    def data_received(self, data: bytes) -> None:
        """Take bytes of the control socket."""
        self._buffer += data
        buffer = self._buffer
        while len(buffer) >= 4:
            (length,) = struct.unpack_from("<I", buffer)
            if len(buffer) < 4 + length:
                return
            header = json.loads(bytes(buffer[4 : 4 + length]))
            sizes = header["blobs"]
            end = 4 + length + sum(sizes)
            if len(buffer) < end:
                return
            blobs, offset = [], 4 + length
            for size in sizes:
                blobs.append(bytes(buffer[offset : offset + size]))
                offset += size
            del buffer[:end]
            self._take(header, blobs)

    def _take(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        if header["kind"] == "ready":
            self._is_ready = True
            for call in self._when_ready:
                call()
            self._when_ready.clear()
            return
        invocation = self.running.get(header["id"])
        if invocation is None:
            self._drafts.delete(self.folder, header.get("made", ()))
            return
        if header["kind"] == "log":
            for stream, text in header["parts"]:
                invocation.on_log(stream, text, header["truncated"])
            return
        if header["kind"] == "spawn":
            self._drafts.publish(self.folder, header["made"])
            invocation.on_spawn(header["task"], blobs)
            return
        if header["has_raw"]:
            # The process waits, so what there is to read is all of this invocation's.
            for descriptor in list(self._raw):
                self._read_raw(descriptor)
            self._send({"kind": "drained"}, [])
        del self.running[header["id"]]
        if not self.running and not self.ahead:
            self._on_idle(self)
        if invocation.ending:
            self._drafts.delete(self.folder, header["made"])
        else:
            self._drafts.publish(self.folder, header["made"])
        invocation.on_end(invocation.ending or header, [] if invocation.ending else blobs)

    def _send(self, header: dict[str, Any], blobs: Sequence[bytes]) -> None:
        header["blobs"] = [len(blob) for blob in blobs]
        encoded = json.dumps(header).encode()
        if self._writer is not None and not self._has_hung_up.is_set():
            self._writer.write(b"".join([struct.pack("<I", len(encoded)), encoded, *blobs]))

    def _on_raw(self, descriptor: int) -> None:
        # If the process has gone on to the next invocation, it has said so: then this is what that one writes.
        if self._control is not None:
            with contextlib.suppress(BlockingIOError, OSError):
                self.data_received(self._control.recv(RAW_READ_BYTES))
        if descriptor in self._raw:
            self._read_raw(descriptor)

    def _read_raw(self, descriptor: int) -> None:
        """Give what the process wrote past `sys.stdout` to the invocation that runs, if it is the only one."""
        try:
            data = os.read(descriptor, RAW_READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._close_raw(descriptor)
        elif len(self.running) == 1:
            invocation = next(iter(self.running.values()))
            if invocation.raw_left <= 0:
                return
            stream, decoder = self._raw[descriptor]
            invocation.on_log(stream, decoder.decode(data), False)
            invocation.raw_left -= len(data)
            if invocation.raw_left <= 0:
                invocation.on_log(stream, "[output cut]\n", True)

    def _close_raw(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        if self._raw.pop(descriptor, None) is not None:
            os.close(descriptor)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the process will say nothing more."""
        self._has_hung_up.set()

    async def _watch(self) -> None:
        process = self._process
        assert process is not None
        status = await process.wait()
        # What it said before it died is still to be read. A child of it may hold the socket open for longer.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANG_UP_S):
                await self._has_hung_up.wait()
        for descriptor in list(self._raw):
            self._read_raw(descriptor)
        for descriptor in list(self._raw):
            self._close_raw(descriptor)
        if self._writer is not None:
            self._writer.close()
        # What it had not begun has its turn elsewhere.
        self.ahead.clear()
        for descriptor in (self._claim_read, self._claim_write):
            os.close(descriptor)
        self._on_gone(self)
        running, self.running = self.running, {}
        by_kernel = status == -signal.SIGKILL and oom_kills() > self._oom_kills
        for invocation in running.values():
            answer = invocation.ending or _crash(status, is_alone=len(running) == 1, by_kernel=by_kernel)
            invocation.on_end(answer, [])
        # What it was writing, or wrote and did not come to tell.
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[int, int]:
    """Return a pipe whose ends are closed by these."""
    read, write = os.pipe()
    reading.callback(os.close, read)
    writing.callback(os.close, write)
    return read, write


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants; what one of them still starts meanwhile is found by the pool's `sweep`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def oom_kills() -> int:
    """Return how many processes of this machine the kernel has killed because memory ran out."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _crash(status: int, *, is_alone: bool, by_kernel: bool) -> dict[str, Any]:
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
        how = f"was killed by signal {-status} ({name})"
    else:
        how = f"exited with status {status}"
    if by_kernel:
        text = "the kernel killed the task's process because memory ran out"
        failure = {"kind": "out_of_memory", "type": "", "message": text, "exit_status": status}
    elif is_alone:
        failure = {"kind": "crashed", "type": "", "message": f"the task's process {how}", "exit_status": status}
    else:
        text = f"the process it shared with other async tasks {how}"
        failure = {"kind": "worker_lost", "type": "", "message": text, "exit_status": status}
    return {"kind": "result", "failure": failure, "duration": 0.0}
