"""The agent's handle of one runner: sends it invocations, takes its frames, and ends its invocations when it dies.

Rule: an invocation that a runner took ends once: it is answered, it fails with its process, or it is given back. One
that a runner had not begun is run by another.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from lattice_worker import background
from lattice_worker.egress.agent import Connection
from lattice_worker.pool.crash import Crash
from lattice_worker.pool.invocation import Frame, Invocation, RunnerKey, failed, ignore_spans
from lattice_worker.pool.runner_process import Listener, RunnerProcess, Starter, start_process
from lattice_worker.pool.sent_functions import SentFunctions
from lattice_worker.runner.frames import FrameTooLargeError
from lattice_worker.sandbox.supervisor import Supervisor
from lattice_worker.store.artifact_staging import ArtifactStaging

log = logging.getLogger(__name__)

HANG_UP_S = 0.5


class Runner:
    """One runner. All methods run on the agent's event loop; `start` comes first."""

    process: RunnerProcess

    def __init__(
        self,
        staging: ArtifactStaging,
        on_idle: Callable[["Runner"], None],
        on_gone: Callable[["Runner"], None],
        sandbox: Supervisor | None = None,
    ) -> None:
        self.key = RunnerKey()
        self.sandbox = sandbox
        self.is_fit = True  # Whether the process takes invocations, as far as is known.
        self.running: dict[str, Invocation] = {}
        self.functions = SentFunctions(self._send, self._called)
        self._staging = staging
        self._on_idle, self._on_gone = on_idle, on_gone
        self._numbers = count(1)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._crash = Crash()
        self._ending: list[Invocation] = []

    async def start(self, starter: Starter, *, is_async: bool) -> None:
        """Start the process. Raises OSError and SandboxError."""
        listener = Listener(self._take, self._break, self._lost, self._take_output)
        self.process = await start_process(starter, self._staging, listener, is_async=is_async, sandbox=self.sandbox)
        self.pipeline, self.folder = self.process.pipeline, self.process.folder
        background.start(self._watch(), self._end_unwatched)

    def adopt(self, key: RunnerKey) -> None:
        """Assign the runner to a key, once and for all."""
        self.key = key
        # A sandbox hides its processes itself, and the memory of one that hid itself could not be counted.
        is_hidden = key.has_secrets and not key.isolation
        frame = {"kind": "adopt", "environment": key.environment()}
        self._send(frame | {"has_secrets": key.has_secrets, "is_hidden": is_hidden})

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call once the process has started up and can run an invocation."""
        self._ready.add_done_callback(lambda _: call())

    def invoke(self, invocation: Invocation) -> None:
        """Run an invocation."""
        invocation.number = invocation.header["number"] = next(self._numbers)
        self.running[invocation.name] = invocation
        self._send(invocation.header, invocation.blobs)
        if self.sandbox is not None:
            limit_bytes = invocation.header["memory_limit"]
            self.sandbox.watch(self.process.process.pid, limit_bytes, self.key.threads, self._fail_running)
            self.sandbox.network.open(invocation.on_access, self._lose_network)

    def send_ahead(self, invocation: Invocation) -> None:
        """Pipeline an invocation: the process runs it after those it was sent before. `begin` has to follow."""
        self.pipeline.add(invocation)
        self._send(invocation.header, invocation.blobs)

    def begin(self, name: str) -> Invocation:
        """Note that a pipelined invocation is next in its slot: from now on it runs."""
        invocation, frames = self.pipeline.begin(name)
        self.running[name] = invocation
        if frames:
            asyncio.get_running_loop().call_soon(self._take_all, frames)
        return invocation

    def take_back(self, name: str) -> bool:
        """Withdraw a pipelined invocation; False when the process has begun it.

        All others that the process has not begun are withdrawn too, and have to be sent again.
        """
        withdrawn = self.pipeline.withdraw()
        for invocation in self.running.values():
            if invocation.claim in withdrawn:
                # The agent has begun it, and the process has not read its claim: it runs without one.
                del invocation.header["claim"]
                self._send(invocation.header, invocation.blobs)
        return name not in self.pipeline

    def answer(self, name: str, header: dict[str, Any], blobs: Sequence[bytes]) -> None:
        """Send the answer to a question of an invocation."""
        self._send({"kind": "answer", "id": name} | header, blobs)

    def credit(self, name: str, chunks: int, size: int) -> None:
        """Let an invocation stream so much again: the server has taken it."""
        self._send({"kind": "credit", "id": name, "chunks": chunks, "bytes": size})

    def cancel(self, name: str) -> None:
        """Cancel an async invocation."""
        self._send({"kind": "cancel", "id": name})

    @property
    def read_paths(self) -> tuple[str, ...]:
        """The paths of this machine that its sandbox shows, such as a bundle."""
        return () if self.sandbox is None else self.sandbox.policy.read_paths

    @property
    def connection(self) -> Connection | None:
        """What connects its sandbox to servers."""
        return None if self.sandbox is None else self.sandbox.network.connection

    def kill(self) -> None:
        """Kill the process and its descendants."""
        self.is_fit = False
        self.process.process.kill()

    def kill_blocked(self) -> None:
        """Kill an async process that does not answer: the invocation whose step runs blocks the others."""
        self._crash.is_blocked = True
        self.kill()

    def _send(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        self.process.control.send(header, blobs)

    def _called(self) -> set[str]:
        """Return the digests of the functions that invocations call."""
        invocations = (*self.running.values(), *self.pipeline.invocations())
        return {invocation.header["digest"] for invocation in invocations}

    # Frames of the process.

    def _take(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Take a frame. An error about it ends the process, and never the agent."""
        try:
            self._handle(header, blobs)
        except Exception as error:
            self._break(error)

    def _take_all(self, frames: Iterable[Frame]) -> None:
        for header, blobs in frames:
            self._take(header, blobs)

    def _break(self, error: Exception) -> None:
        log.warning("a task's process is ended: %s: %s", type(error).__name__, error)
        text = f"its process sent what is no answer: {type(error).__name__}: {error}"
        if len(self.running) > 1:
            # Any of them may have sent the frame. The one whose step runs when the process is killed need not be it.
            self._crash.is_cause_unknown = True
        else:
            is_too_large = self.sandbox is not None and isinstance(error, FrameTooLargeError)
            self._fail_running("output_size" if is_too_large else "internal", text)
            return
        self.kill()

    def _lose_network(self) -> None:
        """End the invocation that runs: what connected it to servers is gone."""
        self._fail_running("internal", "the proxy that connects it to servers has ended")

    def _fail_running(self, kind: str, message: str) -> None:
        """End the invocations that run as failures of a kind, and kill the process."""
        for invocation in self.running.values():
            invocation.ending = invocation.ending or failed(kind, message)
        self.kill()

    def _handle(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        if self.sandbox is not None:
            self.sandbox.inspect(header)
        match header["kind"]:
            case "ready":
                if not self._ready.done():
                    self._ready.set_result(None)
            case "unsealed":
                self.is_fit = False
            case "retired":
                self._retire(header["reason"])
            case "written":
                self._drain_output()
            case kind:
                name = header["id"]
                if (invocation := self.running.get(name)) is not None:
                    self._handle_running(invocation, kind, header, blobs)
                elif name in self.pipeline:
                    self.pipeline.buffer(name, (header, blobs))
                else:
                    self._staging.delete(self.folder, header.get("made", ()))

    def _handle_running(self, invocation: Invocation, kind: str, header: dict[str, Any], blobs: list[bytes]) -> None:
        match kind:
            case "log":
                for stream, text in header["parts"]:
                    invocation.log(stream, text, is_truncated=header["truncated"])
            case "spawn":
                self._staging.publish(self.folder, header["made"])
                invocation.on_spawn(header["task"], blobs)
            case "ask" | "await":
                invocation.on_ask(header, blobs)
            case "spans":
                # Once: a process that sends more could fill the memory of the agent.
                take, invocation.on_spans = invocation.on_spans, ignore_spans
                take(header)
            case "chunk" | "progress":
                invocation.on_stream(header, blobs)
            case "describing":
                if header["is_over"]:
                    invocation.cancel_description_timer()
                else:
                    invocation.time_description(str(header["type"]), self.kill_blocked)
            case "result":
                self._answer(invocation, header, blobs)
            case _:
                raise ValueError(f"{kind!r} is no kind of frame")

    def _answer(self, invocation: Invocation, header: dict[str, Any], blobs: list[bytes]) -> None:
        # A malformed answer raises while the invocation still runs, so that the invocation ends with its process.
        if invocation.screen is not None:
            header, blobs = invocation.screen(header, blobs)
        made = header["made"] = [str(name) for name in header["made"]]
        if header["has_raw"]:
            self._drain_output()
        if invocation.ending:
            self._staging.delete(self.folder, made)
            header, blobs = invocation.ending, []
        else:
            try:
                self._staging.publish(self.folder, made)
            except OSError as error:
                text = f"a large value could not be put into the store of this node: {error}"
                header, blobs = failed("resources", text), []
        invocation.cancel_description_timer()
        del self.running[invocation.name]
        self.functions.drop_unneeded()
        if not self.running and not self.pipeline:
            self._on_idle(self)
        invocation.end(header, blobs)

    def _retire(self, reason: str) -> None:
        """Refuse the invocations that the process was sent after its last answer: it ends itself."""
        if self.sandbox is not None and self.running:
            # It would be started again and again, at no charge to its attempts.
            raise ValueError("a sandboxed process gave its only invocation back")
        log.info("a task's process runs nothing more: %s", reason)
        self.is_fit = False
        refused, self.running = self.running, {}
        self.pipeline.clear()
        for invocation in refused.values():
            if invocation.ending:
                invocation.end(invocation.ending, [])
            else:
                invocation.on_refused()

    # Output past `sys.stdout`.

    def _take_output(self, stream: str, text: str, size: int, number: int) -> None:
        """Log output for the invocation that wrote it, as far as that is known."""
        if (invocation := self._writer(number)) is not None:
            invocation.log_output(stream, text, size)

    def _writer(self, number: int) -> Invocation | None:
        """Return the invocation that wrote the output read now: the only one that ran, or the one whose step ran."""
        if not self.key.is_async:
            return next(iter(self.running.values())) if len(self.running) == 1 else None
        return next((invocation for invocation in self.running.values() if invocation.number == number), None)

    def _drain_output(self) -> None:
        """Read the output of the process; it starts no invocation until then."""
        self.process.output.read()
        self._send({"kind": "drained"})

    # Its end.

    def _lost(self) -> None:
        """Kill the process soon, unless it ends: a program that a task put in its place would not end by itself."""
        self.is_fit = False
        stepping = self.process.marks.stepping
        asyncio.get_running_loop().call_later(HANG_UP_S, self._kill_disconnected, stepping)

    def _kill_disconnected(self, stepping: int) -> None:
        if not self.process.process.ended.done():
            self._crash.has_disconnected = True
            # A coroutine that closed the connection and went on is not the one whose step runs now.
            self._crash.is_cause_unknown = len(self.running) > 1 and self.process.marks.stepping != stepping
            self.kill()

    async def _watch(self) -> None:
        status = await self.process.process.ended
        # It may have sent frames before it died.
        self.process.control.drain()
        self.is_fit = False
        self.process.close()
        self.pipeline.clear()
        self._on_gone(self)
        self._ending, self.running = list(self.running.values()), {}
        if self.sandbox is not None:
            self._crash.exceeded = self.sandbox.crash(status, self.process.process.cpu_s)
            self.sandbox.close()
        self._crash.end(self._ending, status, self.process.marks.stepping)
        self.process.marks.close()
        if self.sandbox is not None:
            await asyncio.to_thread(self.sandbox.discard)
        # Artifacts that it was writing, or wrote and did not report.
        await asyncio.to_thread(self._staging.discard, self.folder)

    def _end_unwatched(self, error: BaseException) -> None:
        """End the invocations of a process whose end could not be handled."""
        self.kill()
        self._on_gone(self)
        left, self.running = [*self._ending, *self.running.values()], {}
        text = f"the end of its process could not be handled: {type(error).__name__}: {error}"
        for invocation in left:
            invocation.cancel_description_timer()
            invocation.end(invocation.ending or failed("internal", text), [])
        if self.sandbox is not None:
            self.sandbox.close()
