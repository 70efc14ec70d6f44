"""The main function of the process that runs user code: sets the process up, and serves the agent."""

import faulthandler
import os
import signal
import socket
import sys
from collections import deque
from typing import Any

from lattice_worker.runner.claims import Claims
from lattice_worker.runner.coroutines import aio
from lattice_worker.runner.frames import Channel
from lattice_worker.runner.inbox import Inbox
from lattice_worker.runner.invocation import threads
from lattice_worker.runner.invocation.functions import note_sealed
from lattice_worker.runner.invocation.invocations import Program
from lattice_worker.runner.invocation.output import Output, Stream, has_unread_output
from lattice_worker.runner.surroundings.adoption import adopt
from lattice_worker.runner.surroundings.reset import Baseline, reseed

CONTROL, CLAIMS, MARKS = 3, 4, 5  # The descriptors a runner is given, after its standard streams.


def refuse(reason: str) -> None:
    """Tell the agent why this process cannot be sealed."""
    with socket.socket(fileno=CONTROL) as control:
        Channel(control).send({"kind": "unsealed", "reason": reason})


def main(mode: str, facts: dict[str, Any] | None = None) -> None:
    """Serve the agent until it closes the socket, or until this process cannot run another task.

    `facts` are the report of a sealed process about itself.
    """
    control = socket.socket(fileno=CONTROL)
    for descriptor in (CONTROL, CLAIMS, MARKS):
        os.set_inheritable(descriptor, False)
    # A handler that does nothing, not SIG_IGN: child processes would inherit that.
    signal.signal(signal.SIGINT, _ignore)
    os.register_at_fork(after_in_child=_heed_interrupts)
    sys.argv = [""]  # As in an interpreter that runs no script: a task was not started with arguments.
    reseed()  # A fork has the state of numpy's generator that the zygote has, if it imported numpy.
    pid = os.getpid()
    sys.stdout, sys.stderr = Stream("stdout", 1, pid), Stream("stderr", 2, pid)
    # A crash in native code then leaves its Python stack in the attempt's log.
    faulthandler.enable(file=2, all_threads=True)
    # Pickles made by user code in this process name `__main__`; it must not be this program.
    sys.modules["__main__"] = type(sys)("__main__")
    threads.inherit_context()
    # A child would keep it open when this process is no runner any more, and the agent would wait for the child's end.
    os.register_at_fork(after_in_child=control.close)
    channel = Channel(control)
    if mode == "async":
        aio.serve(channel, MARKS)
    else:
        serve(channel, Claims(CLAIMS), facts)


def serve(channel: Channel, claims: Claims, facts: dict[str, Any] | None = None) -> None:
    """Run invocations one after the other."""
    baseline = Baseline()
    program = Program(channel, baseline)
    frames = Inbox(channel)
    if facts is not None:
        note_sealed()
    waiting: deque[tuple[dict[str, Any], list[bytes]]] = deque()
    channel.send({"kind": "ready"} if facts is None else {"kind": "ready", "facts": facts})
    while (frame := waiting.popleft() if waiting else next(frames, None)) is not None:
        header, blobs = frame
        match header["kind"]:
            case "adopt":
                adopt(header)
                baseline.capture()
            case "function":
                program.define(header, blobs)
            case "forget":
                program.forget(header["digests"])
            case "invoke" if "claim" not in header or claims.owns(header["claim"]):
                if _run(channel, program, baseline, frames, header, blobs):
                    # Else the agent would take unread output for that of the next invocation.
                    for later in frames:
                        if later[0]["kind"] == "drained":
                            break
                        waiting.append(later)
                if reason := baseline.make_ready():
                    channel.send({"kind": "retired", "reason": reason})
                    break
            case _:
                pass
    # Threads of tasks must not keep the process alive when the agent has closed the socket.
    os._exit(0)


def _run(
    channel: Channel, program: Program, baseline: Baseline, inbox: Inbox, header: dict[str, Any], blobs: list[bytes]
) -> bool:
    """Run one invocation and send its answer; return whether output is left that the agent has to read first."""
    output = inbox.running = Output(channel, header)
    # A context of its own: the next invocation must not see its context variables.
    answer, parts = threads.in_context(output, program.run, output, blobs)
    baseline.quiet()
    output.close()
    answer["has_raw"] = has_unread_output()
    channel.send(answer, parts)
    return bool(answer["has_raw"])


def _ignore(*_: object) -> None:
    """Do nothing."""


def _heed_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) is _ignore:
        signal.signal(signal.SIGINT, signal.default_int_handler)


__all__ = ["main"]
