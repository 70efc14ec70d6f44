"""Owns what the server knows of one run besides its machine. Rule: only the orchestrator changes it."""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from lattice_server.core.messages import TaskCancelled, TaskFailed, TaskSkipped, TaskStarted, TaskSucceeded
from lattice_server.core.model import Artifact, Function
from lattice_server.core.run.open_run import HolderEffect, OpenRun
from lattice_server.core.run.run import Effect, Run
from lattice_server.core.tenancy import id_of
from lattice_server.engine.holder import Holder
from lattice_server.engine.run_log import RunLog
from lattice_server.engine.uploads import Name

GIB = 1024 * 1024 * 1024
# What a run and a task take by themselves, whatever they are given and give.
RUN_BYTES = 4096
TASK_BYTES = 3072
ENDS = TaskSucceeded | TaskFailed | TaskCancelled | TaskSkipped


@dataclass(slots=True)
class RunEntry:
    """A run, its log, and what a caller may ask about it.

    Later runs have a higher `number`. `fingerprint` and `request_id` tell whether a repeated id means the same;
    `parameter_bytes` is the memory of what the caller gave besides the graph. `artifacts` are those the run keeps in
    the store, its inputs and its outputs; `graph_artifacts` of its graph's are among them. `uploads` are those that
    count for its tenant, and `functions` the code that it holds, until it ends. `open_tasks` is what admission counts
    for it; `expiry` ends it when its time is over. `start_times_s` and `end_times_s` are those of its tasks, and
    `began_s` that of the first start, in seconds since the epoch. Of a run that was opened, `open_run` is the machine
    of its caller, `holder` the stream that holds it, and `grace` ends it when there is none for too long. It
    `is_going_on` while a turn of it to hand over tasks is to come.
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
    timeout_s: float | None = None
    expiry: asyncio.TimerHandle | None = None
    start_times_s: dict[str, float] = field(default_factory=dict)
    end_times_s: dict[str, float] = field(default_factory=dict)
    began_s: float | None = None
    open_run: OpenRun | None = None
    holder: Holder | None = None
    grace: asyncio.TimerHandle | None = None
    is_going_on: bool = False

    def note_times(self, fact: Effect | HolderEffect, offset_s: float) -> None:
        """Note the times a fact tells, given how far the clock that people read is ahead of the machines' clock.

        They are not worked out later: while a computer is suspended only one of the two clocks goes on.
        """
        if not isinstance(fact, TaskStarted | ENDS):
            return
        record = self.run.tasks[fact.task_id]
        if record.started_at is not None and (isinstance(fact, TaskStarted) or record.items is not None):
            self.start_times_s[fact.task_id] = record.started_at + offset_s
            if self.began_s is None:
                self.began_s = record.started_at + offset_s
        if record.ended_at is not None:
            self.end_times_s[fact.task_id] = record.ended_at + offset_s

    @property
    def key(self) -> str:
        """What the run goes by inside the server."""
        return self.run.run_id

    @property
    def run_id(self) -> str:
        """What its callers, and the tasks in it, know the run by."""
        return id_of(self.run.run_id)

    @property
    def kept_bytes(self) -> int:
        """The memory of the run, but for its code."""
        tasks = RUN_BYTES + TASK_BYTES * len(self.run.tasks)
        return tasks + self.parameter_bytes + self.run.dag.kept_bytes + self.log.kept_bytes


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept of runs that have ended.

    A result is kept for `result_ttl_s` if no caller was given it before; of other runs the newest `runs` are kept.
    `kept_bytes` bounds the memory of all, `artifact_bytes` the values that lie in stores; one tenant may have a `share`
    of either. The ids of runs that are kept no longer are remembered for `id_ttl_s`.
    """

    runs: int = 1000
    kept_bytes: int = 2 * GIB
    artifact_bytes: int = 2 * GIB
    share: float = 0.5
    result_ttl_s: float = 3600.0
    id_ttl_s: float = 3600.0


def fingerprint(*parts: bytes) -> str:
    """Return a digest of a request's content, to tell a repeated call from another one with the same id."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
