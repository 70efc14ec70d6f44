"""Owns the record of one run beside its machine. Rule: only the orchestrator and its parts change it."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lattice_server.core.messages import TaskStarted
from lattice_server.core.model import Artifact, Function
from lattice_server.core.run.open_run import HolderEffect, OpenRun
from lattice_server.core.run.run import Effect, Run
from lattice_server.core.run.signals import SignalEffect
from lattice_server.core.run.tether import Tether
from lattice_server.core.tenancy import id_of
from lattice_server.engine.runs.caller_stream import CallerStream
from lattice_server.engine.runs.chunk_log import RunChunks
from lattice_server.engine.runs.log import ENDS, RunLog
from lattice_server.engine.stores.uploads import Name

# The memory of a run and of one task, without the values that they receive and produce.
RUN_BYTES = 4096
TASK_BYTES = 3072
TIMED = TaskStarted | ENDS


@dataclass(slots=True)
class RunEntry:
    """A run, its log, and the facts about it that callers may read.

    Attributes:
        run: its machine.
        number: rises with each run of the server.
        fingerprint: the digest of its request; an id that is repeated with another one is refused.
        created_s: when it was accepted, in seconds since the epoch, like all times here.
        labels: those of its caller.
        parameter_bytes: the memory of its parameters.
        request_id: that of the request which started it.
        log: its events.
        ended_s: when it ended.
        artifacts: its inputs and outputs in the store, referenced until the run is evicted.
        graph_artifacts: how many artifacts of its graph are among them.
        uploads: the uploads that count for its tenant until it ends.
        functions: the code that it references until it ends, by digest.
        open_tasks: how many open tasks admission counts for it.
        live_bytes: how much memory admission counts for it.
        timeout_s: its time limit.
        expiry: the timer of that limit.
        start_times_s: when each task started.
        end_times_s: when each task ended.
        began_s: when the first task started.
        open_run: the machine of its caller, if it was opened by `OpenRun`.
        stream: the newest stream of that caller.
        signal_timer: the timer of attempts that wait for a signal.
        grace: the timer that cancels an open run without a stream.
        trace_id: the trace of the run, for its log lines; empty when it is not traced.
        disconnect_grace_s: after how many seconds without its caller it is cancelled; None for the default of its kind.
        tether: the machine of the calls that hold it, if one does so for a grace time.
        tether_timer: the timer of that grace time.
        chunks: what its tasks stream, once there is a chunk or a reader.
        calls: the callers, leases and numbers of the waits for called tasks, by the id of these.
        is_continuing: whether a slice that submits more of its tasks is queued.
        is_transient: whether it means nothing after a restart of the server, so that it is not recorded.
        recorded: how many of its events are in the journal.
        definition: the encoded tasks that a caller is about to add, for the journal.
        on_effects: is called with the decisions of its machines, after they were carried out.
        secrets: the values of its callers' secrets, by name, until it ends.
    """

    run: Run
    number: int
    fingerprint: str
    created_s: float
    labels: Mapping[str, str]
    parameter_bytes: int = 0
    request_id: str = ""
    log: RunLog = field(default_factory=RunLog)
    ended_s: float | None = None
    artifacts: list[Artifact] = field(default_factory=list)
    graph_artifacts: int = 0
    uploads: list[Name] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)
    open_tasks: int = 0
    live_bytes: int = 0
    timeout_s: float | None = None
    expiry: asyncio.TimerHandle | None = None
    start_times_s: dict[str, float] = field(default_factory=dict)
    end_times_s: dict[str, float] = field(default_factory=dict)
    began_s: float | None = None
    open_run: OpenRun | None = None
    stream: CallerStream | None = None
    grace: asyncio.TimerHandle | None = None
    signal_timer: asyncio.TimerHandle | None = None
    disconnect_grace_s: float | None = None
    tether: Tether | None = None
    tether_timer: asyncio.TimerHandle | None = None
    trace_id: str = ""
    chunks: RunChunks | None = None
    calls: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)
    is_continuing: bool = False
    is_transient: bool = False
    recorded: int = 0
    definition: bytes | None = None
    on_effects: Callable[[Sequence[Effect | HolderEffect | SignalEffect]], object] | None = None
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

    def supply(self, secrets: Mapping[str, str]) -> None:
        """Take values of secrets from a repetition of the call that started the run; the server may have lost them."""
        if not self.run.is_terminal:
            self.secrets = {**secrets, **self.secrets}

    def note_times(self, fact: Effect | HolderEffect, offset_s: float) -> None:
        """Note the times of a fact; `offset_s` is how far wall time is ahead of the machines' monotonic time.

        They are converted at once, because only wall time advances while the computer is suspended.
        """
        if not isinstance(fact, TIMED):
            return
        record = self.run.tasks[fact.task_id]
        if record.started_at is not None and (isinstance(fact, TaskStarted) or record.items is not None):
            self.start_times_s[fact.task_id] = record.started_at + offset_s
            if self.began_s is None:
                self.began_s = record.started_at + offset_s
        if record.ended_at is not None:
            self.end_times_s[fact.task_id] = record.ended_at + offset_s

    def stop_timers(self) -> None:
        """Cancel the timers of the run."""
        for timer in (self.expiry, self.grace, self.signal_timer, self.tether_timer):
            if timer is not None:
                timer.cancel()
        self.expiry = self.grace = self.signal_timer = self.tether_timer = None

    @property
    def key(self) -> str:
        """The name of the run inside the server, unique among all tenants."""
        return self.run.run_id

    @property
    def run_id(self) -> str:
        """The name of the run for its callers and its tasks."""
        return id_of(self.run.run_id)

    @property
    def kept_bytes(self) -> int:
        """The memory of the run without its code."""
        return run_bytes(len(self.run.tasks), self.parameter_bytes + self.run.dag.kept_bytes) + self.log.kept_bytes


def run_bytes(tasks: int, value_bytes: int) -> int:
    """Return the memory of a run with so many tasks and values, before it has events."""
    return RUN_BYTES + TASK_BYTES * tasks + value_bytes


def fingerprint(*parts: bytes) -> str:
    """Return a digest of a request's content, to tell a repeated call from another one with the same id."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
