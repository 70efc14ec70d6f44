"""The runner processes: hands one invocations, takes its answers, learns of its death.

Rule: an invocation that a runner took ends once: it is answered, it fails with its process, or it is given back. One
that a runner had not begun is run by another.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lattice_worker.artifact_staging import Drafts
from lattice_worker.control_socket import Control
from lattice_worker.rawoutput import RawOutput
from lattice_worker.runner.frames import MAX_FRAME_BYTES, FrameTooLargeError
from lattice_worker.sandbox.policy import MIB, THREADS
from lattice_worker.sandbox.results import require_no_files
from lattice_worker.sandbox.supervisor import Supervisor
from lattice_worker.zygote import Process, Zygotes

log = logging.getLogger(__name__)

HANG_UP_S = 0.5
DESCRIBE_S = 1.0
MAX_AHEAD = 64
MARK_BYTES = 8  # Of each of two: whose step runs, and who alone has run since all that was written was read.


@dataclass(frozen=True, slots=True)
class Key:
    """What a process can be used for again: work of one tenant that uses the same modules and devices. `owner` is set
    for a process that one lease has for itself. `isolation` is the level of its sandbox, in which numerical libraries
    start `threads` threads."""

    tenant: str = ""
    bundle: str = ""
    gpu_indices: tuple[int, ...] = ()
    is_async: bool = False
    owner: str = ""
    isolation: str = ""
    threads: int = 1


@dataclass(slots=True)
class Invocation:
    """One call of a function.

    `on_log` takes (stream, text, truncated); `on_spawn`, `on_ask` and `on_end` a header and its blobs; `on_refused` is
    called when the process did not begin it, `on_given_back` when another invocation took it down.

    `screen` returns what is accepted of an answer, and raises when nothing is; without it all is.

    `claim` numbers one that was sent ahead; `ending` is the answer of one that is being ended, whatever it says itself.
    """

    name: str
    header: dict[str, Any]
    blobs: Sequence[bytes]
    on_log: Callable[[str, str, bool], None]
    on_spawn: Callable[[dict[str, Any], list[bytes]], None]
    on_ask: Callable[[dict[str, Any], list[bytes]], None]
    on_end: Callable[[dict[str, Any], list[bytes]], None]
    on_refused: Callable[[], None]
    on_given_back: Callable[[str, bool], None]
    screen: Callable[[dict[str, Any], list[bytes]], tuple[dict[str, Any], list[bytes]]] | None = None
    raw_left: int = 0
    ending: dict[str, Any] | None = field(default=None)
    describing: asyncio.TimerHandle | None = field(default=None)
    claim: int = 0
    number: int = 0


class Runner:
    """One process. All methods run on the agent's event loop.

    Invocations may be sent ahead, so that the process goes on without waiting for the agent. Their numbers lie in a
    pipe that both sides can read: the process reads one before it runs its invocation, the agent reads them to take
    back what has not begun. Whoever has read a number, and the kernel gives each to one reader only, owns it; an
    invocation whose number is not there any more is not run.
    """

    def __init__(
        self,
        drafts: Drafts,
        on_idle: Callable[["Runner"], None],
        on_gone: Callable[["Runner"], None],
        sandbox: Supervisor | None = None,
    ) -> None:
        self.key = Key()
        self.sandbox = sandbox
        self.folder = ""
        self.known: set[str] = set()
        self._unneeded: set[str] = set()
        self.running: dict[str, Invocation] = {}
        self.ahead: dict[str, Invocation] = {}
        self._early: dict[str, list[tuple[dict[str, Any], list[bytes]]]] = {}  # What those ahead have said.
        self._drafts = drafts
        self._on_idle, self._on_gone = on_idle, on_gone
        self._numbers = count(1)
        self._claims = count(1)
        self._claim_read, self._claim_write = -1, -1
        self._is_fit = True
        self._is_blocked = False
        self._is_any_culprit = False
        self._has_hung_up = False
        self._is_ready = False
        self._when_ready: list[Callable[[], None]] = []
        self._oom_kills = oom_kills()

    async def start(self, zygotes: Zygotes, *, is_async: bool) -> None:
        """Start the process. Raises OSError, and leaves nothing behind then."""
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self.folder = self._drafts.folder()
            undo.callback(self._drafts.discard, self.folder)
            ours, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            theirs.callback(control.close)
            out_read, out_write = _pipe(undo, theirs)
            err_read, err_write = _pipe(undo, theirs)
            self._claim_read, self._claim_write = _pipe(undo, undo)
            for descriptor in (self._claim_read, self._claim_write):
                os.set_blocking(descriptor, False)
            marks = os.memfd_create("lattice-marks")
            theirs.callback(os.close, marks)
            os.ftruncate(marks, 2 * MARK_BYTES)
            self._marks = mmap.mmap(marks, 2 * MARK_BYTES)
            undo.callback(self._marks.close)
            given = (control.fileno(), out_write, err_write, self._claim_read, marks)
            request = None if self.sandbox is None else self.sandbox.request(self.folder)
            self._process: Process = await zygotes.fork("async" if is_async else "process", given, request)
            undo.pop_all()
        limit = MAX_FRAME_BYTES if self.sandbox is None else self.sandbox.policy.output_bytes + MIB
        self._control = Control(ours, self._take, self._break, self._lost, limit)
        self._raw = RawOutput({"stdout": out_read, "stderr": err_read}, self._control.read, self._take_raw)
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def adopt(self, key: Key) -> None:
        """Have the process work for a key from now on; one that has worked for another cannot."""
        self.key = key
        # Always: a task that asked for no device must not find one that others count on.
        devices = ",".join(map(str, key.gpu_indices))
        # The order in which the indices were counted; CUDA's own puts the fastest first.
        environment = {"CUDA_VISIBLE_DEVICES": devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if key.isolation:
            environment |= dict.fromkeys(THREADS, str(key.threads))
        self._control.send({"kind": "adopt", "environment": environment})

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
            self._control.send(header, [blob])

    def forget(self, digests: Iterable[str]) -> None:
        """Have the process drop functions; those that it calls, or was sent calls of, when these are over."""
        self._unneeded |= self.known.intersection(digests)
        self._drop_unneeded()

    def _drop_unneeded(self) -> None:
        called = {invocation.header["digest"] for invocation in (*self.running.values(), *self.ahead.values())}
        if (dropped := self._unneeded - called) and self._is_fit:
            self._unneeded -= dropped
            self.known -= dropped
            self._control.send({"kind": "forget", "digests": sorted(dropped)})

    def invoke(self, invocation: Invocation) -> None:
        """Run one invocation."""
        invocation.number = invocation.header["number"] = next(self._numbers)
        self.running[invocation.name] = invocation
        self._control.send(invocation.header, invocation.blobs)
        if self.sandbox is not None:
            limit_bytes = invocation.header["memory_limit"]
            self.sandbox.watch(
                self._process.pid, limit_bytes, lambda excess: self._end_running_as("out_of_memory", excess)
            )

    def _end_running_as(self, kind: str, message: str) -> None:
        for invocation in self.running.values():
            invocation.ending = invocation.ending or _failed(kind, message)
        self.kill()

    def send_ahead(self, invocation: Invocation) -> None:
        """Have an invocation run after those that run or were sent ahead before; `begin` tells when its turn comes."""
        invocation.claim = invocation.header["claim"] = next(self._claims)
        self.ahead[invocation.name] = invocation
        os.write(self._claim_write, struct.pack("<Q", invocation.claim))
        self._control.send(invocation.header, invocation.blobs)

    def begin(self, name: str) -> Invocation:
        """Note that it is the turn of an invocation sent ahead."""
        invocation = self.running[name] = self.ahead.pop(name)
        if name in self._early:
            asyncio.get_running_loop().call_soon(self._catch_up, name)
        return invocation

    def _catch_up(self, name: str) -> None:
        """Take what an invocation has said before its turn was told."""
        for header, blobs in self._early.pop(name, ()):
            self._take(header, blobs)

    def answer(self, name: str, header: dict[str, Any], blobs: Sequence[bytes]) -> None:
        """Send the answer of a question that an invocation has asked."""
        self._control.send({"kind": "answer", "id": name} | header, blobs)

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
                self._control.send(invocation.header, invocation.blobs)
        return name not in self.ahead

    def cancel(self, name: str) -> None:
        """Ask an async invocation to end."""
        self._control.send({"kind": "cancel", "id": name})

    @property
    def is_fit(self) -> bool:
        """Whether the process takes invocations, as far as is known."""
        return self._is_fit

    @property
    def read_paths(self) -> tuple[str, ...]:
        """What its sandbox shows it of this machine, such as a bundle."""
        return () if self.sandbox is None else self.sandbox.policy.read_paths

    def kill(self) -> None:
        """End the process, and all that it started."""
        self._is_fit = False
        self._process.kill()

    def kill_blocked(self) -> None:
        """End an async process that does not answer: the invocation it is in the middle of blocks the others."""
        self._is_blocked = True
        self.kill()

    # What the process says.

    def _take(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Take a frame. Whatever is wrong with it, or goes wrong with it here, ends the process and not the agent."""
        try:
            self._handle(header, blobs)
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        log.warning("a task's process is ended: %s: %s", type(error).__name__, error)
        text = f"its process sent what is no answer: {type(error).__name__}: {error}"
        if len(self.running) > 1:
            # Any of them may have sent it. The one whose step runs when the process is killed need not be it.
            self._is_any_culprit = True
        else:
            is_too_large = self.sandbox is not None and isinstance(error, FrameTooLargeError)
            self._end_running_as("output_size" if is_too_large else "internal", text)
            return
        self.kill()

    def _handle(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        kind = header["kind"]
        if self.sandbox is not None:
            if kind == "ready":
                self.sandbox.verify(header["facts"])
            elif kind == "unsealed":
                self.sandbox.refuse(header["reason"])
                return
            elif kind == "spawn":
                require_no_files(header["task"]["inputs"].values())
        if kind == "ready":
            self._is_ready = True
            waiting, self._when_ready = self._when_ready, []
            for call in waiting:
                call()
            return
        if kind == "retired":
            self._retire(header["reason"])
            return
        if kind == "written":
            self._drain()
            return
        invocation = self.running.get(header["id"])
        if invocation is None and header["id"] in self.ahead:
            # The process has gone on while the answer before it is still being worked on.
            self._early.setdefault(header["id"], []).append((header, blobs))
            return
        if invocation is None:
            self._drafts.delete(self.folder, header.get("made", ()))
            return
        match kind:
            case "log":
                for stream, text in header["parts"]:
                    invocation.on_log(stream, text, header["truncated"])
            case "spawn":
                self._drafts.publish(self.folder, header["made"])
                invocation.on_spawn(header["task"], blobs)
            case "ask":
                invocation.on_ask(header, blobs)
            case "describing":
                self._time_description(invocation, header["is_over"], str(header["type"]))
            case "result":
                self._answer(invocation, header, blobs)
            case _:
                raise ValueError(f"{kind!r} is no kind of frame")

    def _answer(self, invocation: Invocation, header: dict[str, Any], blobs: list[bytes]) -> None:
        # Whatever is wrong with an answer shows while the invocation still runs, so that it ends with the process.
        if invocation.screen is not None:
            header, blobs = invocation.screen(header, blobs)
        made = [str(name) for name in header["made"]]
        header["made"] = made
        if header["has_raw"]:
            self._drain()
        if invocation.ending:
            self._drafts.delete(self.folder, made)
            header, blobs = invocation.ending, []
        else:
            try:
                self._drafts.publish(self.folder, made)
            except OSError as error:
                text = f"a large value could not be put into the store of this node: {error}"
                header, blobs = _failed("resources", text), []
        self._time_description(invocation, True)
        del self.running[invocation.name]
        if self._unneeded:
            self._drop_unneeded()
        if not self.running and not self.ahead:
            self._on_idle(self)
        invocation.on_end(header, blobs)

    def _time_description(self, invocation: Invocation, is_over: bool, kind: str = "") -> None:
        """Bound the time in which the process describes an error: that calls methods of the error itself."""
        if invocation.describing is not None:
            invocation.describing.cancel()
            invocation.describing = None
        if not is_over:
            late = asyncio.get_running_loop().call_later(DESCRIBE_S, self._give_up_description, invocation, kind)
            invocation.describing = late

    def _give_up_description(self, invocation: Invocation, kind: str) -> None:
        text = f"it raised {kind}, which could not be described within {DESCRIBE_S:g} s"
        invocation.ending = invocation.ending or _failed("user_error", text)
        self.kill_blocked()

    def _retire(self, reason: str) -> None:
        """The process ends itself: what it was sent after its last answer is run by another."""
        log.info("a task's process runs nothing more: %s", reason)
        self._is_fit = False
        refused, self.running = self.running, {}
        self.ahead.clear()
        for invocation in refused.values():
            if invocation.ending:
                invocation.on_end(invocation.ending, [])
            else:
                invocation.on_refused()

    def _take_raw(self, stream: str, text: str, size: int) -> None:
        """Give what the process wrote past `sys.stdout` to the invocation that wrote it, as far as that is known."""
        invocation = self._writer()
        if invocation is None:
            return
        if invocation.raw_left > 0:
            invocation.raw_left -= size
            invocation.on_log(stream, text, False)
            if invocation.raw_left <= 0:
                invocation.on_log(stream, "[output cut]\n", True)

    def _drain(self) -> None:
        """Read what the process wrote past `sys.stdout`: it starts no invocation until then."""
        self._raw.read()
        self._control.send({"kind": "drained"})

    def _writer(self) -> Invocation | None:
        """Return the invocation that wrote what is read now: of coroutines the only one that ran, or runs a step."""
        if not self.key.is_async:
            return next(iter(self.running.values())) if len(self.running) == 1 else None
        number = int.from_bytes(self._marks[MARK_BYTES:], "little") or self._marked()
        return next((invocation for invocation in self.running.values() if invocation.number == number), None)

    # Its end.

    def _lost(self) -> None:
        """Nothing more will come. A program that a task put in the place of its process does not end by itself."""
        self._is_fit = False
        asyncio.get_running_loop().call_later(HANG_UP_S, self._end_mute, self._marked())

    def _end_mute(self, marked: int) -> None:
        if not self._process.ended.done():
            self._has_hung_up = True
            # A coroutine that closed the connection and went on is not the one whose step runs now.
            self._is_any_culprit = len(self.running) > 1 and self._marked() != marked
            self.kill()

    def _marked(self) -> int:
        """Return the number of the invocation whose step the event loop runs; 0 for none."""
        return int.from_bytes(self._marks[:MARK_BYTES], "little")

    async def _watch(self) -> None:
        status = await self._process.ended
        # What it said before it died is still to be read.
        self._control.drain()
        self._is_fit = False
        self._raw.read()
        self._raw.close()
        self._control.close()
        # What it had not begun has its turn elsewhere.
        self.ahead.clear()
        for descriptor in (self._claim_read, self._claim_write):
            os.close(descriptor)
        self._on_gone(self)
        running, self.running = self.running, {}
        self._end_running(list(running.values()), status)
        self._marks.close()
        if self.sandbox is not None:
            self.sandbox.close()
            await asyncio.to_thread(self.sandbox.discard)
        # What it was writing, or wrote and did not come to tell.
        await asyncio.to_thread(self._drafts.discard, self.folder)

    def _crash(self, status: int) -> dict[str, Any]:
        if self.sandbox is not None and (found := self.sandbox.crash(status, self._process.cpu_s)) is not None:
            return _failed(*found, exit_status=status)
        if status == -signal.SIGKILL and oom_kills() > self._oom_kills:
            text = "the kernel killed the task's process because memory ran out"
            return _failed("out_of_memory", text, exit_status=status)
        text = f"the task's process {_how(status)}"
        if self._is_blocked:
            text = "it blocked the event loop that async tasks share for more than a second, and its process was ended"
            text += "; await what takes time, or make it a plain function"
        elif self._has_hung_up:
            text = "the task's process closed its connection to the worker, or ran another program in its own place"
        return _failed("crashed", text, exit_status=status)

    def _end_running(self, running: list[Invocation], status: int) -> None:
        """End what the process was running: what was being ended, and the invocation that took the process down."""
        crash = self._crash(status)
        marked = self._marked()
        undecided = [invocation for invocation in running if not invocation.ending]
        culprits = undecided if len(running) == 1 else [i for i in undecided if i.number == marked]
        is_known = bool(culprits) or any(i.ending and i.number == marked for i in running)
        if self._is_any_culprit:
            culprits, is_known = [], False
        for invocation in running:
            self._time_description(invocation, True)
            if invocation.ending:
                invocation.on_end(invocation.ending, [])
            elif invocation in culprits:
                invocation.on_end(crash, [])
            else:
                text = f"the process it shared with other async tasks {_how(status)}"
                invocation.on_given_back(text, not is_known)


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[int, int]:
    """Return a pipe whose ends are closed by these."""
    read, write = os.pipe()
    reading.callback(os.close, read)
    writing.callback(os.close, write)
    return read, write


def oom_kills() -> int:
    """Return how many processes of this machine the kernel has killed because memory ran out."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _failed(kind: str, message: str, **more: Any) -> dict[str, Any]:
    return {"kind": "result", "failure": {"kind": kind, "message": message, **more}, "duration": 0.0}


def _how(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
    return f"was killed by signal {-status} ({name})"
