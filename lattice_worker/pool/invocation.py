"""One call of a function by a runner, as the agent sees it, and the key that says which runners may serve it."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lattice_worker.sandbox.policy import THREADS

log = logging.getLogger(__name__)

DESCRIBE_S = 1.0
Frame = tuple[dict[str, Any], list[bytes]]


class RunnerKey(NamedTuple):
    """Invocations with equal keys may share a runner: same tenant, same modules, same devices.

    `owner` is a lease that has a runner to itself; otherwise it is empty. `isolation` is the level of its sandbox, in
    which numerical libraries start `threads` threads; it is empty without a sandbox. `memory_bytes` is the limit of a
    container, 0 for the default; other sandboxes are given theirs with the invocation. `network` are the servers that
    a sandbox may connect to. `variables` are those of the environment of a task, by name and value, and may hold
    secrets.
    """

    tenant: str = ""
    bundle: str = ""
    gpu_indices: tuple[int, ...] = ()
    is_async: bool = False
    owner: str = ""
    isolation: str = ""
    threads: int = 1
    memory_bytes: int = 0
    network: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    has_secrets: bool = False

    def __repr__(self) -> str:
        shown = self._asdict() | {"variables": [name for name, _ in self.variables]}
        return f"RunnerKey({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def environment(self) -> dict[str, str]:
        """Return the variables of the runners of this key."""
        # Always set: a task that asked for no device must not find one that is assigned to another task.
        devices = ",".join(map(str, self.gpu_indices))
        # The order in which the indices were counted; CUDA's own puts the fastest first.
        found = {"CUDA_VISIBLE_DEVICES": devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        threads = dict.fromkeys(THREADS, str(self.threads)) if self.isolation else {}
        return threads | dict(self.variables) | found


def ignore_spans(frame: dict[str, Any]) -> None:
    """Do nothing with spans."""


def ignore_access(access: dict[str, Any]) -> None:
    """Do nothing with an access to a server."""


NOTICE_BYTES = 1024  # More than the line by which a runner says that it cuts the output.


@dataclass(slots=True)
class Invocation:
    """One call of a function. `name` is the lease, `header` and `blobs` are the frame that starts it.

    Attributes:
        on_log: takes (stream, text, truncated).
        on_spawn: takes the header and the blobs of a spawned task.
        on_ask: takes the header and the blobs of a question.
        on_spans: takes the header of the spans of a traced attempt.
        on_access: takes the first access of a sandbox to each server.
        on_stream: takes the header and the blobs of a chunk, or the header that says how far it is.
        on_end: takes the header and the blobs of the answer.
        on_refused: called when the runner ends without having begun the invocation.
        on_given_back: takes (reason, is_suspect) when the runner died and another invocation may be the cause.
        screen: returns the part of an answer that is accepted, and raises when none is; None accepts all of it.
        raw_left: bytes of output past `sys.stdout` that are still logged.
        log_left: bytes of output through `sys.stdout` that are still logged. The runner keeps to the same limit, unless
            its task writes frames itself.
        ending: the answer that replaces the runner's own, once the invocation is being stopped.
        description_timer: bounds how long the runner may take to describe an error.
        claim: the number of a pipelined invocation in the claim pipe; 0 for others.
        number: the number of the invocation in its runner.
        is_over: whether it has ended or was given back; it does so once.
    """

    name: str
    header: dict[str, Any]
    blobs: Sequence[bytes]
    on_log: Callable[[str, str, bool], None]
    on_spawn: Callable[[dict[str, Any], list[bytes]], None]
    on_ask: Callable[[dict[str, Any], list[bytes]], None]
    on_stream: Callable[[dict[str, Any], list[bytes]], None]
    on_end: Callable[[dict[str, Any], list[bytes]], None]
    on_refused: Callable[[], None]
    on_given_back: Callable[[str, bool], None]
    on_spans: Callable[[dict[str, Any]], None] = ignore_spans
    on_access: Callable[[dict[str, Any]], None] = ignore_access
    screen: Callable[[dict[str, Any], list[bytes]], Frame] | None = None
    raw_left: int = 0
    log_left: int = 0
    ending: dict[str, Any] | None = None
    description_timer: asyncio.TimerHandle | None = None
    claim: int = 0
    number: int = 0
    is_over: bool = False

    def end(self, answer: dict[str, Any], blobs: list[bytes]) -> None:
        """End it by an answer, or as a failure when the answer cannot be taken."""
        if self.is_over:
            return
        self.is_over = True
        try:
            self.on_end(answer, blobs)
        except Exception as error:
            log.exception("the answer of an invocation could not be taken", extra={"lease_id": self.name})
            text = f"its end could not be reported: {type(error).__name__}: {error}"
            self.on_end(failed("internal", text) | {"made": answer.get("made", ())}, [])

    def give_back(self, reason: str, *, is_suspect: bool) -> None:
        """End it without an answer: its runner died, and another invocation may be the cause."""
        if not self.is_over:
            self.is_over = True
            self.on_given_back(reason, is_suspect)

    def log(self, stream: str, text: str, *, is_truncated: bool) -> None:
        """Log output through `sys.stdout`, up to the limit."""
        if self.log_left > 0:
            self.log_left -= len(text)
            self.on_log(stream, text, is_truncated or self.log_left <= 0)

    def log_output(self, stream: str, text: str, size: int) -> None:
        """Log output past `sys.stdout` that is `size` bytes, up to the limit."""
        if self.raw_left > 0:
            self.raw_left -= size
            self.on_log(stream, text, False)
            if self.raw_left <= 0:
                self.on_log(stream, "[output cut]\n", True)

    def time_description(self, kind: str, kill: Callable[[], None]) -> None:
        """Bound how long the runner describes an error of this type: it calls methods of the error itself."""
        self.cancel_description_timer()
        loop = asyncio.get_running_loop()
        self.description_timer = loop.call_later(DESCRIBE_S, self._give_up_description, kind, kill)

    def _give_up_description(self, kind: str, kill: Callable[[], None]) -> None:
        text = f"it raised {kind}, which could not be described within {DESCRIBE_S:g} s"
        self.ending = self.ending or failed("user_error", text)
        kill()

    def cancel_description_timer(self) -> None:
        """Stop the clock of an error's description."""
        if self.description_timer is not None:
            self.description_timer.cancel()
            self.description_timer = None


def failed(kind: str, message: str, **more: Any) -> dict[str, Any]:
    """Return the answer of an invocation that failed without an answer of its own."""
    return {"kind": "result", "failure": {"kind": kind, "message": message, **more}, "duration": 0.0}
