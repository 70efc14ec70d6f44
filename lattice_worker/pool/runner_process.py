"""One runner process and what connects the agent to it: control socket, output pipes, claim pipe, step marks, folder.

Rule: a start that fails leaves no descriptor and no folder behind.
"""

import contextlib
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lattice_worker.pool.control_socket import Control
from lattice_worker.pool.pipelining import Pipeline
from lattice_worker.pool.rawoutput import RawOutput
from lattice_worker.pool.zygote import Process
from lattice_worker.runner.frames import MAX_FRAME_BYTES
from lattice_worker.sandbox.supervisor import Supervisor
from lattice_worker.store.artifact_staging import ArtifactStaging

MARK_BYTES = 8


class Starter(Protocol):
    """Starts processes: the zygotes, or for a container its supervisor."""

    async def fork(self, mode: str, descriptors: Sequence[int], sandbox: Mapping[str, Any] | None = None) -> Process:
        """Return a new process that has these descriptors, and seals itself for a `sandbox`."""


class StepMarks:
    """Memory shared with an async runner, in which its event loop writes numbers of invocations; 0 stands for none."""

    def __init__(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 2 * MARK_BYTES)
        # To read memory that its file has no more ends a process, and a task of the runner has the descriptor too.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.memory = mmap.mmap(descriptor, 2 * MARK_BYTES)

    @property
    def stepping(self) -> int:
        """The invocation whose step the event loop runs."""
        return int.from_bytes(self.memory[:MARK_BYTES], "little")

    @property
    def alone(self) -> int:
        """The only invocation that has run since the agent read all output past `sys.stdout`."""
        return int.from_bytes(self.memory[MARK_BYTES:], "little")

    def close(self) -> None:
        """Unmap the memory."""
        self.memory.close()


@dataclass(frozen=True, slots=True)
class RunnerProcess:
    """A process that was started, and the agent's ends of its descriptors. It writes artifacts to `folder`."""

    process: Process
    folder: str
    control: Control
    output: RawOutput
    pipeline: Pipeline
    marks: StepMarks

    def close(self) -> None:
        """Close the agent's ends; the folder and the step marks stay."""
        self.output.read()
        self.output.close()
        self.control.close()
        self.pipeline.close()


@dataclass(frozen=True, slots=True)
class Listener:
    """What takes the events of a process: see `Control` and `RawOutput`."""

    on_frame: Callable[[dict[str, Any], list[bytes]], None]
    on_error: Callable[[Exception], None]
    on_lost: Callable[[], None]
    on_output: Callable[[str, str, int, int], None]


async def start_process(
    starter: Starter,
    staging: ArtifactStaging,
    listener: Listener,
    *,
    is_async: bool = False,
    sandbox: Supervisor | None = None,
) -> RunnerProcess:
    """Start a process, which seals itself for a `sandbox`. Raises OSError and, for a container, SandboxError."""
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:
        folder = staging.folder()
        undo.callback(staging.discard, folder)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(ours.close)
        given.callback(theirs.close)
        out_read, out_write = _pipe(undo, given)
        err_read, err_write = _pipe(undo, given)
        pipeline = Pipeline()
        undo.callback(pipeline.close)
        memory = os.memfd_create("lattice-marks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        given.callback(os.close, memory)
        marks = StepMarks(memory)
        undo.callback(marks.close)
        descriptors = [theirs.fileno(), out_write, err_write, pipeline.claims, memory]
        request = None if sandbox is None else sandbox.request(folder)
        if sandbox is not None and (network := sandbox.network.handover()) is not None:
            descriptors.append(network.fileno())
            given.callback(network.close)
        process = await starter.fork("async" if is_async else "process", descriptors, request)
        undo.pop_all()
    limit_bytes = MAX_FRAME_BYTES if sandbox is None else sandbox.frame_bytes
    control = Control(ours, listener.on_frame, listener.on_error, listener.on_lost, limit_bytes)
    streams = {"stdout": out_read, "stderr": err_read}
    output = RawOutput(streams, control.read, lambda: marks.alone or marks.stepping, listener.on_output)
    return RunnerProcess(process, folder, control, output, pipeline, marks)


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[int, int]:
    """Return a pipe whose ends are closed by these."""
    read, write = os.pipe()
    reading.callback(os.close, read)
    writing.callback(os.close, write)
    return read, write
