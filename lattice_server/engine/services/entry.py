"""Owns the record of one service beside its machine. Rule: only the driver of services changes it."""

import asyncio
import time
from dataclasses import dataclass, field

from lattice_server.core.messages import QuestionAsked
from lattice_server.core.model import Bundle
from lattice_server.core.services.budgets import Budget
from lattice_server.core.services.model import ServiceFailure
from lattice_server.core.services.service import Service
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.services.log import ServiceLog

Use = tuple[str, str, int]  # The key of a run, a task of it and its attempt.


def use_of(question: QuestionAsked) -> Use:
    """Return the attempt that asks a question."""
    return question.run_id, question.task_id, question.attempt


@dataclass(slots=True)
class InstanceRun:
    """The run of an instance.

    Attributes:
        entry: the run.
        control: the open question of the instance, whose answer asks it to stop.
        grace_s: how long its program has after SIGTERM, once it was asked to stop.
        failure: why its program ended, once the instance reported that.
    """

    entry: RunEntry
    control: QuestionAsked | None = None
    grace_s: float | None = None
    failure: ServiceFailure | None = None


@dataclass(slots=True, eq=False)
class ServiceEntry:
    """A service, the runs of its instances, its log and its users; lives on the main thread.

    Attributes:
        machine: decides about it.
        tenant: the tenant it belongs to.
        bundle: the modules of its function.
        log: what its instances wrote.
        runs: the runs of its instances, by instance.
        waiting: the questions of tasks that wait for it to be ready, by question.
        calls: how many calls wait for it to be ready.
        users: the attempts that were given its address.
        budget: how much of it may be used, if it is a model with a budget.
        timer: calls the machine's tick.
        offset_s: how far wall time is ahead of monotonic time.
    """

    machine: Service
    tenant: str
    bundle: Bundle | None
    log: ServiceLog = field(default_factory=ServiceLog)
    runs: dict[str, InstanceRun] = field(default_factory=dict)
    waiting: dict[str, QuestionAsked] = field(default_factory=dict)
    calls: int = 0
    users: set[Use] = field(default_factory=set)
    budget: Budget | None = None
    timer: asyncio.TimerHandle | None = None
    offset_s: float = field(default_factory=lambda: time.time() - time.monotonic())
    _watching: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Its name within its tenant."""
        return self.machine.spec.name

    def wake(self) -> None:
        """Wake the calls that wait for a change."""
        watching, self._watching = self._watching, set()
        for future in watching:
            if not future.done():
                future.set_result(None)

    async def changed(self) -> None:
        """Wait for the next change of the service or its log."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching.add(future)
        try:
            await future
        finally:
            self._watching.discard(future)
