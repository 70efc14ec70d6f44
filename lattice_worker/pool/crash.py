"""Why a runner died, and which of its invocations is the cause.

Rule: an invocation fails with its runner only if it is known to be the cause. The others are given back.
"""

import signal
from collections.abc import Sequence
from typing import Any

from lattice.v1 import worker_pb2

from lattice_worker.machine import cgroup
from lattice_worker.pool.invocation import Invocation, failed

MAX_SUSPECTS = 1000


class Crash:
    """The evidence about one runner, gathered while it lives.

    Attributes:
        is_blocked: it was killed because it did not answer.
        has_disconnected: it closed its control socket without ending.
        is_cause_unknown: the invocation whose step ran last need not be the cause.
        exceeded: the kind and the message of the failure of a sandbox that ended it for a limit.
    """

    def __init__(self) -> None:
        self.is_blocked = False
        self.has_disconnected = False
        self.is_cause_unknown = False
        self.exceeded: tuple[str, str] | None = None
        self._oom_kills = cgroup.own_oom_kills()

    def end(self, running: Sequence[Invocation], status: int, stepping: int) -> None:
        """End the invocations that ran when a runner died. `stepping` is the number of the one whose step ran."""
        failure = self._failure(status)
        undecided = [invocation for invocation in running if not invocation.ending]
        causes = undecided if len(running) == 1 else [i for i in undecided if i.number == stepping]
        is_known = bool(causes) or any(i.ending and i.number == stepping for i in running)
        if self.is_cause_unknown:
            causes, is_known = [], False
        for invocation in running:
            invocation.cancel_description_timer()
            if invocation.ending:
                invocation.end(invocation.ending, [])
            elif invocation in causes:
                invocation.end(failure, [])
            else:
                text = f"the process it shared with other async tasks {_how(status)}"
                invocation.give_back(text, is_suspect=not is_known)

    def _failure(self, status: int) -> dict[str, Any]:
        if self.exceeded is not None:
            return failed(*self.exceeded, exit_status=status)
        text = f"the task's process {_how(status)}"
        if self.is_blocked:
            text = "it blocked the event loop that async tasks share for more than a second, and its process was ended"
            text += "; await what takes time, or make it a plain function"
        elif self.has_disconnected:
            text = "the task's process closed its connection to the worker, or ran another program in its own place"
        elif status == -signal.SIGKILL and cgroup.own_oom_kills() > self._oom_kills:
            text = "the kernel killed the task's process because memory ran out"
            return failed("out_of_memory", text, exit_status=status)
        return failed("crashed", text, exit_status=status)


class Suspects:
    """The tasks whose attempts may have taken a shared process down. Each further attempt has a process to itself."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, str], None] = {}

    def add(self, assignment: worker_pb2.Assignment) -> None:
        """Suspect the tasks of a lease. The oldest suspects are forgotten."""
        for attempt in assignment.attempts:
            self._tasks[attempt.run_id, attempt.task_id] = None
        while len(self._tasks) > MAX_SUSPECTS:
            del self._tasks[next(iter(self._tasks))]

    def includes(self, assignment: worker_pb2.Assignment) -> bool:
        """Whether a lease has an attempt of a suspect."""
        known = self._tasks
        return bool(known) and any((attempt.run_id, attempt.task_id) in known for attempt in assignment.attempts)


def _how(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
    return f"was killed by signal {-status} ({name})"
