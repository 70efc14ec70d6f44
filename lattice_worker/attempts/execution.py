"""The record of one lease in the executor."""

import asyncio
from dataclasses import dataclass

from lattice.v1 import worker_pb2

from lattice_worker import convert
from lattice_worker.masking import Masker
from lattice_worker.pool.invocation import Invocation
from lattice_worker.pool.runner_handle import Runner


@dataclass(slots=True)
class Execution:
    """One lease until it ends.

    Attributes:
        upstream: the outputs of the lease that it follows; None when there are none yet.
        assignment: set when the lease is started. It then waits for code, is prepared, and runs.
        preparing: waits until artifacts, bundle and runner are ready.
        sent: the runner that has the invocation of the lease, and the invocation. A pipelined lease is sent before it
            is started; when the runner's pipeline does not hold it any more, it has to be sent again.
        has_begun: whether it runs.
        timer: ends it when its time is up.
        masker: masks the secrets of the lease, if it has any.
    """

    upstream: convert.Outputs | None = None
    assignment: worker_pb2.Assignment | None = None
    preparing: asyncio.Task[None] | None = None
    sent: tuple[Runner, Invocation] | None = None
    has_begun: bool = False
    timer: asyncio.TimerHandle | None = None
    masker: Masker | None = None

    @property
    def pipelined_on(self) -> Runner | None:
        """The runner in whose pipeline the lease is."""
        if self.sent is None or self.sent[1].name not in self.sent[0].pipeline:
            return None
        return self.sent[0]

    @property
    def running_on(self) -> Runner | None:
        """The runner that runs the lease."""
        return self.sent[0] if self.sent is not None and self.has_begun else None

    def cancel_timer(self) -> None:
        """Stop the clock of the lease."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def named(assignment: worker_pb2.Assignment) -> dict[str, object]:
    """Return the ids that a log line about a lease names; of a batch those of the first attempt."""
    first = assignment.attempts[0] if assignment.attempts else worker_pb2.Attempt()
    ids = {"run_id": first.run_id, "task_id": first.task_id, "attempt": first.number}
    return {"lease_id": assignment.lease_id, **ids}
